"""A tokenizer of transformers 4, with the few methods of transformers 5 that `nibble.prompts` asks for.

Promises that templates are rendered in a sandbox as transformers 5 renders them, and that text written by a person
never becomes a special token. Uses what transformers 4.31 and later have alike. Knows nothing of models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

BREAK = "\ue000"
"""Set inside a special token that a person wrote; the text is encoded apart on both sides of it."""


class OlderTokenizer:
    """Wraps a tokenizer; what is not defined here is the tokenizer's own."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = _special_tokens(tokenizer)
        names = sorted(self._special, key=len, reverse=True)
        self._written = re.compile("|".join(map(re.escape, names))) if names else None
        self.is_fast = bool(getattr(tokenizer, "is_fast", False))
        self.chat_template: str | None = getattr(tokenizer, "chat_template", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        """As the tokenizer's own."""
        return self._tokenizer(text, **options)

    def get_vocab(self) -> dict[str, int]:
        """Every token that is text, and its id; tokenizers of remote code may leave out the special ones."""
        vocabulary = {token: number for token, number in self._tokenizer.get_vocab().items() if isinstance(token, str)}
        return {**vocabulary, **self._special}

    def apply_chat_template(
        self, conversation: Sequence[dict[str, str]], chat_template: str | None = None, *,
        add_generation_prompt: bool = False, tokenize: bool = True, **_: Any,
    ) -> Any:  # fmt: skip
        """The prompt of a conversation: {"input_ids": ids}, or its text where not `tokenize`.

        Raises:
            jinja2.TemplateError: the template refuses the conversation.
        """
        template = chat_template or self.chat_template
        messages = [{**message, "content": self._broken(message["content"])} for message in conversation]
        marks = {name: getattr(self._tokenizer, name, None) or "" for name in ("bos_token", "eos_token", "pad_token")}
        text = _compile(str(template)).render(messages=messages, add_generation_prompt=add_generation_prompt, **marks)
        if not tokenize:
            return text.replace(BREAK, "")
        return {"input_ids": [number for piece in text.split(BREAK) for number in self._encode(piece)]}

    def _broken(self, text: str) -> str:
        text = text.replace(BREAK, "")
        return self._written.sub(lambda found: found[0][0] + BREAK + found[0][1:], text) if self._written else text

    def _encode(self, text: str) -> list[int]:
        """Ids of a text in which special tokens mean themselves; nothing is put before or after."""
        if self.is_fast or self._written is None:
            return list(self._tokenizer.encode(text, add_special_tokens=False)) if text else []
        ids: list[int] = []
        end = 0
        # Tokenizers in Python differ in whether they look for special tokens in a text: ChatGLM's do not.
        for found in self._written.finditer(text):
            ids += self._plain(text[end : found.start()])
            ids.append(self._special[found[0]])
            end = found.end()
        return ids + self._plain(text[end:])

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False)) if text else []


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Special tokens and their ids: transformers' own, and the tables of Qwen's and ChatGLM's remote code."""
    inner = getattr(tokenizer, "tokenizer", None)
    found: dict[str, int] = {}
    for table in (getattr(tokenizer, "special_tokens", None), getattr(inner, "special_tokens", None)):
        if isinstance(table, dict):
            found.update({str(token): int(number) for token, number in table.items()})
    found.update({str(token): int(number) for token, number in tokenizer.get_added_vocab().items()})
    ids = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    found.update({str(token): int(number) for token, number in ids if number is not None})
    return {token: number for token, number in found.items() if len(token) > 1}


def _compile(template: str) -> jinja2.Template:
    """As transformers 5 sets its sandbox up (`utils/chat_template_utils.py`)."""

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    sandbox.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    sandbox.globals["raise_exception"] = raise_exception
    return sandbox.from_string(template)
