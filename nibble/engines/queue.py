"""Who is served next: requests in line, visitors in turn.

Promises that a visitor with many requests delays another visitor by at most one of them. Knows nothing of what a
request is, nor of threads beyond its own lock.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class FairQueue(Generic[T]):
    """First in, first out for each visitor; round robin over visitors. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._lines: OrderedDict[Hashable, deque[T]] = OrderedDict()
        self._closed = False

    def put(self, item: T, visitor: Hashable) -> None:
        """Stand in line. A visitor who is not yet in line gets the last turn of the round."""
        with self._changed:
            self._lines.setdefault(visitor, deque()).append(item)
            self._changed.notify()

    def take(self) -> T | None:
        """The next item; waits for one. None once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._lines) or self._closed)
            if self._closed:
                return None
            visitor, line = self._lines.popitem(last=False)
            item = line.popleft()
            if line:
                self._lines[visitor] = line
            return item

    def remove(self, item: T) -> bool:
        """Leave the line; False where the item does not stand in it."""
        with self._changed:
            for visitor, line in self._lines.items():
                if item in line:
                    line.remove(item)
                    if not line:
                        del self._lines[visitor]
                    return True
            return False

    def in_order(self) -> list[T]:
        """Every waiting item, in the order in which they would be served if nobody else came."""
        with self._changed:
            lines = [list(line) for line in self._lines.values()]
        rounds = range(max(map(len, lines), default=0))
        return [line[turn] for turn in rounds for line in lines if turn < len(line)]

    def close(self) -> list[T]:
        """Wake whoever waits in `take`; return what was still in line."""
        left = self.in_order()
        with self._changed:
            self._closed = True
            self._lines.clear()
            self._changed.notify_all()
        return left
