"""Token ids into text, as they come: whole characters only, and never a piece that is taken back.

Promises that the pieces, joined, are the text of the whole answer, or that `end` returns the text that replaces them.
Knows nothing of models or conversations.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

import tokenizers

try:
    from tokenizers.decoders import DecodeStream
except ImportError:  # tokenizers before 0.21, as BigDL-LLM needs it: `SlowDecoder` serves there
    DecodeStream = None  # type: ignore[assignment, misc]

KEPT = ("<think>", "</think>")
"""Tokens whose text stays in the answer even where a tokenizer calls them special: the page folds what they enclose."""

UNKNOWN = "\ufffd"
"""What decoders write for bytes that are not, or not yet, a character."""


class Decoder(Protocol):
    """Makes text of one answer."""

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        ...

    def end(self) -> tuple[str, str | None]:
        """The text still held back, and the whole text where it differs from the joined pieces, else None."""
        ...


class DecoderFactory:
    """Makes a decoder for each answer of one tokenizer.

    Fast tokenizers are copied: one that encodes in another thread would raise "Already borrowed".
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = _copy(tokenizer) if getattr(tokenizer, "is_fast", False) else None

    def __call__(self, context: Sequence[int] = ()) -> Decoder:
        """A decoder for one answer.

        Args:
            context: last token ids of a text that the answer goes on with: its first piece then keeps a leading space.
        """
        if self._backend is not None:
            return FastDecoder(self._backend, context)
        return SlowDecoder(self._tokenizer, context)


def _copy(tokenizer: Any) -> tokenizers.Tokenizer:
    """The tokenizer's own backend once more, with the tokens in `KEPT` as ordinary text."""
    text = tokenizer.backend_tokenizer.to_str()
    if any(token.special and token.content in KEPT for token in tokenizer.added_tokens_decoder.values()):
        state = json.loads(text)
        for token in state["added_tokens"]:
            token["special"] = token["special"] and token["content"] not in KEPT
        text = json.dumps(state)
    return tokenizers.Tokenizer.from_str(text)


class FastDecoder:
    """Decodes with the tokenizers library's stream; each step costs about a microsecond."""

    def __init__(self, backend: tokenizers.Tokenizer, context: Sequence[int] = ()) -> None:
        self._backend = backend
        self._context = list(context)
        self._ids: list[int] = []
        self._sent = ""
        self._stream = DecodeStream(ids=list(context), skip_special_tokens=True)

    def push(self, token: int) -> str:
        """As `Decoder.push`."""
        try:
            piece = self._stream.step(self._backend, token)
        except Exception as error:  # noqa: BLE001 - the library raises plain Exception for bytes that are no UTF-8
            if "Invalid prefix" not in str(error):
                raise
            last = (self._context + self._ids)[-1:]
            self._stream = DecodeStream(ids=last, skip_special_tokens=True)
            piece = self._stream.step(self._backend, token)
        self._ids.append(token)
        self._sent += piece or ""
        return piece or ""

    def end(self) -> tuple[str, str | None]:
        """As `Decoder.end`."""
        before = self._backend.decode(self._context, skip_special_tokens=True)
        whole = self._backend.decode(self._context + self._ids, skip_special_tokens=True)[len(before) :]
        return _remainder(self._sent, whole)


class SlowDecoder:
    """Decodes with a tokenizer written in Python, again from the last whole character at each token."""

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._context = list(context)
        self._ids: list[int] = list(context)
        self._sent = ""
        # A window: ids from _start to _seen are already sent, and give the tokens after them their context.
        self._start = self._seen = len(self._ids)
        self._start = max(0, self._start - 4) if context else 0

    def push(self, token: int) -> str:
        """As `Decoder.push`."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._seen])
        after = self._decode(self._ids[self._start :])
        if after.endswith(UNKNOWN) or len(after) <= len(before):
            return ""
        self._start, self._seen = self._seen, len(self._ids)
        piece = after[len(before) :]
        self._sent += piece
        return piece

    def end(self) -> tuple[str, str | None]:
        """As `Decoder.end`."""
        whole = self._decode(self._ids)[len(self._decode(self._context)) :]
        return _remainder(self._sent, whole)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _remainder(sent: str, whole: str) -> tuple[str, str | None]:
    if whole.startswith(sent):
        return whole[len(sent) :], None
    return "", whole
