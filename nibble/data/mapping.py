"""Each row of a data set as text or as a conversation, or what keeps it from being one.

Promises that a conversation handed on is one that every chat template takes: at most one system prompt, then user and
assistant in turns, up to an answer. Knows nothing of files, tokenizers or templates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nibble.data.forms import FORMS, KEYS, Detection, as_columns, list_in, needed_columns
from nibble.data.rows import BAD_CHARACTERS, ColumnMap, Record, Row, RowFault
from nibble.engines.base import Message

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
}  # fmt: skip
"""A speaker's name in the file -> its role."""

TOOLS = ("tool", "function", "function_call", "observation", "ipython", "tool_call", "tool_response")

TYPES = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def map_row(record: Record, detection: Detection) -> Row | None:
    """A record as text or as a conversation; None where it is blank.

    Raises:
        RowFault: why it is neither.
    """
    if record.fault is not None:
        raise RowFault(record.fault.kind, record.fault.what, record.fault.hint)
    row = as_columns(record.value)
    if not row:
        kind = "null" if record.value is None else TYPES.get(type(record.value), type(record.value).__name__)
        raise RowFault("type", f"is {kind} without columns", 'A row is an object such as {"text": "..."}.')
    form = FORMS[detection.form]
    for name in form.needs:
        if detection.columns[name] not in row:
            raise _missing(row, detection, detection.columns[name])
    mapped = MAPPERS[detection.form](row, detection)
    if isinstance(mapped, str):
        text = BAD_CHARACTERS.sub("", mapped)
        notes = ("characters",) if text != mapped else ()
        return Row(record.number, text=text, notes=notes) if text.strip() else None
    return _checked(record.number, mapped)


def _missing(row: Mapping[str, Any], detection: Detection, column: str) -> RowFault:
    for form in () if detection.given else FORMS.values():
        if form.name != detection.form and needed_columns(form, row, ColumnMap()):
            return RowFault(
                "mixed", f"is in the form {form.name}, the others in {detection.form}", "Save one form a file."
            )
    names = ", ".join(repr(name) for name in row)
    return RowFault("missing", f"has no column {column!r} (it has {names})", "Add it, or map another column.")


def _text(row: Mapping[str, Any], column: str) -> str:
    """A column's text, refused where it is of another type."""
    value = row[column]
    if not isinstance(value, str):
        kind = "nothing (null)" if value is None else TYPES.get(type(value), type(value).__name__)
        raise RowFault("type", f"has {kind} in column {column!r}, where text must stand", "Write it as text.")
    return value


def _optional(row: Mapping[str, Any], detection: Detection, field: str) -> str:
    column = detection.columns.get(field)
    return "" if column is None or row.get(column) is None else _text(row, column)


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}  # type: ignore[typeddict-item]


def _with_system(row: Mapping[str, Any], detection: Detection, turns: list[Message]) -> list[Message]:
    system = _optional(row, detection, "system")
    return [_turn("system", system), *turns] if system.strip() else turns


def _from_text(row: Mapping[str, Any], detection: Detection) -> str:
    return _text(row, detection.columns["text"])


def _from_pair(row: Mapping[str, Any], detection: Detection) -> list[Message]:
    asked, told = FORMS[detection.form].needs
    parts = row[detection.columns[asked]], row[detection.columns[told]]
    if all(isinstance(part, list) and part for part in parts):
        return [_message(each, place, "messages") for place, each in enumerate(parts[0] + parts[1], 1)]
    question = _text(row, detection.columns[asked])
    more = _optional(row, detection, "input")
    if more.strip():
        question = f"{question}\n\n{more}"
    turns = [*_history(row, detection), _turn("user", question)]
    turns.append(_turn("assistant", _text(row, detection.columns[told])))
    return _with_system(row, detection, turns)


def _history(row: Mapping[str, Any], detection: Detection) -> list[Message]:
    """Alpaca's `history`: a list of [question, answer] pairs."""
    column = detection.columns.get("history", "")
    value = row.get(column)
    if not value:
        return []
    turns: list[Message] = []
    for pair in list_in(value) or [None]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise RowFault("type", f"has no list of [question, answer] pairs in column {column!r}", "Write it so.")
        turns += [_turn("user", pair[0]), _turn("assistant", pair[1])]
    return turns


