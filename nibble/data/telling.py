"""What was found in a data set, as plain data: for a page, an endpoint, or another process.

Promises text that JSON and HTML can hold, and little of it, however long a row is. Imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from nibble.data.check import Report
from nibble.data.forms import as_columns
from nibble.data.read import open_source
from nibble.errors import NibbleError

FIRST_ROWS = 5
MOST_COLUMNS = 50
MOST_CHARACTERS = 300
"""Of the raw rows: how many are told, and how much of each."""


def told(report: Report) -> dict[str, Any]:
    """A report as plain data."""
    return {
        "kind": report.kind,
        "unit": report.unit,
        "detection": asdict(report.detection) if report.detection else None,
        "rows": report.rows,
        "usable": report.usable,
        "characters": report.characters,
        "tokens": report.tokens,
        "trained_tokens": report.trained_tokens,
        "truncated": report.truncated,
        "truncated_share": report.truncated / report.usable if report.usable else 0.0,
        "complete": report.complete,
        "problems": [
            {
                "kind": problem.kind, "sentence": problem.sentence(report.unit), "fatal": problem.fatal,
                "rows": problem.rows, "count": problem.count,
            }
            for problem in report.problems
        ],
        "sentences": report.sentences(),
    }  # fmt: skip


def first_rows(path: Path) -> list[dict[str, str]]:
    """The first rows as they stand in the file, also where no form fits them; none where it cannot be read."""
    try:
        records = list(islice(open_source(path).records(), FIRST_ROWS))
    except NibbleError:
        return []
    rows = [as_columns(record.value) for record in records if record.fault is None]
    return [{_short(str(key)): _short(value) for key, value in list(row.items())[:MOST_COLUMNS]} for row in rows]


def columns_of(rows: list[dict[str, str]]) -> list[str]:
    """Every column of these rows, in order."""
    return list(dict.fromkeys(column for row in rows for column in row))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "…"
