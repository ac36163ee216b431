"""Passwords are not guessed fast: too many wrong ones from one address close the login for a while.

Plain ASGI; knows nothing of Gradio beyond the path of its login and the status of a wrong password.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, MutableMapping
from typing import Any

from nibble.hosting import Application, Receive, Scope, Send

LOGIN = "/login"
MOST_FAILURES = 5
WINDOW_S = 60.0
MOST_ADDRESSES = 10_000


class LoginThrottle:
    """ASGI middleware: after five wrong passwords within a minute, an address waits until the minute is over."""

    def __init__(self, app: Application, clock: Callable[[], float] = time.monotonic) -> None:
        self.app = app
        self._clock = clock
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; all but logins pass untouched."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].rstrip("/") != LOGIN:
            return await self.app(scope, receive, send)
        address = (scope.get("client") or ("",))[0]
        failures = self._recent(address)
        if len(failures) >= MOST_FAILURES:
            return await _refuse(send)
        # Counted before the answer is known: a hundred guesses at once must not all get one.
        failures.append(self._clock())

        async def watched(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                failures.clear()
            await send(message)

        return await self.app(scope, receive, watched)

    def _recent(self, address: str) -> deque[float]:
        failures = self._failures.setdefault(address, deque())
        self._failures.move_to_end(address)
        while len(self._failures) > MOST_ADDRESSES:
            self._failures.popitem(last=False)
        while failures and failures[0] < self._clock() - WINDOW_S:
            failures.popleft()
        return failures


async def _refuse(send: Send) -> None:
    body = b'{"detail": "Too many wrong passwords. Wait a minute, then try again."}'
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 429, "headers": headers})
    await send({"type": "http.response.body", "body": body})