def _from_messages(row: Mapping[str, Any], detection: Detection) -> list[Message]:
    column = detection.columns[FORMS[detection.form].needs[0]]
    messages = list_in(row[column])
    if messages is None:
        kind = "nothing (null)" if row[column] is None else TYPES.get(type(row[column]), "something else")
        raise RowFault("type", f"has {kind} in column {column!r}, where a list of messages must stand", "Write a list.")
    if not messages:
        raise RowFault("empty", f"has no messages in column {column!r}", "Leave the row out.")
    turns = [_message(each, place, detection.form) for place, each in enumerate(messages, 1)]
    return turns if turns[0]["role"] == "system" else _with_system(row, detection, turns)


def _message(message: Any, place: int, form: str) -> Message:
    speaker, text = KEYS[form]
    if not isinstance(message, dict):
        raise RowFault("type", f"has a message {place} that is no object", f"Write {speaker} and {text} in each.")
    if speaker not in message:
        other = next((name for name, keys in KEYS.items() if keys[0] in message), None)
        if other:
            what = f"is in the form {other} (message {place}), the others in {form}"
            raise RowFault("mixed", what, "Save one form a file.")
        raise RowFault("missing", f"has a message {place} without {speaker!r}", "Write who speaks in each message.")
    name, content = message[speaker], message.get(text)
    called = name.strip().lower() if isinstance(name, str) else ""
    if called in TOOLS or message.get("tool_calls") or message.get("function_call"):
        raise RowFault("tools", f"calls a tool in message {place}", "Tool calls are not trained: leave such rows out.")
    role = ROLES.get(called)
    if role is None:
        raise RowFault("roles", f"has the unknown role {name!r} in message {place}", f"Roles: {', '.join(ROLES)}.")
    return _turn(role, _content(content, text, place))


def _content(content: Any, key: str, place: int) -> str:
    """A message's text: a string, or OpenAI's list of typed parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        kind = "nothing (null)" if content is None else TYPES.get(type(content), "something else")
        raise RowFault("type", f"has {kind} as {key!r} of message {place}, where text must stand", "Write it as text.")
    pieces = []
    for part in content:
        sort = part.get("type", "text") if isinstance(part, dict) else None
        if sort != "text" or not isinstance(part.get("text"), str):
            raise RowFault(
                "parts", f"has a part of type {sort!r} in message {place}", "Only parts of type 'text' are trained."
            )
        pieces.append(part["text"])
    return "".join(pieces)


def _checked(number: int, turns: list[Message]) -> Row:
    """A conversation in the order that every template takes, ending with an answer."""
    notes, cleaned = [], turns
    if any(BAD_CHARACTERS.search(turn["content"]) for turn in turns):
        notes.append("characters")
        cleaned = [_turn(turn["role"], BAD_CHARACTERS.sub("", turn["content"])) for turn in turns]
    if cleaned[0]["role"] == "system" and not cleaned[0]["content"].strip():
        cleaned = cleaned[1:]
    if not any(turn["role"] == "assistant" for turn in cleaned):
        raise RowFault("no_answer", "has no assistant turn: nothing to train on", "Add the answer, or leave it out.")
    offset = 1 if cleaned[0]["role"] == "system" else 0
    for place, turn in enumerate(cleaned[offset:]):
        wanted = ("user", "assistant")[place % 2]
        if turn["role"] != wanted:
            raise RowFault(
                "roles",
                f"has a turn of {turn['role']} as message {place + offset + 1}, where {wanted} must speak",
                "After at most one system prompt, user and assistant take turns, the user first.",
            )
        if not turn["content"].strip():
            column = "question" if wanted == "user" else "answer"
            raise RowFault("empty", f"has an empty {column} (message {place + offset + 1})", "Leave the row out.")
    if cleaned[-1]["role"] == "user":
        cleaned = cleaned[:-1]
        notes.append("unanswered")
    return Row(number, messages=tuple(cleaned), notes=tuple(notes))


MAPPERS: dict[str, Callable[[Mapping[str, Any], Detection], str | list[Message]]] = {
    "text": _from_text, "alpaca": _from_pair, "prompt": _from_pair, "messages": _from_messages,
    "sharegpt": _from_messages,
}  # fmt: skip
