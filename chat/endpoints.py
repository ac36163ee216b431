"""What a script can call with gradio_client to chat: /chat, /bot_response, /stop, /new_chat.

Promises plain text and plain data, and that a refusal arrives as one sentence. A script's conversation is its
session's: it stands on the server, is never written to disk, and ends with the session. Knows nothing of the page.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from contextlib import aclosing

import gradio as gr

from chat.desk import Desk
from chat.form import form_from
from chat.wiring import visitor_from
from nibble.border import bordered, sentence
from nibble.errors import NibbleError

REFUSAL = functools.partial(gr.Error, print_exception=False)


def build_endpoints(desk: Desk) -> None:
    """Register the endpoints, within the Blocks that are open."""

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
        adapter: str = "",
    ) -> AsyncIterator[str]:
        """Answer a message in the session's conversation; yields the growing answer. None is the model's own.

        `adapter` is the name of one that was trained on the loaded model; empty is none.
        """
        visitor = visitor_from(request)
        numbers = (max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
        told, error = "", ""
        try:
            form = form_from(visitor, numbers, system_prompt, adapter)
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
            raise REFUSAL(sentence(problem)) from None

    async def stop(request: gr.Request) -> bool:
        """End the answer that this session is getting; whether there was one."""
        return desk.stop(visitor_from(request))

    async def new_chat(request: gr.Request) -> bool:
        """Begin the session's conversation anew."""
        visitor = visitor_from(request)
        desk.stop(visitor)
        desk.begin(visitor)
        return True

    gr.api(chat, api_name="chat", concurrency_limit=None)
    gr.api(chat, api_name="bot_response", concurrency_limit=None)
    for call, name in ((stop, "stop"), (new_chat, "new_chat")):
        gr.api(bordered(call, REFUSAL), api_name=name, queue=False)
