"""Requests in, chunks out, one answer at a time: the part that every engine with a thread of its own shares.

Promises that each request gets its own chunks in order and then either a finish reason or one `NibbleError`, that a
stopped request leaves at once while it waits, and that whatever goes wrong in the thread reaches the one who asked.
Knows nothing of models: `answer` is the engine's. Batching would take several requests from the queue together here.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import wraps
from typing import ParamSpec, TypeVar

from nibble.engines.base import Chunk, EngineInfo, Message, Sampling
from nibble.engines.queue import FairQueue
from nibble.errors import EngineDied, NibbleError, log_unforeseen

BEAT_S = 0.1
"""How often a waiting reader looks at its stop event."""

GRACE_S = 0.6
"""How long a reader that stopped waits for the thread's own last word before it leaves without it."""

STALL_S = 60.0
"""How long a request whose turn it is may be silent: each piece of the prompt and each token is a word."""

Sink = Callable[[Chunk | NibbleError], None]
"""Takes a request's chunks, in order, from any thread; neither blocks nor raises. An error is its last."""


P = ParamSpec("P")
Loaded = TypeVar("Loaded")


def apart(load: Callable[P, Loaded]) -> Callable[P, Loaded]:
    """A loader that does its work in a thread which ends with it.

    Each thread that computes gets helpers of its own from the OpenMP library, as many as there are cores. While those
    of the loading thread live on beside those of the answering thread there are more helpers than cores; libgomp then
    lets them sleep between two operations instead of spin, and waking them costs an answer a third of its speed.
    """

    @wraps(load)
    def inner(*args: P.args, **kwargs: P.kwargs) -> Loaded:
        with ThreadPoolExecutor(1, thread_name_prefix="loading") as thread:
            return thread.submit(load, *args, **kwargs).result()

    return inner


class Stalled(EngineDied):
    """A model that no longer moves."""


@dataclass(frozen=True)
class Request:
    """What is asked of an engine."""

    messages: Sequence[Message]
    sampling: Sampling
    visitor: str | None = None
    adapter: str = ""
    """Folder of the adapter that the model wears for this answer; empty is none."""


class Ticket:
    """One request on its way: whether it was stopped, and where its chunks go."""

    def __init__(self, request: Request, sink: Sink, stop: threading.Event | None = None) -> None:
        self.request = request
        self._sink = sink
        self._stop = stop or threading.Event()
        self._left = False
        self._lock = threading.Lock()
        self._place: int | None = None
        self._begun = False
        self._done = False

    @property
    def stopped(self) -> bool:
        """Whether the one who asked no longer wants more."""
        return self._left or self._stop.is_set()

    def leave(self) -> None:
        """Stop this request without touching the caller's event."""
        self._left = True

    def begin(self) -> None:
        """Its turn has come: one who was told a place is told so, and no word of a place follows."""
        with self._lock:
            self._begun = True
            if self._place and not self._done:
                self._sink(Chunk())

    def tell_place(self, place: int) -> None:
        """Tell how many requests are served before this one, where that changed."""
        with self._lock:
            if not self._begun and not self._done and place != self._place:
                self._place = place
                self._sink(Chunk(place=place))

    def emit(self, item: Chunk | NibbleError) -> None:
        """Hand on a chunk or an error; nothing follows a finish reason or an error."""
        with self._lock:
            if not self._done:
                self._done = isinstance(item, NibbleError) or item.finish_reason is not None
                self._sink(item)

    @property
    def done(self) -> bool:
        """Whether the last chunk, or an error, was handed on."""
        return self._done


