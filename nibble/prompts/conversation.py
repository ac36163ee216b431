"""A conversation made fit to be asked: cleaned, and within the context.

Promises that the system prompt and the last message are never dropped, and exact counts. Knows nothing of templates or
tokenizers: it is given a function that encodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

from nibble.engines.base import Message
from nibble.errors import NibbleError

MAX_CHARACTERS = 4_000_000
"""Longest message that is tokenised at all; counting the tokens of a longer one would hold up the others."""

Encode = Callable[[Sequence[Message]], list[int]]
"""A conversation -> the token ids of its prompt."""


@dataclass(frozen=True)
class Fitted:
    """A conversation that fits."""

    ids: list[int]
    dropped_turns: int
    """Oldest turns, each a question with its answer, that were left out."""


def clean(messages: Sequence[Message]) -> list[Message]:
    """The conversation without what no tokenizer can take, and in the order that every template can take.

    NUL characters and lone surrogates are removed, an empty system prompt and empty answers are left out, and messages
    of one role in a row (a question whose answer was stopped before its first word) become one.

    Raises:
        NibbleError: a role or content that is none, an empty last message, or an order that is no conversation.
    """
    whole = [_clean_message(message) for message in messages]
    if not whole or whole[-1]["role"] != "user":
        raise NibbleError("There is no message to answer.", "The last message must be the user's.")
    if not whole[-1]["content"].strip():
        raise NibbleError("The message is empty.", "Write something first.")
    kept = [message for message in whole if message["content"].strip()]
    merged: list[Message] = []
    for role, group in groupby(kept, key=lambda message: message["role"]):
        merged.append({"role": role, "content": "\n\n".join(message["content"] for message in group)})
    roles = [message["role"] for message in merged]
    if "system" in roles[1:] or roles[roles[0] == "system"] != "user":
        raise NibbleError(
            "The messages are no conversation.", "After at most one system prompt, user and assistant take turns."
        )
    return merged


def _clean_message(message: Message) -> Message:
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise NibbleError(f"There is no role {role!r}.", "A message is of system, user or assistant.")
    if not isinstance(content, str):
        raise NibbleError(f"A message of {role} is not text.", "Send its content as one string.")
    if len(content) > MAX_CHARACTERS:
        raise NibbleError(
            f"The message is too long: {len(content):,} characters, at most {MAX_CHARACTERS:,}.", "Send a part of it."
        )
    text = content.replace("\0", "").encode("utf-8", "ignore").decode("utf-8")
    return {"role": role, "content": text}


def fit(messages: Sequence[Message], encode: Encode, context: int, reserve: int = 1) -> Fitted:
    """The prompt of as many of the latest turns as leave room for an answer.

    Args:
        messages: as `clean` returns them.
        encode: makes the prompt's token ids.
        context: tokens the model can see at once, the answer's among them.
        reserve: tokens kept free for the answer. The last message alone may use all of them but one.

    Raises:
        NibbleError: the last message, with the system prompt, is longer than the context.
    """
    start = 1 if messages[0]["role"] == "system" else 0
    system, turns = list(messages[:start]), _turns(messages[start:])

    def ids_without(dropped: int) -> list[int]:
        return encode([*system, *chain.from_iterable(turns[dropped:])])

    ids, last = ids_without(0), len(turns) - 1
    if len(ids) <= context - reserve:
        return Fitted(ids, 0)
    low, high, found = 1, last, None
    while low <= high:  # the fewest turns to drop: the prompt only gets shorter as more are dropped
        middle = (low + high) // 2
        ids = ids_without(middle)
        if len(ids) <= context - reserve:
            found, high = Fitted(ids, middle), middle - 1
        else:
            low = middle + 1
    if found is not None:
        return found
    ids = ids_without(last)
    if len(ids) >= context:
        raise NibbleError(
            f"The message is too long: {len(ids):,} tokens with the system prompt, room for {context - 1:,}.",
            "Send a shorter message, or choose a model with a longer context.",
        )
    return Fitted(ids, last)


def _turns(messages: Sequence[Message]) -> list[list[Message]]:
    """Each question with what follows it up to the next question."""
    turns: list[list[Message]] = []
    for message in messages:
        if message["role"] == "user":
            turns.append([])
        turns[-1].append(message)
    return turns
