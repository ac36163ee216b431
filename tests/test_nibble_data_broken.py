"""1,000 broken data sets, made from sound ones: each is refused with its row or column named, none with a traceback."""

import gzip
import io
import json
import os
import random
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nibble.data import ColumnMap, check, rows
from nibble.errors import DataError

pytestmark = pytest.mark.full

SEEDS = 15
WORDS = [
    "half",
    "a",
    "byte",
    "is",
    "nibble",
    "and",
    "two",
    "of",
    "them",
    "make",
    "one",
    "whole",
    "半",
    "字节",
    "être",
    "größer",
]


@dataclass
class Broken:
    """A data set that must be refused, and what the refusal must name."""

    suffix: str
    content: bytes
    names: str
    """A regular expression that the first sentence of the refusal holds."""
    mapping: ColumnMap | None = None


def words(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(2, 8)))


def sound_rows(rng: random.Random, form: str) -> list[dict[str, Any]]:
    """Between 5 and 12 good rows of one form."""
    made: list[dict[str, Any]] = []
    for number in range(rng.randint(5, 12)):
        question, answer = f"{number} {words(rng)}", words(rng)
        turns = [("user", question), ("assistant", answer), ("user", words(rng)), ("assistant", words(rng))]
        made.append(
            {
                "text": {"text": question},
                "alpaca": {"instruction": question, "input": words(rng), "output": answer},
                "prompt": {"prompt": question, "completion": answer},
                "messages": {"messages": [{"role": role, "content": text} for role, text in turns]},
                "sharegpt": {
                    "conversations": [
                        {"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in turns
                    ]
                },
            }[form]
        )
    return made


def jsonl(values: list[Any]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def csv(values: list[dict[str, str]]) -> bytes:
    lines = [",".join(values[0])] + [",".join(f'"{text}"' for text in value.values()) for value in values]
    return "\n".join(lines).encode() + b"\n"


def saved(rng: random.Random, values: list[Any]) -> tuple[str, bytes, str]:
    """As JSON Lines or as a JSON list, with the word that its rows are counted by."""
    if rng.random() < 0.5:
        return ".jsonl", jsonl(values), "Line"
    return ".json", json.dumps(values, ensure_ascii=False, indent=rng.choice([None, 1])).encode(), "Row"


def row_breaker(forms: tuple[str, ...], change: Callable[[random.Random, dict[str, Any]], Any], says: str) -> Any:
    """A break of one row: `change` returns the row in its place."""

    def broken(rng: random.Random) -> Broken:
        values: list[Any] = sound_rows(rng, rng.choice(forms))
        place = rng.randrange(1, len(values))
        values[place] = change(rng, values[place])
        suffix, content, unit = saved(rng, values)
        return Broken(suffix, content, rf"{unit} {place + 1} of .*{says}")

    return broken


def line_breaker(change: Callable[[random.Random, bytes], bytes], says: str) -> Any:
    """A break of one line of a JSON Lines file."""

    def broken(rng: random.Random) -> Broken:
        lines = jsonl(sound_rows(rng, rng.choice(ALL))).splitlines()
        place = rng.randrange(len(lines))
        lines[place] = change(rng, lines[place])
        return Broken(".jsonl", b"\n".join(lines) + b"\n", rf"[Ll]ine {place + 1}\b.*{says}")

    return broken


ALL = ("text", "alpaca", "prompt", "messages", "sharegpt")
FLAT = ("text", "alpaca", "prompt")
CHATS = ("messages", "sharegpt")


def column(row: dict[str, Any]) -> str:
    """A column that must hold text."""
    return next(name for name in ("text", "output", "completion") if name in row)


def turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    return next(iter(row.values()))


def key(row: dict[str, Any], kind: str) -> str:
    return {"who": ("role", "from"), "what": ("content", "value")}[kind]["conversations" in row]


def without_column(rng: random.Random, row: dict[str, Any]) -> Any:
    return {"other": words(rng)} | {name: value for name, value in row.items() if name != column(row)}


def with_value(value: Any) -> Callable[[random.Random, dict[str, Any]], Any]:
    return lambda rng, row: row | {column(row): value}


def with_turns(change: Callable[[dict[str, Any], list[dict[str, Any]]], Any]) -> Any:
    return lambda rng, row: {next(iter(row)): change(row, turns(row))}


def turn_with(place: int, kind: str, value: Any) -> Any:
    def change(row: dict[str, Any], said: list[dict[str, Any]]) -> Any:
        return [turn | ({key(row, kind): value} if n == place else {}) for n, turn in enumerate(said)]

    return with_turns(change)


def other_form(rng: random.Random, row: dict[str, Any]) -> Any:
    form = "messages" if "messages" not in row else "alpaca"
    return sound_rows(rng, form)[0]


ROW_BREAKS = {
    "no column": row_breaker(FLAT, without_column, "has no column '(text|output|completion)'"),
    "null": row_breaker(FLAT, with_value(None), "nothing .null. in column '"),
    "number": row_breaker(FLAT, with_value(42), "a number in column '"),
    "list": row_breaker(FLAT, with_value(["a"]), "a list in column '"),
    "object": row_breaker(FLAT, with_value({"a": 1}), "an object in column '"),
    "bool": row_breaker(FLAT, with_value(True), "true or false in column '"),
    "bare number": row_breaker(ALL, lambda rng, row: 7, "is a number without columns"),
    "bare null": row_breaker(ALL, lambda rng, row: None, "is null without columns"),
    "bare list": row_breaker(ALL, lambda rng, row: ["a", "b"], "is a list without columns"),
    "mixed": row_breaker(("text", "prompt", "messages"), other_form, "is in the form"),
    "mixed messages": row_breaker(
        CHATS, with_turns(lambda row, said: [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}]),
        "is in the form (messages|sharegpt)",
    ),
    "empty answer": row_breaker(("alpaca", "prompt"), with_value("  "), "has an empty answer"),
    "unknown role": row_breaker(CHATS, turn_with(2, "who", "wizard"), "unknown role 'wizard' in message 3"),
    "role is a number": row_breaker(CHATS, turn_with(0, "who", 5), "unknown role 5 in message 1"),
    "same role twice": row_breaker(CHATS, with_turns(lambda row, said: [said[0], *said]), "as message 2"),
    "answer first": row_breaker(CHATS, with_turns(lambda row, said: said[1:]), "as message 1"),
    "system in the middle": row_breaker(CHATS, turn_with(2, "who", "system"), "turn of system as message 3"),
    "no answer": row_breaker(CHATS, with_turns(lambda row, said: said[:1]), "no assistant turn"),
    "no messages": row_breaker(CHATS, with_turns(lambda row, said: []), "has no messages in column '"),
    "messages are null": row_breaker(CHATS, with_turns(lambda row, said: None), "nothing .null. in column '"),
    "messages are text": row_breaker(CHATS, with_turns(lambda row, said: "hello"), "text in column '"),
    "message is text": row_breaker(CHATS, with_turns(lambda row, said: ["hello"]), "message 1 that is no object"),
    "message without role": row_breaker(CHATS, with_turns(lambda row, said: [said[0], {"a": "b"}]), "message 2 with"),
    "content is null": row_breaker(CHATS, turn_with(1, "what", None), "nothing .null. as '(content|value)' of message"),
    "content is a number": row_breaker(CHATS, turn_with(3, "what", 3.5), "a number as '(content|value)' of message 4"),
    "content is empty": row_breaker(CHATS, turn_with(1, "what", "\n"), "empty answer .message 2"),
    "question is empty": row_breaker(CHATS, turn_with(2, "what", ""), "empty question .message 3"),
    "image": row_breaker(
        CHATS, turn_with(0, "what", [{"type": "image_url", "image_url": {"url": "x"}}]), "part of type 'image_url'"
    ),
    "tool": row_breaker(CHATS, turn_with(2, "who", "tool"), "calls a tool in message 3"),
    "tool call": row_breaker(
        CHATS, with_turns(lambda row, said: [*said[:1], said[1] | {"tool_calls": [{}]}]), "calls a tool in message 2"
    ),
}  # fmt: skip

LINE_BREAKS = {
    "no end": line_breaker(lambda rng, line: line[:-1], ""),
    "cut": line_breaker(lambda rng, line: line.decode()[: rng.randint(1, len(line.decode()) - 1)].encode(), ""),
    "comma": line_breaker(lambda rng, line: line + b",", "not valid JSON"),
    "single quotes": line_breaker(lambda rng, line: line.replace(b'"', b"'"), "not valid JSON"),
    "prose": line_breaker(lambda rng, line: words(rng).encode(), "not valid JSON"),
    "two a line": line_breaker(lambda rng, line: line + b" " + line, "not valid JSON"),
    "raw tab": line_breaker(lambda rng, line: line.replace(b" ", b"\t\t").replace(b'"', b'"\t', 3), "not valid JSON"),
    "deep": line_breaker(lambda rng, line: b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "long number": line_breaker(lambda rng, line: b'{"text": ' + b"9" * 5000 + b"}", ""),
    "nul": line_breaker(lambda rng, line: line[:9] + b"\0" + line[9:], "NUL"),
    "gbk": line_breaker(lambda rng, line: '{"text": "半个字节就是四个比特，可以写成一位"}'.encode("gbk"), "GBK"),
    "windows": line_breaker(lambda rng, line: '{"text": "ein größeres Stück, être déjà"}'.encode("cp1252"), "WINDOWS"),
    "japanese": line_breaker(lambda rng, line: '{"text": "ひらがなのテキスト"}'.encode("shift_jis"), "SHIFT-JIS"),
    "latin byte": line_breaker(lambda rng, line: line[:-2] + b"\xff" + line[-2:], "not UTF-8|not text in UTF-8"),
    "10 MB": line_breaker(lambda rng, line: b'{"text": "' + b"x" * 10_000_000 + b'"}', "longer than 4,000,000"),
}  # fmt: skip


def preference(rng: random.Random) -> Broken:
    good, bad = rng.choice([("chosen", "rejected"), ("chosen_response", "rejected_response"), ("Chosen", "Rejected")])
    values = [{"prompt": words(rng), good: words(rng), bad: words(rng)} for _ in range(5)]
    return Broken(*saved(rng, values)[:2], rf"preference data .columns {good.lower()} and {bad.lower()}")


def judged(rng: random.Random) -> Broken:
    values = [{"prompt": words(rng), "completion": words(rng), "label": rng.random() < 0.5} for _ in range(5)]
    return Broken(*saved(rng, values)[:2], "preference data .columns prompt, completion and label")


def unknown_columns(rng: random.Random) -> Broken:
    names = rng.sample(["title", "author", "tags", "link", "date"], 3)
    values = [{name: words(rng) for name in names} for _ in range(5)]
    return Broken(*saved(rng, values)[:2], rf"No form fits the columns .*{', '.join(names)}")


def wrong_column(rng: random.Random) -> Broken:
    suffix, content, _ = saved(rng, sound_rows(rng, "text"))
    return Broken(suffix, content, "no column 'qoute'", ColumnMap(columns={"text": "qoute"}))


def wrong_field(rng: random.Random) -> Broken:
    suffix, content, _ = saved(rng, sound_rows(rng, "text"))
    return Broken(suffix, content, "no field 'txet'", ColumnMap(columns={"txet": "text"}))


def by_columns(rng: random.Random) -> Broken:
    content = json.dumps({"quote": {str(n): words(rng) for n in range(5)}, "author": {"0": "a"}}).encode()
    return Broken(".json", content, "columns .quote, author. hold lists or objects")


def cut_list(rng: random.Random) -> Broken:
    values = sound_rows(rng, rng.choice(ALL))
    content = json.dumps(values, ensure_ascii=False)
    pieces = [json.dumps(value, ensure_ascii=False) for value in values]
    place = rng.randrange(len(values))
    start = content.index(pieces[place])
    cut = rng.randint(start + 1, start + len(pieces[place]) - 1)
    return Broken(".json", content[:cut].encode(), rf"[Rr]ow {place + 1}\b")


def open_list(rng: random.Random) -> Broken:
    values = sound_rows(rng, rng.choice(ALL))
    return Broken(".json", json.dumps(values).encode()[:-1], rf"cut short.*after row {len(values)}")


def bad_item(rng: random.Random) -> Broken:
    pieces = [json.dumps(value) for value in sound_rows(rng, rng.choice(ALL))]
    place = rng.randrange(len(pieces) - 1)
    pieces[place] = rng.choice(["{text: 1}", "{'a': 'b'}", "None", "undefined", '{"a": tru}', '{"a" "b"}'])
    return Broken(".json", f"[{', '.join(pieces)}]".encode(), rf"Row {place + 1} of .*not valid JSON")


def no_comma(rng: random.Random) -> Broken:
    pieces = [json.dumps(value) for value in sound_rows(rng, rng.choice(ALL))]
    place = rng.randrange(1, len(pieces) - 1)
    text = ",".join(pieces[:place]) + "\n" + ",".join(pieces[place:])
    return Broken(".json", f"[{text}]".encode(), rf"Row {place} of .*comma")


def after_list(rng: random.Random) -> Broken:
    return Broken(".json", json.dumps(sound_rows(rng, "text")).encode() + b"\n]", "The text after the rows.*line 2")


def two_lists(rng: random.Random) -> Broken:
    values = sound_rows(rng, rng.choice(ALL))
    return Broken(
        ".json", json.dumps({"train": values, "data": values}).encode(), "two lists of rows, 'train' and 'data'"
    )


def csv_fields(rng: random.Random) -> Broken:
    values = sound_rows(rng, rng.choice(("alpaca", "prompt")))
    lines = csv(values).splitlines()
    place = rng.randrange(1, len(lines))
    lines[place] = lines[place] + b',"more"' if rng.random() < 0.5 else lines[place].rsplit(b',"', 1)[0]
    return Broken(".csv", b"\n".join(lines), rf"Row {place} of .*line {place + 1}. has \d fields, the header \d")


def csv_quote(rng: random.Random) -> Broken:
    lines = csv(sound_rows(rng, rng.choice(FLAT))).splitlines()
    place = rng.randrange(1, len(lines))
    lines[place] = lines[place][:-1] + b' "oops" , x'
    return Broken(".csv", b"\n".join(lines), rf"Row {place} of .*not valid CSV")


def csv_header(rng: random.Random) -> Broken:
    return Broken(".csv", b"text,text\n" + b"a,b\n" * rng.randint(1, 9), "two columns 'text'")


def csv_columns(rng: random.Random) -> Broken:
    return Broken(".csv", f"title,link\n{words(rng)},b\n".encode(), "No form fits the columns .*title, link")


def empty(rng: random.Random) -> Broken:
    suffix = rng.choice([".json", ".jsonl", ".csv"])
    space = rng.choice(
        [b"", b"\n", b"  \n \n", b"\xef\xbb\xbf"] + ([b"[]", b"{}", b'{"data": []}'] if suffix == ".json" else [])
    )
    return Broken(suffix, space, "set.* is empty")


def blank(rng: random.Random) -> Broken:
    suffix, content, unit = saved(rng, [{"text": rng.choice(["", " ", "\n\t"])}] * rng.randint(1, 9))
    return Broken(suffix, content, f"no row to train on. {unit} 1 is blank")


def packed(rng: random.Random) -> Broken:
    content = jsonl(sound_rows(rng, "text"))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as bundle:
        bundle.writestr("set.jsonl", content)
    data, name = rng.choice([(gzip.compress(content), "gzip"), (archive.getvalue(), "zip")])
    return Broken(rng.choice([".json", ".jsonl", ".csv", ".parquet", ".gz"]), data, f"set.* {name}")


def not_data(rng: random.Random) -> Broken:
    content, name = rng.choice(
        [
            (b"%PDF-1.7", "PDF"), (b"<!DOCTYPE html><html>", "web page"), (b"PAR1\x15\x04", "Parquet"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ]
    )  # fmt: skip
    return Broken(rng.choice([".json", ".jsonl", ".csv"]), content, f"set.* {name}")


def scalar(rng: random.Random) -> Broken:
    return Broken(".json", rng.choice([b'"text"', b"42", b"null", b"text"]), "begins with .* at line 1")


def strange_name(rng: random.Random) -> Broken:
    suffix = rng.choice([".txt", ".xlsx", ".md", "", ".bin"])
    return Broken(suffix, jsonl(sound_rows(rng, "text")), "data files end in")


def cut_character(rng: random.Random) -> Broken:
    content = '{"text": "one"}\n{"text": "半'.encode()[: -rng.randint(1, 2)]
    return Broken(".jsonl", content, "cut short: line 2")


def wide(rng: random.Random) -> Broken:
    content = jsonl(sound_rows(rng, "text")).decode().encode(rng.choice(["utf-16-le", "utf-16-be"]))
    return Broken(".jsonl", content, "Line 1 of .*(NUL|not UTF-8|not text)")


FILE_BREAKS = {
    function.__name__: function
    for function in (
        preference, judged, unknown_columns, wrong_column, wrong_field, by_columns, cut_list, open_list, bad_item,
        no_comma, after_list, two_lists, csv_fields, csv_quote, csv_header, csv_columns, empty, blank, packed,
        not_data, scalar, strange_name, cut_character, wide,
    )
}  # fmt: skip

BREAKS: dict[str, Callable[[random.Random], Broken]] = {**ROW_BREAKS, **LINE_BREAKS, **FILE_BREAKS}


def refusal(path: Path, mapping: ColumnMap | None) -> str:
    """What the report says first; the rows must be refused too, and so must the report's `require`."""
    report = check(path, mapping)
    assert not report.ok, report.sentences()
    with pytest.raises(DataError) as raised:
        report.require()
    assert raised.value.hint
    try:
        assert not list(rows(path, mapping)), "rows came to the end of a file that is refused"
    except DataError as error:
        assert error.hint
    return next(line for line in report.sentences() if line.startswith("Refused: "))


@pytest.mark.parametrize("name", BREAKS)
def test_broken_data_sets_are_refused_by_name(name: str, tmp_path: Path) -> None:
    for seed in range(1 if name == "10 MB" else SEEDS):
        broken = BREAKS[name](random.Random(f"{name} {seed}"))
        path = tmp_path / f"set{seed}{broken.suffix}"
        path.write_bytes(broken.content)
        said = refusal(path, broken.mapping)
        assert re.search(broken.names, said), f"seed {seed}: {said}"
        assert "Traceback" not in said and "Error" not in said


def test_there_are_a_thousand() -> None:
    assert (len(BREAKS) - 1) * SEEDS + 1 >= 1000


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "folder.jsonl" / "part.jsonl").write_text("{}")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for name, what in (
        ("pipe.jsonl", "is a pipe"), ("folder.jsonl", "is a folder.*part.jsonl"), ("none.jsonl", "no file"),
        ("loop.jsonl", "cannot be read"), ("a\0b.jsonl", "cannot be read"), ("x" * 300 + ".jsonl", "cannot be read"),
    ):  # fmt: skip
        assert re.search(what, refusal(tmp_path / name, None))
    assert "is a device" in refusal(Path("/dev/zero"), None)
