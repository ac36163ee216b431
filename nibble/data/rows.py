"""What flows through this package: a row of a file, what is wrong with one, and the tokens that are made of it.

Promises plain, frozen data without tokenizers or files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nibble.engines.base import Message
from nibble.errors import DataError

BAD_CHARACTERS = re.compile("[\0\ud800-\udfff]")
"""What no text may hold: JSON can escape it, and neither a tokenizer nor a page takes it."""

IGNORED = -100
"""Label of a token that is not trained on: torch's `cross_entropy` leaves it out by default."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with one row, without the row's number: "has no column 'output'"."""

    kind: str
    what: str
    hint: str


class RowFault(Exception):
    """Raised while a row is mapped; carries the `Fault`, and never leaves this package."""

    def __init__(self, kind: str, what: str, hint: str) -> None:
        super().__init__(what)
        self.fault = Fault(kind, what, hint)


@dataclass(frozen=True)
class Record:
    """A row as it stands in the file, before any form is looked for."""

    number: int
    """From 1: the line of a JSON Lines file; the element or row of any other, its header not counted."""
    value: Any
    fault: Fault | None = None
    """Set where the row could not be parsed; `value` is then None."""


@dataclass(frozen=True)
class Row:
    """A row mapped to what can be trained on: either text or a conversation that holds an answer."""

    number: int
    text: str = ""
    messages: tuple[Message, ...] = ()
    """At most one system prompt, then user and assistant in turns, ending with the assistant. Empty: `text` counts."""
    notes: tuple[str, ...] = ()
    """What was changed: keys of `nibble.data.check.NOTES`."""


@dataclass(frozen=True)
class Sample:
    """A row as token ids, and which of them the loss is taken on."""

    row: int
    ids: list[int]
    trained: list[bool]
    """Of each token, whether the model learns to predict it. Never of the first: nothing stands before it."""
    truncated: bool = False

    @property
    def labels(self) -> list[int]:
        """The ids, with `IGNORED` where the loss is not taken; not shifted, as transformers' models expect."""
        return [token if learnt else IGNORED for token, learnt in zip(self.ids, self.trained, strict=True)]


@dataclass(frozen=True)
class ColumnMap:
    """What the person says of a file; it overrides what is detected."""

    form: str | None = None
    """One of `nibble.data.forms.FORMS`; None lets the columns tell."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Field of a form -> column of the file, e.g. {"text": "quote"}."""
    leave_out: bool = False
    """Leave faulty rows out, counted and named, instead of refusing the file."""

    @classmethod
    def parse(cls, text: str, *, leave_out: bool = False) -> ColumnMap:
        """The map that a line like `text=quote` or `prompt=question, completion=answer` writes out.

        Raises:
            DataError: a piece that is not FIELD=COLUMN.
        """
        columns = {}
        for piece in filter(None, (piece.strip() for piece in text.split(","))):
            name, sign, column = (part.strip() for part in piece.partition("="))
            if not (name and sign and column):
                raise DataError(f"{piece!r} is no column mapping.", "Write FIELD=COLUMN, for example text=quote.")
            columns[name] = column
        return cls(columns=columns, leave_out=leave_out)
