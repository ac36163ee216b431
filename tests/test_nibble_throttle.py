"""Guessing passwords is slow; knowing one is not."""

import asyncio
from collections.abc import Callable

from nibble.throttle import MOST_FAILURES, LoginThrottle


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def login(scope: dict, receive: object, send: Callable) -> None:
    """Takes the password that stands in the path's query."""
    status = 200 if scope.get("query_string") == b"right" else 400
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def attempt(
    throttle: LoginThrottle, password: bytes = b"wrong", address: str = "10.0.0.1", path: str = "/login"
) -> int:
    """The status of one try."""
    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "query_string": password, "client": (address, 1)}
    asyncio.run(throttle(scope, None, send))  # type: ignore[arg-type]
    return sent[0]["status"]


def test_the_sixth_wrong_password_waits_for_the_minute_to_end() -> None:
    clock = Clock()
    throttle = LoginThrottle(login, clock)
    assert [attempt(throttle) for _ in range(MOST_FAILURES)] == [400] * MOST_FAILURES
    assert attempt(throttle) == 429
    assert attempt(throttle, b"right", path="/login/") == 429
    clock.now += 61
    assert attempt(throttle, b"right") == 200


def test_another_address_and_another_path_are_not_held_up() -> None:
    throttle = LoginThrottle(login, Clock())
    for _ in range(MOST_FAILURES):
        attempt(throttle)
    assert attempt(throttle, address="10.0.0.2") == 400
    assert attempt(throttle, path="/gradio_api/queue/join") == 400


def test_a_right_password_forgives_the_wrong_ones() -> None:
    throttle = LoginThrottle(login, Clock())
    for _ in range(3):
        for _ in range(MOST_FAILURES - 1):
            assert attempt(throttle) == 400
        assert attempt(throttle, b"right") == 200
