"""A data set checked before anything is trained on it, and its rows handed out.

Promises one pass in flat memory, every problem named with its rows, and a report instead of an exception for whatever
is wrong with the data. Knows nothing of tokenizers: it is given a function that makes a row's tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from nibble.data.forms import Detection, detect
from nibble.data.mapping import map_row
from nibble.data.read import Source, open_source
from nibble.data.repeats import Seen
from nibble.data.rows import ColumnMap, Fault, Row, RowFault, Sample
from nibble.errors import DataError, NibbleError

SHOWN = 5
"""Rows that a problem names."""

FIRST_ROWS = 50
"""Rows by which the form is told."""

NOTES = {
    "characters": ("held characters that no tokenizer takes (NUL, half of a pair); they were left out", ""),
    "unanswered": ("ends with a question that has no answer; that question is left out", ""),
}
"""Note of a row -> what was changed, and a hint."""


@dataclass
class Problem:
    """One kind of thing that is wrong, and where."""

    kind: str
    message: str
    """A sentence on the first row that has it, or on the file."""
    hint: str
    fatal: bool
    rows: list[int] = field(default_factory=list)
    """The first `SHOWN` rows; empty where it is of the whole file."""
    count: int = 0

    def sentence(self, unit: str = "row") -> str:
        """The message, how many rows more, and the hint."""
        more = self.count - 1
        others = ", ".join(map(str, self.rows[1:]))
        also = f" The same in {more:,} more: {unit} {others}{', ...' if more > SHOWN - 1 else ''}." if more > 0 else ""
        return f"{self.message}{also} {self.hint}".strip()


@dataclass
class Report:
    """What was found in a file."""

    path: Path
    kind: str = ""
    """json, jsonl, csv or parquet; empty where it could not be read."""
    unit: str = "row"
    """What row numbers count: "line" or "row"."""
    detection: Detection | None = None
    rows: int = 0
    """Rows read."""
    usable: int = 0
    """Rows that can be trained on."""
    characters: int = 0
    """Of the usable rows."""
    tokens: int | None = None
    """Of the usable rows; None without a tokenizer."""
    trained_tokens: int | None = None
    truncated: int = 0
    """Usable rows that are longer than the tokenizer's limit."""
    complete: bool = True
    """Whether the whole file was read."""
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the file can be trained on."""
        return not any(problem.fatal for problem in self.problems)

    def require(self) -> None:
        """Raise DataError with the first fatal problem, if there is one."""
        for problem in self.problems:
            if problem.fatal:
                raise DataError(problem.sentence(self.unit).removesuffix(problem.hint).strip(), problem.hint)

    def sentences(self) -> list[str]:
        """The report in plain words: what it is, how much, then each problem, the fatal ones first."""
        lines = [self.detection.why] if self.detection else []
        if self.rows:
            part = "" if self.complete else "the first "
            lines.append(
                f"{self.path.name}: {part}{_many(self.rows, 'row')}, {self.usable:,} to train on, "
                f"{_many(self.characters, 'character')}."
            )
        if self.tokens is not None and self.usable:
            share = self.truncated / self.usable
            lines.append(
                f"{_many(self.tokens, 'token')}, {self.trained_tokens:,} trained; "
                f"{_many(self.truncated, 'row')} ({share:.1%}) truncated."
            )
        ordered = sorted(self.problems, key=lambda problem: not problem.fatal)
        return lines + [
            f"{'Refused' if problem.fatal else 'Note'}: {problem.sentence(self.unit)}" for problem in ordered
        ]


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


Encode = Callable[[Row], Sample]
"""Makes a row's tokens; `nibble.data.render.Encoder.encode`."""


def rows(path: Path, mapping: ColumnMap | None = None) -> Iterator[Row]:
    """The rows of a file that can be trained on, in order, in flat memory. Blank ones are left out.

    Raises:
        DataError: at the first faulty row, unless the map leaves such rows out; at what `check` calls fatal of a file.
    """
    source = open_source(path)
    detection = _detect(source, mapping)
    for number, item in _mapped(source, detection):
        if isinstance(item, Row):
            yield item
        elif item is not None and not (mapping and mapping.leave_out):
            raise DataError(f"{source.unit.capitalize()} {number} of {path.name} {item.what}.", item.hint)


def check(
    path: Path,
    mapping: ColumnMap | None = None,
    limit: int | None = None,
    *,
    encode: Encode | None = None,
    seconds: float | None = None,
) -> Report:
    """Read a data set through and tell what it is and what is wrong with it.

    Args:
        path: json, jsonl, csv or parquet.
        mapping: what the person says of its columns.
        limit: rows to read at most; None reads all.
        encode: makes a row's tokens, to count them, those trained, and the rows that are too long.
        seconds: time to read for at most, though one row is read whatever it takes; None reads all.
    """
    report = Report(path)
    try:
        source = open_source(path)
        report.kind, report.unit = source.kind, source.unit
        report.detection = _detect(source, mapping)
        _read_through(
            source, report, _Tally(report, bool(mapping and mapping.leave_out)), encode, _until(limit, seconds)
        )
    except DataError as error:
        report.problems.append(Problem("file", error.message, error.hint, fatal=True))
    return report


