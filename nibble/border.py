"""The border of the page and of the endpoints: what a person is told when something went wrong.

Promises one sentence, and that a fault which nobody foresaw shows an id and no detail. Knows nothing of Gradio.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from nibble.errors import NibbleError, log_unforeseen
from nibble.words import Language, Words

WORDS = Words(
    {
        "internal": (
            "Something went wrong here. The log has the details under id {value}.",
            "这里出了问题。日志中编号 {value} 有详情。",
        )
    }
)


def sentence(error: Exception, language: Language = "en") -> str:
    """Our own sentence, or one with the id under which the log has the details."""
    if isinstance(error, NibbleError):
        return str(error)
    return WORDS.say("internal", language, value=log_unforeseen(error, "call"))


def bordered(call: Callable[..., Any], refusal: Callable[[str], Exception]) -> Callable[..., Any]:
    """The same coroutine function, with every error turned into the `refusal` that a caller may see."""

    @functools.wraps(call)
    async def inner(*values: Any, **named: Any) -> Any:
        try:
            return await call(*values, **named)
        except Exception as error:  # noqa: BLE001 - the border of the endpoints
            raise refusal(sentence(error)) from None

    return inner
