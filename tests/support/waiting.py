"""Wait for something to become true, with an end."""

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def until(look: Callable[[], Found], seconds: float = 30.0) -> Found:
    """What `look` returns as soon as it is true; fails after `seconds`, saying what it returned last."""
    end = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < end, f"still {found!r} after {seconds} s"
        time.sleep(0.02)