def _until(limit: int | None, seconds: float | None) -> Callable[[int], bool]:
    """Whether enough has been read after so many rows."""
    end = None if seconds is None else time.monotonic() + seconds
    return lambda rows: (
        (limit is not None and rows >= limit) or (end is not None and rows > 0 and time.monotonic() >= end)
    )


def _detect(source: Source, mapping: ColumnMap | None) -> Detection:
    first = list(islice(source.records(), FIRST_ROWS))
    if not first:
        raise DataError(f"{source.path.name} is empty: it has no rows.", "Choose a file that holds rows.")
    fault = first[0].fault
    if fault is not None and all(record.fault for record in first):
        raise DataError(f"{source.unit.capitalize()} {first[0].number} of {source.path.name} {fault.what}.", fault.hint)
    return detect(first, mapping)


def _mapped(source: Source, detection: Detection) -> Iterator[tuple[int, Row | Fault | None]]:
    """Each row's number with the row, what is wrong with it, or None where it is blank."""
    for record in source.records():
        try:
            yield record.number, map_row(record, detection)
        except RowFault as error:
            yield record.number, error.fault


class _Tally:
    """Gathers problems by kind, so that a million faulty rows take the room of one."""

    def __init__(self, report: Report, leave_out: bool) -> None:
        self.report, self.leave_out = report, leave_out
        self.known: dict[str, Problem] = {}

    def note(self, kind: str, number: int, message: str, hint: str, *, fatal: bool = False) -> None:
        """Count a row under a kind; the first one's message is kept."""
        problem = self.known.get(kind)
        if problem is None:
            problem = self.known[kind] = Problem(kind, message, hint, fatal)
            self.report.problems.append(problem)
        problem.count += 1
        if len(problem.rows) < SHOWN:
            problem.rows.append(number)

    def fault(self, number: int, fault: Fault) -> None:
        """Count a faulty row; fatal unless such rows are left out."""
        where = f"{self.report.unit.capitalize()} {number} of {self.report.path.name}"
        left = " It is left out." if self.leave_out else ""
        self.note(fault.kind, number, f"{where} {fault.what}.{left}", fault.hint, fatal=not self.leave_out)


def _read_through(
    source: Source, report: Report, tally: _Tally, encode: Encode | None, enough: Callable[[int], bool]
) -> None:
    assert report.detection is not None
    seen, unit = Seen(), source.unit.capitalize()
    if encode is not None:
        report.tokens = report.trained_tokens = 0
    for number, item in _mapped(source, report.detection):
        if enough(report.rows):
            report.complete = False
            break
        report.rows += 1
        if isinstance(item, Fault):
            tally.fault(number, item)
        elif item is None:
            tally.note("blank", number, f"{unit} {number} is blank.", "Blank rows are left out.")
        else:
            for note in item.notes:
                tally.note(note, number, f"{unit} {number} {NOTES[note][0]}.", NOTES[note][1])
            earlier = seen.earlier(item)
            if earlier:
                message = f"{unit} {number} is the same as {source.unit} {earlier}."
                tally.note("duplicate", number, message, "Repeated rows are trained on more than once.")
            if encode is None or _count_tokens(item, report, tally, encode):
                report.usable += 1
                report.characters += len(item.text) + sum(len(turn["content"]) for turn in item.messages)
    _judge(report, seen)


def _count_tokens(row: Row, report: Report, tally: _Tally, encode: Encode) -> bool:
    """Add a row's tokens to the report; False where there is nothing in it to train on."""
    assert report.tokens is not None and report.trained_tokens is not None
    unit = report.unit.capitalize()
    try:
        sample = encode(row)
    except NibbleError as error:
        tally.fault(row.number, Fault("template", f"cannot be rendered: {error.message.rstrip('.')}", error.hint))
        return False
    if not any(sample.trained):
        why = "its answer begins beyond the longest sample" if sample.truncated else "it is too short"
        message = f"{unit} {row.number} has no token to train on: {why}."
        tally.note("untrained", row.number, message, "Such rows are left out; allow longer samples, or split the row.")
        return False
    report.tokens += len(sample.ids)
    report.trained_tokens += sum(sample.trained)
    if sample.truncated:
        report.truncated += 1
        message = f"{unit} {row.number} is too long: only its first {len(sample.ids):,} tokens are trained on."
        tally.note("long", row.number, message, "Allow longer samples, or split the row.")
    return True


def _judge(report: Report, seen: Seen) -> None:
    """What only the whole file can tell."""
    name = report.path.name
    if report.ok and not report.usable:
        first = report.problems[0] if report.problems else None
        reason = f" {first.message}" if first else ""
        hint = first.hint if first else "Choose a file that holds rows."
        report.problems.append(Problem("nothing", f"{name} has no row to train on.{reason}", hint, fatal=True))
    elif report.ok and report.truncated == report.usable:
        first = next(problem for problem in report.problems if problem.kind == "long")
        message = f"Every row of {name} is too long. {first.message}"
        report.problems.append(Problem("all long", message, first.hint, fatal=True))
    if seen.full:
        message = f"Repeated rows were looked for among the first {seen.count:,} only."
        report.problems.append(Problem("many", message, "", fatal=False))
