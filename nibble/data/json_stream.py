"""The rows of a JSON file, one at a time: a list, an object with its list under a key, or an object that is the row.

Promises to hold one row and about a chunk of text in memory, and to name the row and line where the JSON is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nibble.data.rows import Record
from nibble.data.text import MAX_ROW, read_text, too_long
from nibble.errors import DataError

WRAPPERS = ("data", "rows", "train", "examples", "instances", "items")
"""Keys of a JSON object under which its list of rows may stand."""

DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\r\n]*")
LOOK_AHEAD = 32
"""Characters that must follow a number before it is known to be whole; also how near the end a cut may show."""


class _Window:
    """The text of a JSON file, a part at a time, with the place up to which it is read."""

    def __init__(self, path: Path) -> None:
        self.path, self.chunks = path, read_text(path)
        self.text, self.at, self.line, self.whole = "", 0, 1, False

    def more(self) -> bool:
        """Drop what was read and add the next chunk; False at the end of the file."""
        chunk = next(self.chunks, None)
        if chunk is None:
            self.whole = True
            return False
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :] + chunk, 0
        return True

    def peek(self) -> str:
        """The next character that is not space, not yet taken; empty at the end of the file."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self) -> str:
        """The next character that is not space."""
        character = self.peek()
        self.at += len(character)
        return character

    def value(self, where: str) -> Any:
        """The next whole JSON value."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                # A number may go on in the next chunk; whatever else decodes is whole.
                if self.whole or end + LOOK_AHEAD <= len(self.text) or isinstance(value, str | dict | list):
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                near = LOOK_AHEAD if not self.whole else len(self.text) - len(self.text.rstrip())
                cut = error.msg.startswith("Unterminated") or error.pos + near >= len(self.text)
                if not cut:
                    raise self.wrong(where, error.msg, error.pos) from None
                if self.whole:
                    raise self.cut_short(where) from None
            except RecursionError:
                raise self.wrong(where, "it is nested too deeply", self.at) from None
            except ValueError:
                raise self.wrong(where, "it holds a number that is too long", self.at) from None
            if len(self.text) - self.at > MAX_ROW:
                raise too_long(self.path, where)
            self.more()

    def wrong(self, where: str, why: str, at: int | None = None) -> DataError:
        line = self.line + self.text.count("\n", 0, self.at if at is None else at)
        return DataError(
            f"{where.capitalize()} of {self.path.name}, at line {line}, is not valid JSON: {why}.",
            "Mend the file there, or write it again with a JSON library.",
        )

    def cut_short(self, where: str) -> DataError:
        return DataError(
            f"{self.path.name} is cut short: it ends in the middle of {where}.", "Get the whole file again."
        )


def read_json(path: Path) -> Iterator[Record]:
    """Every row in order; numbers count from 1.

    Raises:
        DataError: from where the file cannot be read on.
    """
    window = _Window(path)
    opening = window.peek()
    if opening == "[":
        yield from _elements(window)
    elif opening == "{":
        yield from _object(window)
    elif opening:
        raise DataError(
            f"{path.name} begins with {opening!r} at line {window.line}: it is no JSON list or object.",
            "Save the rows as a JSON list, or as JSON Lines.",
        )
    if window.peek():
        raise window.wrong("the text after the rows", "more follows where the list has ended")


def _elements(window: _Window) -> Iterator[Record]:
    window.take()
    number = 0
    if window.peek() == "]":
        window.take()
        return
    while True:
        number += 1
        yield Record(number, window.value(f"row {number}"))
        mark = window.take()
        if mark == "]":
            return
        if not mark:
            raise window.cut_short(f"the list, after row {number}")
        if mark != ",":
            raise window.wrong(f"row {number}", f"{mark!r} follows it where a comma or ] must stand")


def _object(window: _Window) -> Iterator[Record]:
    """The rows under a wrapper's key, or the object itself as the only row."""
    window.take()
    single: dict[str, Any] = {}
    wrapped = ""
    while window.peek() not in ("}", ""):
        if window.peek() != '"':
            raise window.wrong("the object", f"{window.peek()!r} stands where a key in double quotes must")
        key = window.value("a key")
        if window.take() != ":":
            raise window.wrong("the object", f"no colon follows the key {key!r}")
        if key in WRAPPERS and window.peek() == "[":
            if wrapped:
                raise DataError(
                    f"{window.path.name} holds two lists of rows, {wrapped!r} and {key!r}.", "Save one list a file."
                )
            wrapped = key
            yield from _elements(window)
        else:
            single[key] = window.value(f"the value of {key!r}")
        if window.peek() == ",":
            window.take()
        elif window.peek() not in ("}", ""):
            raise window.wrong("the object", f"{window.peek()!r} follows the value of {key!r}")
    if not window.take():
        raise window.cut_short("the object")
    if single and not wrapped:
        yield Record(1, single)
