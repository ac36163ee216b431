"""What a script can call with gradio_client: /chat, /bot_response, /stop, /new_chat, /models, /load, /unload.

Promises plain text and plain data, and that a refusal arrives as one sentence. A script's conversation is its
session's: it stands on the server, is never written to disk, and ends with the session. Knows nothing of the page.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import gradio as gr

from chat.desk import Desk
from chat.form import form_from
from chat.operating import Operator
from chat.wiring import visitor_from
from nibble.errors import NibbleError

log = logging.getLogger(__name__)


def refusing(error: Exception) -> gr.Error:
    """The error that a caller sees: our own sentence, or the id under which the log has the details."""
    if isinstance(error, NibbleError):
        return gr.Error(str(error), print_exception=False)
    number = secrets.token_hex(3)
    log.error("a call failed, id %s", number, exc_info=error)
    return gr.Error(f"Something went wrong here. The log has the details under id {number}.", print_exception=False)


def bordered(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same coroutine function, with every error turned into one that a caller may see."""

    @functools.wraps(call)
    async def inner(*values: Any, **named: Any) -> Any:
        try:
            return await call(*values, **named)
        except Exception as error:  # noqa: BLE001 - the border of the endpoints
            raise refusing(error) from None

    return inner


def build_endpoints(desk: Desk, operator: Operator, *, public: bool) -> None:
    """Register the endpoints, within the Blocks that are open; in public mode without /load and /unload."""

    async def chat(
        request: gr.Request,
        message: str,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        system_prompt: str | None = None,
    ) -> AsyncIterator[str]:
        """Answer a message in the session's conversation; yields the growing answer. None is the model's own."""
        visitor = visitor_from(request)
        numbers = (max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
        told, error = "", ""
        try:
            form = form_from(visitor, numbers, system_prompt)
            async with aclosing(desk.say(visitor, message, form)) as steps:
                async for progress in steps:
                    error = progress.conversation.turns[-1].error
                    if progress.text != told:
                        told = progress.text
                        yield told
            if error:
                raise NibbleError(error)
            if not told:
                yield told
        except Exception as problem:  # noqa: BLE001 - the border of the endpoints
            raise refusing(problem) from None

    async def stop(request: gr.Request) -> bool:
        """End the answer that this session is getting; whether there was one."""
        return desk.stop(visitor_from(request))

    async def new_chat(request: gr.Request) -> bool:
        """Begin the session's conversation anew."""
        visitor = visitor_from(request)
        desk.stop(visitor)
        desk.begin(visitor)
        return True

    async def models() -> list[dict[str, Any]]:
        """The models on this machine: name, family, parameters, format, size, context, what is wrong, loaded."""
        return await asyncio.to_thread(operator.cards)

    gr.api(chat, api_name="chat", concurrency_limit=None)
    gr.api(chat, api_name="bot_response", concurrency_limit=None)
    for call, name in ((stop, "stop"), (new_chat, "new_chat"), (models, "models")):
        gr.api(bordered(call), api_name=name, queue=False)
    if not public:
        build_operator_endpoints(operator)


def build_operator_endpoints(operator: Operator) -> None:
    """Register /load and /unload."""

    async def load(request: gr.Request, name: str, low_bit: str = "", device: str = "") -> str:
        """Load a model by its name, in a format, on a device; empty takes the server's settings."""
        return await operator.load(visitor_from(request), name, low_bit, device)

    async def unload(request: gr.Request) -> str:
        """Let the model go and give its memory back."""
        return await operator.unload(visitor_from(request))

    for call, name in ((load, "load"), (unload, "unload")):
        gr.api(bordered(call), api_name=name, concurrency_limit=None)
