"""A text as windows of token ids: what a model reads at once while it is measured.

Promises the same windows for the same text and tokenizer. Needs transformers. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from nibble.checkpoint import CONTEXT_KEYS, read_config
from nibble.errors import DataError
from nibble.prompts import Template, choose_template
from nibble.quality.text import Text

WINDOW = 512
"""Tokens of a window, at most; fewer where the model's context is shorter."""

FEWEST = 64
"""Tokens that must be predicted, at least: below that every figure is luck."""


def load_tokenizer(folder: Path, *, trusted: bool = False) -> Any:
    """The tokenizer of a model folder."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)


def fingerprint(tokenizer: Any) -> str:
    """The same for two tokenizers exactly where they give every token the same id."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def cut(text: Text, folder: Path, tokenizer: Any, tokens: int) -> list[list[int]]:
    """The windows of a text, so many that `tokens` tokens of them are predicted.

    Every token of a window is predicted from those before it in the window, but for the first, which is given. A window
    of a running text begins with what the tokenizer puts first (a BOS token, or nothing) and goes on where the one
    before it ended; windows do not overlap. A window of conversations holds as many whole ones as fit, each in the
    model's chat template as chat would send it; one that alone is too long is cut.

    Args:
        text: as `read_text` returns it.
        folder: of the model, for its family and context.
        tokenizer: the model's.
        tokens: positions to predict; at most those of the text.

    Raises:
        DataError: the text is too short.
    """
    config = read_config(folder)
    settings = config.get("text_config") or config
    context = next((settings[key] for key in CONTEXT_KEYS if isinstance(settings.get(key), int)), WINDOW)
    length = max(2, min(WINDOW, context))
    template = choose_template(tokenizer, str(config.get("model_type", "")), [folder.name])
    windows: list[list[int]] = []
    counted = 0
    for window in _windows(text, tokenizer, template, length):
        window = window[: tokens - counted + 1]
        if len(window) < 2:
            break
        windows.append(window)
        counted += len(window) - 1
    if counted < min(FEWEST, tokens):
        raise DataError(
            f"{text.name} is too short: it has {counted} tokens to predict, and {FEWEST} are needed.",
            "Give a text of some thousand words.",
        )
    return windows


def _windows(text: Text, tokenizer: Any, template: Template, length: int) -> Iterator[list[int]]:
    window: list[int] = []
    for document in text.documents:
        if isinstance(document, str):
            yield from _running(document, tokenizer, length)
            continue
        ids = _conversation(document, tokenizer, template)[:length]
        if len(window) + len(ids) > length:
            yield window
            window = []
        window = window + ids
    if window:
        yield window


def _running(document: str, tokenizer: Any, length: int) -> Iterator[list[int]]:
    ids = tokenizer(document, add_special_tokens=False)["input_ids"]
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step = length - len(first)
    for start in range(0, len(ids), step):
        yield first + ids[start : start + step]


def _conversation(turns: list[dict[str, str]], tokenizer: Any, template: Template) -> list[int]:
    """The prompt of the last answer as chat would send it, the answer, and the token that ends it."""
    ids = template.encode(tokenizer, turns[:-1])  # type: ignore[arg-type]
    ids += tokenizer(turns[-1]["content"], add_special_tokens=False)["input_ids"]
    end = next(iter(template.stops), tokenizer.eos_token_id)
    return ids if end is None else [*ids, end]
