"""The text that models are measured on: what stands in a file, before any tokenizer has seen it.

Promises that a text which cannot be used is refused in one sentence. Imports no torch. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from nibble.errors import DataError

SHIPPED = Path(__file__).parents[2] / "guide" / "data" / "evaluation.jsonl"
"""Questions about Nibble, English and Chinese, with the guide's answers. The guide was trained on the answers and not
on the questions; to every other model it is plain new text."""

MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Text:
    """A text, read."""

    name: str
    sha256: str
    documents: tuple[str | list[dict[str, str]], ...]
    """Running texts, or conversations: lists of {"role", "content"} that end with an answer."""


def read_text(path: Path | None = None) -> Text:
    """Read a file: *.jsonl of conversations, {"messages": [...]} a line; *.json, a list of texts; else running text.

    Args:
        path: None is the text that ships with Nibble.

    Raises:
        DataError: no such file, not UTF-8, empty, or not of the form that its name says.
    """
    file = path or SHIPPED
    try:
        if file.stat().st_size > MAX_BYTES:
            raise DataError(
                f"{file.name} is larger than 64 MiB.", "A few thousand words are enough: give a part of it."
            )
        raw = file.read_bytes()
        content = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.", "Name an existing text file.") from None
    except UnicodeDecodeError:
        raise DataError(f"{file.name} is not UTF-8 text.", "Save it as UTF-8.") from None
    if not content.strip():
        raise DataError(f"{file.name} is empty.", "Give a text of some thousand words.")
    name = file.name if path else "shipped"
    return Text(name, hashlib.sha256(raw).hexdigest(), tuple(_documents(file, content)))


def _documents(file: Path, content: str) -> list[str | list[dict[str, str]]]:
    if file.suffix not in (".json", ".jsonl"):
        return [content]
    try:
        if file.suffix == ".jsonl":
            values = [json.loads(line)["messages"] for line in content.split("\n") if line.strip()]
            fits = all(_is_conversation(value) for value in values)
        else:
            values = json.loads(content)
            fits = isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)
    except (ValueError, TypeError, KeyError, RecursionError):
        fits = False
    if not fits:
        form = 'a conversation {"messages": [...]} in each line' if file.suffix == ".jsonl" else "a list of texts"
        raise DataError(f"{file.name} is not {form}.", "Give a plain text file instead: *.txt.")
    return list(values)


def _is_conversation(value: object) -> bool:
    """Whether it is a list of turns that ends with an answer to something."""
    return (
        isinstance(value, list)
        and len(value) >= 2
        and all(
            isinstance(turn, dict) and {type(turn.get(key)) for key in ("role", "content")} == {str} for turn in value
        )
        and value[-1]["role"] == "assistant"
    )
