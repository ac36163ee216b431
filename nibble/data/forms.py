"""Which form a data set is in, told by its first rows.

Promises to say which form and why, to refuse preference data by name, and that what the person says of the columns
overrides what was detected. Knows nothing of files, and maps no row.

The forms are those of Stanford Alpaca, ShareGPT, the OpenAI chat format (`messages`) and TRL (`prompt`/`completion`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nibble.data.rows import BAD_CHARACTERS, ColumnMap, Record
from nibble.errors import DataError


@dataclass(frozen=True)
class Form:
    """A form, its fields, and the columns in which they are looked for when the person names none."""

    name: str
    needs: tuple[str, ...]
    """Fields that every row must have."""
    may: tuple[str, ...]
    """Fields that a row may have."""
    columns: tuple[tuple[str, ...], ...]
    """Columns that hold the needed fields, in the order of `needs`, tried one after another."""
    prose: str
    """What is trained."""


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("messages", ("messages",), ("system",), (), "conversations; the assistant's answers are trained"),
        Form("sharegpt", ("conversations",), ("system",), (), "conversations; the assistant's answers are trained"),
        Form(
            "alpaca", ("instruction", "output"), ("input", "system", "history"),
            (("instruction", "output"), ("instruction", "response")),
            "an instruction with its output; the output is trained",
        ),
        Form(
            "prompt", ("prompt", "completion"), ("system",),
            (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"),
             ("prompt", "answer"), ("question", "response"), ("input", "output")),
            "a prompt with its completion; the completion is trained",
        ),
        Form(
            "text", ("text",), (),
            (("text",), ("quote",), ("content",), ("story",), ("sentence",), ("passage",), ("document",)),
            "running text; all of it is trained",
        ),
    )
}  # fmt: skip
"""By name, in the order in which they are looked for."""

CHAT_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "chat")
"""Columns preferred where several hold lists of messages."""

KEYS = {"messages": ("role", "content"), "sharegpt": ("from", "value")}
"""Form -> the keys of a message's speaker and of its text."""

OPTIONAL_COLUMNS = {"input": ("input", "context"), "system": ("system",), "history": ("history",)}


@dataclass(frozen=True)
class Detection:
    """What a file was recognised as."""

    form: str
    columns: dict[str, str]
    """Field of the form -> column of the file."""
    why: str
    """One sentence."""
    found: tuple[str, ...]
    """All columns of the first rows."""
    given: bool = False
    """Whether the person named the columns."""


def detect(records: Sequence[Record], mapping: ColumnMap | None = None) -> Detection:
    """The form of a file, told by its first rows.

    Args:
        records: the first rows; those that could not be parsed are passed over.
        mapping: what the person says; it overrides the columns' names.

    Raises:
        DataError: no form fits, or the map names a field or column that there is not.
    """
    rows = [as_columns(record.value) for record in records if record.fault is None]
    rows = [row for row in rows if row]
    if not rows:
        raise DataError(
            "None of the first rows has columns.", 'A row is an object such as {"text": "..."}, or a line of text.'
        )
    found = tuple(dict.fromkeys(column for row in rows for column in row))
    for column in found:
        if BAD_CHARACTERS.search(column):
            raise DataError(f"The column {column!r} has a name that is no text.", "Rename the column.")
    mapping = mapping or ColumnMap()
    if mapping.columns:
        _check_map(mapping, found)
    if mapping.form is not None and mapping.form not in FORMS:
        raise DataError(f"There is no form {mapping.form!r}.", f"Forms: {', '.join(FORMS)}.")
    forms = [form for form in FORMS.values() if mapping.form in (None, form.name) and _takes(form, mapping)]
    if not forms:
        fields = ", ".join(FORMS[mapping.form].needs + FORMS[mapping.form].may) if mapping.form else "of one form only"
        raise DataError(f"No form takes the fields {', '.join(mapping.columns)} together.", f"Map fields: {fields}.")
    if not any(set(form.needs) <= mapping.columns.keys() for form in forms):
        refuse_preference(found)
    if len(rows) == 1 and _by_columns(rows[0]):
        raise DataError(
            f"The columns ({', '.join(found)}) hold lists or objects: the file is written by columns, not by rows.",
            'Save it by rows; in pandas: to_json(path, orient="records", lines=True).',
        )
    for row in rows:
        for form in forms:
            columns = needed_columns(form, row, mapping)
            if columns:
                return _detection(form, columns, found, mapping)
    raise _no_form(rows[0], found, mapping)


def _check_map(mapping: ColumnMap, found: tuple[str, ...]) -> None:
    fields = {name for form in FORMS.values() for name in (*form.needs, *form.may)}
    for name, column in mapping.columns.items():
        if name not in fields:
            raise DataError(f"There is no field {name!r} to map a column to.", f"Fields: {', '.join(sorted(fields))}.")
        if column not in found:
            raise DataError(f"There is no column {column!r}.", f"Columns of the first rows: {', '.join(found)}.")