class ThreadedEngine(ABC):
    """An engine whose answers are made one at a time in a thread of its own."""

    def __init__(self) -> None:
        self._queue: FairQueue[Ticket] = FairQueue()
        self._running: Ticket | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="nibble-engine", daemon=True)
        self._thread.start()

    @property
    @abstractmethod
    def info(self) -> EngineInfo:
        """What is loaded."""

    @abstractmethod
    def answer(self, ticket: Ticket) -> None:
        """Answer one request, in the engine's thread: emit its chunks, the last with a finish reason.

        Must look at `ticket.stopped` at least twice a second. The thread is already running when `__init__` returns.
        """

    def explain(self, error: BaseException) -> NibbleError:
        """The sentence for whatever `answer` raised; the details go to the log under an id."""
        if isinstance(error, NibbleError):
            return error
        number = log_unforeseen(error, "answer")
        kind = type(error).__name__
        return NibbleError(
            f"The answer failed inside the model ({kind}).", f"The log has the details under id {number}."
        )

    def submit(self, request: Request, sink: Sink, stop: threading.Event | None = None) -> Ticket:
        """Stand in line; the answer goes to `sink`. Returns at once.

        Raises:
            NibbleError: the engine was closed.
        """
        if self._closed:
            raise unloaded()
        ticket = Ticket(request, sink, stop)
        self._queue.put(ticket, request.visitor or ticket)
        self._tell_places()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request: a waiting one leaves the line at once, a running one at its next token or chunk."""
        ticket.leave()
        if self._queue.remove(ticket):
            ticket.emit(Chunk(finish_reason="stopped"))
            self._tell_places()

    def stream(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        stop: threading.Event,
        visitor: str | None = None,
        adapter: str = "",
    ) -> Iterator[Chunk]:
        """As `nibble.engines.base.Engine.stream`."""
        box: queue.SimpleQueue[Chunk | NibbleError] = queue.SimpleQueue()
        ticket = self.submit(Request(messages, sampling, visitor, adapter), box.put, stop)
        try:
            yield from read_box(box, Reading(stop, lambda: self.cancel(ticket)))
        finally:
            self.cancel(ticket)

    def close(self) -> None:
        """End the running answer, turn away the waiting ones and let the thread go. A second call does nothing."""
        self._closed = True
        if self._running is not None:
            self._running.leave()
        for ticket in self._queue.close():
            ticket.emit(unloaded())
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5)

    def _serve(self) -> None:
        while (ticket := self._queue.take()) is not None:
            self._running = ticket
            ticket.begin()
            self._tell_places()
            try:
                if ticket.stopped or self._closed:
                    ticket.emit(Chunk(finish_reason="stopped"))
                else:
                    self.answer(ticket)
            except BaseException as error:  # noqa: BLE001 - the thread's border: handed over, never lost
                ticket.emit(self.explain(error))
            finally:
                self._running = None
            if not ticket.done:
                ticket.emit(NibbleError("The answer ended without a reason.", "Send the message again."))

    def _tell_places(self) -> None:
        ahead = 1 if self._running is not None else 0
        for place, ticket in enumerate(self._queue.in_order(), start=ahead):
            if place:
                ticket.tell_place(place)


class Reading:
    """What a reader makes of the items that arrive for its request, or fail to arrive."""

    def __init__(self, stop: threading.Event, on_stop: Callable[[], None]) -> None:
        """
        Args:
            stop: the reader's own event.
            on_stop: called once, when `stop` was seen.
        """
        self._stop = stop
        self._on_stop = on_stop
        self._last = Chunk()
        self._leave_at = math.inf
        self._heard = time.monotonic()

    def take(self, item: Chunk | NibbleError | None) -> Chunk:
        """The chunk to yield for an item, or for none within a beat; the last one has a finish reason.

        Raises:
            NibbleError: the error that arrived.
            Stalled: it is this request's turn, and nothing was heard of it for `STALL_S`.
        """
        now = time.monotonic()
        if self._stop.is_set() and self._leave_at == math.inf:
            self._leave_at = now + GRACE_S
            self._on_stop()
        if isinstance(item, NibbleError):
            raise item
        if item is not None:
            self._heard = now
        elif now - self._heard > STALL_S and not self._last.place:
            raise Stalled(f"The model has not moved for {STALL_S:.0f} seconds.", "Send the message again.")
        chunk = item or replace(self._last, text="")
        if now > self._leave_at and chunk.finish_reason is None:
            chunk = replace(chunk, finish_reason="stopped")
        self._last = chunk
        return chunk


def read_box(box: queue.SimpleQueue[Chunk | NibbleError], reading: Reading) -> Iterator[Chunk]:
    """Yield what arrives in a box, filled by a `Sink`, until a finish reason; an empty chunk where nothing came.

    Raises:
        NibbleError: as `Reading.take`.
    """
    while True:
        try:
            item = box.get(timeout=BEAT_S)
        except queue.Empty:
            item = None
        chunk = reading.take(item)
        yield chunk
        if chunk.finish_reason is not None:
            return


def unloaded() -> NibbleError:
    """What is said to a request whose model was let go."""
    return NibbleError("The model was unloaded before it could answer.", "Load a model and send the message again.")
