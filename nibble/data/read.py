"""The rows of a data file: JSON, JSON Lines, CSV or Parquet, one at a time.

Promises flat memory for a file of any length, row numbers that a person can find again, and a sentence for whatever is
not such a file. Knows nothing of what the rows mean.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from nibble import publish
from nibble.data.json_stream import read_json
from nibble.data.rows import Fault, Record
from nibble.data.text import CHUNK, check_plain, check_signature, read_lines, read_text
from nibble.errors import DataError, ModelError

SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"
}  # fmt: skip
"""Ending of a file's name -> what it says the file is; between json and jsonl the content decides."""

DATASET = "dataset"
"""`kind` in the manifest of a folder that holds one data set of a hub; its `parts` are the files, in order."""


@dataclass(frozen=True)
class Source:
    """A data set that can be read, and as what: a file, or several that are one after another."""

    path: Path
    kind: str
    """json, jsonl, csv or parquet."""
    parts: tuple[Source, ...] = ()
    """The files of a hub's data set; empty for a file."""

    @property
    def unit(self) -> str:
        """What a record's number counts."""
        return "line" if self.kind == "jsonl" and len(self.parts) < 2 else "row"

    def records(self) -> Iterator[Record]:
        """Every row in order, read anew at each call; numbers go on from one file to the next.

        Raises:
            DataError: from where the file cannot be read on.
        """
        if not self.parts:
            yield from READERS[self.kind](self.path)
        last = 0
        for part in self.parts:
            before = last
            for record in part.records():
                last = before + record.number
                yield record if not before else replace(record, number=last)


def open_source(path: Path) -> Source:
    """Judge a file by its kind on disk, its name and its first characters.

    Args:
        path: a file, or the folder of a hub's data set as `nibble.hub` put it in place.

    Raises:
        DataError: what it is instead of a data file.
    """
    parts = _parts(path)
    if parts:
        return Source(path, parts[0].kind, parts)
    check_plain(path, tuple(SUFFIXES))
    kind = SUFFIXES.get(path.suffix.lower())
    check_signature(path, b"PAR1" if kind == "parquet" else b"")
    if kind is None:
        ending = f"ends in {path.suffix!r}" if path.suffix else "has no ending"
        raise DataError(f"{path.name} {ending}; data files end in {', '.join(SUFFIXES)}.", "Convert or rename it.")
    if kind in ("json", "jsonl"):
        kind = _json_or_lines(path, kind)
    return Source(path, kind)


def _parts(path: Path) -> tuple[Source, ...]:
    """The files of a hub's data set; none where the path is no such folder.

    Raises:
        DataError: a file of it is gone or broken.
    """
    try:
        facts = publish.read_manifest(path) if path.is_dir() else {}
    except (ModelError, OSError):
        return ()
    listed = facts.get("parts")
    if facts.get("kind") != DATASET or not isinstance(listed, list):
        return ()
    if not listed or not all(isinstance(name, str) and name in facts["files"] for name in listed):
        raise DataError(f"The data set in {path} is broken.", "Download it again.")
    return tuple(open_source(path / name) for name in listed)


def _json_or_lines(path: Path, named: str) -> str:
    """Whether one JSON value stands in the file or one on each line: people name both kinds .json."""
    head = next(read_text(path))
    lines = [line for line in head.split("\n") if line.strip()]
    if not lines:
        return named
    try:
        first = json.loads(lines[0])
    except (ValueError, RecursionError):
        first = None
    if isinstance(first, dict | list) and len(lines) > 1 and lines[1].lstrip().startswith(("{", "[")):
        return "jsonl"
    return "json" if lines[0].lstrip().startswith("[") else named


def _read_jsonl(path: Path) -> Iterator[Record]:
    last: tuple[int, str] | None = None
    for number, line in read_lines(path):
        if last is not None:
            yield _parse_line(*last, final=False)
        last = (number, line) if line.strip() else None
    if last is not None:
        yield _parse_line(*last, final=True)


def _parse_line(number: int, line: str, final: bool) -> Record:
    try:
        return Record(number, json.loads(line))
    except json.JSONDecodeError as error:
        ends = error.pos >= len(line) - 1 and not error.msg.startswith("Extra data")
        cut = final and (ends or error.msg.startswith("Unterminated"))
        if cut:
            fault = Fault("malformed", "is cut short: the file ends in the middle of it", "Get the whole file again.")
        else:
            fault = Fault(
                "malformed",
                f"is not valid JSON: {error.msg} at character {error.pos + 1}",
                "Write one JSON object a line, with double quotes and no comma at its end.",
            )
    except RecursionError:
        fault = Fault("malformed", "is nested too deeply", "A row holds text or a list of messages.")
    except ValueError:
        fault = Fault("malformed", "holds a number that is too long", "A row holds text or a list of messages.")
    return Record(number, None, fault)


def _read_csv(path: Path) -> Iterator[Record]:
    lines = iter(read_lines(path))
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return
    start, header = first
    delimiter = max(",\t;", key=header.count)
    texts = (line + "\n" for line in _chain(header, lines))
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    number = 0
    try:
        names = _header(path, next(reader))
        for values in reader:
            if not values:
                continue
            number += 1
            if len(values) == len(names):
                yield Record(number, dict(zip(names, values, strict=True)))
                continue
            what = f"(line {start + reader.line_num - 1}) has {len(values)} fields, the header {len(names)}"
            yield Record(number, None, Fault("malformed", what, "Put fields that hold a comma into double quotes."))
    except csv.Error as error:
        # An unclosed quote swallows the lines after it, up to csv's own limit of 131,072 characters a field.
        raise DataError(
            f"Row {number + 1} of {path.name}, up to line {start + reader.line_num - 1}, is not valid CSV: {error}.",
            "Check its double quotes; keep texts of more than 131,072 characters in JSON Lines.",
        ) from None


def _chain(first: str, lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    yield first
    for _, line in lines:
        yield line


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() or f"column {place}" for place, cell in enumerate(cells, 1)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"The header of {path.name} has two columns {twice!r}.", "Rename one of them.")
    return names


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path.name} is a Parquet file, and pyarrow is not installed.", "Run: pip install pyarrow"
        ) from None
    number = 0
    try:
        # Its defaults read a whole row group at once: 320 MB for a file of 183 MB, against 137 MB so.
        with pyarrow.parquet.ParquetFile(path, buffer_size=CHUNK, pre_buffer=False) as table:
            for batch in table.iter_batches(batch_size=256, use_threads=False):
                for value in batch.to_pylist():
                    number += 1
                    yield Record(number, value)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataError(
            f"{path.name} cannot be read after row {number}: {reason}.", "Write or download it again."
        ) from None


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    "json": read_json, "jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet
}  # fmt: skip