def _takes(form: Form, mapping: ColumnMap) -> bool:
    return mapping.columns.keys() <= {*form.needs, *form.may}


def _by_columns(row: Mapping[str, Any]) -> bool:
    """Whether a file's only row holds whole columns, as pandas writes them by default."""
    chat = any(_chat_column(form, row) for form in KEYS)  # then its lists are messages
    return not chat and all(isinstance(value, list | dict) and value for value in row.values())


def refuse_preference(columns: Sequence[str]) -> None:
    """Refuse data that compares answers rather than giving one.

    Raises:
        DataError: naming its columns.
    """
    names = [column.lower() for column in columns]
    chosen = next((column for column in names if "chosen" in column), None)
    rejected = next((column for column in names if "reject" in column), None)
    if chosen and rejected:
        raise DataError(
            f"This is preference data (columns {chosen} and {rejected}), for DPO and its like: it compares answers.",
            f"To train on the better answers alone, map the columns, for example prompt=..., completion={chosen}.",
        )
    if {"prompt", "completion", "label"} <= set(names):
        raise DataError(
            "This is preference data (columns prompt, completion and label), for KTO: it judges answers.",
            "Keep the rows with good answers, then map the columns: prompt=prompt, completion=completion.",
        )


def needed_columns(form: Form, row: Mapping[str, Any], mapping: ColumnMap) -> dict[str, str]:
    """The columns that hold a form's needed fields; empty where the row has none such."""
    given = mapping.columns
    if set(form.needs) <= given.keys():
        return {name: given[name] for name in form.needs}
    if form.name in KEYS:
        # TRL's prompt and completion may each be a list of messages: the form `prompt` joins them.
        column = "" if {"prompt", "completion"} <= row.keys() else _chat_column(form.name, row)
        return {form.needs[0]: column} if column else {}
    for columns in form.columns:
        candidate = dict(zip(form.needs, columns, strict=True)) | {
            name: column for name, column in given.items() if name in form.needs
        }
        if all(column in row for column in candidate.values()):
            return candidate
    texts = [column for column, value in row.items() if isinstance(value, str) and column not in CHAT_COLUMNS]
    if form.name == "text" and len(texts) == 1:
        return {"text": texts[0]}
    return {}


def _chat_column(form: str, row: Mapping[str, Any]) -> str:
    """The column that holds a list of messages with this form's keys."""
    speaker, text = KEYS[form]
    fits = []
    for column, value in row.items():
        messages = list_in(value)
        first = messages[0] if messages else None
        if isinstance(first, dict) and speaker in first and (text in first or speaker in ("role", "from")):
            fits.append(column)
    return next((name for name in CHAT_COLUMNS if name in fits), fits[0] if fits else "")


def list_in(value: Any) -> list[Any] | None:
    """The list that a column holds, also when it stands there as JSON text, as in CSV."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) else None


def _detection(form: Form, needed: dict[str, str], found: tuple[str, ...], mapping: ColumnMap) -> Detection:
    columns = dict(needed)
    for name in form.may:
        column = mapping.columns.get(name) or next((each for each in OPTIONAL_COLUMNS[name] if each in found), None)
        if column and column not in columns.values():
            columns[name] = column
    given = bool(mapping.form or mapping.columns)
    named = ("column " if len(columns) == 1 else "columns ") + ", ".join(columns.values())
    why = f"{'As you said' if given else 'Recognised as'} {form.name} ({named}): {form.prose}."
    return Detection(form.name, columns, why, found, given)


def _no_form(row: Mapping[str, Any], found: tuple[str, ...], mapping: ColumnMap) -> DataError:
    names = ", ".join(found)
    if mapping.form:
        return DataError(
            f"The columns of {mapping.form} ({', '.join(FORMS[mapping.form].needs)}) are not there; found: {names}.",
            f"Map them, for example {FORMS[mapping.form].needs[0]}={found[0]}.",
        )
    chat = next((column for column in CHAT_COLUMNS if column in row), None)
    if chat:
        return DataError(
            f"Column {chat!r} of the first row holds no list of messages with role and content, or from and value.",
            "Write each row's messages as a list of such objects.",
        )
    return DataError(
        f"No form fits the columns of the first row ({', '.join(row)}); needed: text, or instruction and output, "
        "or messages, or conversations, or prompt and completion.",
        f"Map a column, for example text={found[0]}.",
    )


def as_columns(value: Any) -> dict[str, Any]:
    """A row as columns: a bare text is a column `text`, a bare list of messages a column `messages`."""
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {"messages": value}
    return {}
