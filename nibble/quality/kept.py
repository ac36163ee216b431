"""What was measured, kept: in home/reports/NAME.json, and in the nibble.json of a packed folder.

Promises that a reader finds a whole report or none, every field of its type, and that figures of other formats stay.
Imports no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nibble.errors import ModelError
from nibble.library import NAME, find, report_file
from nibble.publish import MANIFEST, alone, read_manifest

NUMBERS = (
    "perplexity", "kl_mean", "kl_p95", "top1", "size_bytes", "load_s", "peak_bytes", "steady_bytes", "tokens_per_s",
    "bits_per_weight",
)  # fmt: skip
"""What a row may say in numbers; each may be missing or null."""

MOST_ROWS = 200
"""Rows of a report, and layers of a row: a file that holds more is none of ours."""


def kept(name: str, home: Path, *, brought: bool = True) -> dict[str, Any] | None:
    """The report of a model, as `measure` returns it; None where none is kept or it cannot be read.

    Args:
        name: as the library knows it.
        home: Nibble's home folder.
        brought: whether what the model's own folder says will do, which may have come from anywhere.
    """
    report = _read(_file(name, home))
    if report is None and brought:
        with contextlib.suppress(ModelError):
            report = checked(read_manifest(find(name, home)).get("quality"))
    return report


def checked(value: object) -> dict[str, Any] | None:
    """A report whose fields have the types and ranges that `measure` gives them; None where any has not."""
    if not isinstance(value, dict):
        return None
    text, rows, reference = value.get("text"), value.get("formats"), value.get("reference")
    whole = (
        isinstance(text, dict)
        and _is_text(text.get("name"))
        and _is_number(text.get("tokens"))
        and _is_text(value.get("device"))
        and _is_number(value.get("measured"))
        and _is_text(value.get("model", ""))
        and isinstance(rows, list)
        and len(rows) <= MOST_ROWS
        and all(map(_is_row, rows))
        and (reference is None or _is_row(reference))
    )
    return value if whole else None


def _is_row(row: object) -> bool:
    if not isinstance(row, dict) or not all(_is_text(row.get(key)) for key in ("format", "name")):
        return False
    overrides, layers = row.get("overrides") or {}, row.get("layers") or []
    return (
        all(row.get(key) is None or _is_number(row[key]) for key in NUMBERS)
        and isinstance(overrides, dict)
        and all(_is_text(part) for rule in overrides.items() for part in rule)
        and isinstance(layers, list)
        and len(layers) <= MOST_ROWS
        and all(
            isinstance(layer, dict) and _is_text(layer.get("name")) and _is_number(layer.get("error"))
            for layer in layers
        )
    )


def _is_text(value: object) -> bool:
    """Whether it is a short text that a page can be sent: JSON may hold halves of characters, which UTF-8 cannot."""
    return (
        isinstance(value, str) and len(value) <= 1_000 and not any("\ud800" <= letter <= "\udfff" for letter in value)
    )


def _is_number(value: object) -> bool:
    """Whether it is a finite number that is not negative: NaN and infinity are in no range."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e300


def keep(name: str, home: Path, report: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Keep a report; formats measured earlier on the same text against the same reference stay beside the new ones.

    Args:
        name: of the model.
        home: Nibble's home folder.
        report: as `measure` returns it.
        folder: the model's, where it is packed and the report belongs into its nibble.json too.

    Returns:
        What is kept now.

    Raises:
        ModelError: the name cannot be one.
        OSError: writing failed; what was kept before is untouched.
    """
    file = _file(name, home)
    file.parent.mkdir(parents=True, exist_ok=True)
    with (file.parent / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        merged = merge(_read(file), report)
        _write(file, merged)
    # A folder that is being saved anew will hold another model: these figures are not its own.
    with contextlib.suppress(ModelError):
        if folder and read_manifest(folder):
            with alone(folder):
                _write(folder / MANIFEST, read_manifest(folder) | {"quality": dict(report)})
    return merged


def merge(earlier: Mapping[str, Any] | None, report: Mapping[str, Any]) -> dict[str, Any]:
    """The newer report, with the formats of the earlier one that it lacks; alone where they cannot be compared."""
    if not earlier or _conditions(earlier) != _conditions(report):
        return dict(report)
    fresh = {_key(row) for row in report["formats"]}
    rows = [row for row in earlier["formats"] if _key(row) not in fresh]
    return {**report, "formats": [*rows, *report["formats"]]}


def _conditions(report: Mapping[str, Any]) -> tuple[Any, ...]:
    reference = report.get("reference") or {}
    text = report.get("text") or {}
    return (
        text.get("sha256"),
        text.get("tokens"),
        report.get("device"),
        reference.get("name"),
        reference.get("format"),
    )


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (row.get("name"), row.get("format"), tuple(sorted((row.get("overrides") or {}).items())))


def _file(name: str, home: Path) -> Path:
    if not NAME.fullmatch(name):
        raise ModelError(f"{name!r} cannot be a model's name.", "Use letters, digits, dots, dashes and underscores.")
    return report_file(name, home)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return checked(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def _write(file: Path, value: Mapping[str, Any]) -> None:
    """Put a JSON file in place whole, synced. One writer at a time: the unfinished file always has the same name."""
    fresh = file.with_name(f".{file.name}.tmp")
    with fresh.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False, allow_nan=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(file)
