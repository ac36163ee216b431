"""What was measured, kept: in home/reports/NAME.json, and in the nibble.json of a packed folder.

Promises that a reader finds a whole report or none, and that figures of other formats stay. Imports no torch.
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
from nibble.library import NAME, find
from nibble.publish import MANIFEST, alone, read_manifest


def kept(name: str, home: Path) -> dict[str, Any] | None:
    """The report of a model, as `measure` returns it; None where none is kept or it cannot be read.

    Args:
        name: as the library knows it.
        home: Nibble's home folder.
    """
    report = _read(_file(name, home))
    if report is None:
        with contextlib.suppress(ModelError):
            quality = read_manifest(find(name, home)).get("quality")
            report = quality if isinstance(quality, dict) and "formats" in quality else None
    return report


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
    return home / "reports" / f"{name}.json"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("formats"), list) else None


def _write(file: Path, value: Mapping[str, Any]) -> None:
    """Put a JSON file in place whole, synced. One writer at a time: the unfinished file always has the same name."""
    fresh = file.with_name(f".{file.name}.tmp")
    with fresh.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False, allow_nan=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(file)
