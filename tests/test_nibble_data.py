"""Data files read row by row, their form told, their rows mapped, and the report."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.data import ColumnMap, check, find, open_source, rows
from nibble.data.telling import first_rows, told
from nibble.errors import DataError

QUESTION, ANSWER = "What is half a byte?", "A nibble."
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
PARTS = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
SHARED = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]

FORMS = {
    "messages": {"messages": TURNS},
    "typed parts": {"messages": PARTS},
    "sharegpt": {"id": "a", "conversations": SHARED},
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "dolly": {"instruction": QUESTION, "context": "", "response": ANSWER, "category": "open_qa"},
    "prompt": {"prompt": QUESTION, "completion": ANSWER},
    "lists of messages": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "gsm8k": {"question": QUESTION, "answer": ANSWER},
}
"""The same question and answer in every form."""


def save_jsonl(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return path


def save_json(path: Path, values: list[Any]) -> Path:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def save_csv(path: Path, values: list[Any]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(values[0]))
        writer.writeheader()
        for value in values:
            texts = {key: part if isinstance(part, str) else json.dumps(part) for key, part in value.items()}
            writer.writerow(texts)
    return path


WRITERS: dict[str, Callable[[Path, list[Any]], Path]] = {"jsonl": save_jsonl, "json": save_json, "csv": save_csv}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_conversation(form: str, kind: str, tmp_path: Path) -> None:
    if (form, kind) == ("lists of messages", "csv"):
        pytest.skip("a prompt that reads like JSON is text in CSV")
    path = WRITERS[kind](tmp_path / f"set.{kind}", [FORMS[form]] * 2)
    assert [list(row.messages) for row in rows(path)] == [TURNS, TURNS]
    report = check(path)
    assert report.ok and report.kind == kind and report.usable == 2
    assert report.detection is not None and report.detection.form in report.detection.why


@pytest.mark.parametrize("column", ["text", "quote", "content", "whatever"])
def test_running_text_and_its_column(column: str, tmp_path: Path) -> None:
    path = save_jsonl(tmp_path / "set.jsonl", [{column: "Half a byte.", "year": 1970}])
    assert [row.text for row in rows(path)] == ["Half a byte."]
    assert column in check(path).sentences()[0]


def test_a_list_of_strings_is_text(tmp_path: Path) -> None:
    path = save_json(tmp_path / "set.json", ["one", "two"])
    assert [(row.number, row.text) for row in rows(path)] == [(1, "one"), (2, "two")]


def test_alpaca_input_system_and_history(tmp_path: Path) -> None:
    row = FORMS["alpaca"] | {"input": "in one word", "system": "Be brief.", "history": [["Hi", "Hello"]]}
    (read,) = rows(save_jsonl(tmp_path / "set.jsonl", [row]))
    assert [turn["role"] for turn in read.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert read.messages[3]["content"] == f"{QUESTION}\n\nin one word"


@pytest.mark.parametrize("key", ["data", "rows", "train"])
def test_json_with_its_rows_under_a_key(key: str, tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    path.write_text(json.dumps({"version": [1, {"a": "]"}], key: [FORMS["alpaca"]] * 3, "by": "us"}))
    assert len(list(rows(path))) == 3
    path.write_text(json.dumps(FORMS["messages"], indent=2))
    assert len(list(rows(path))) == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings_and_line_ends(encoding: str, end: str, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    texts = ["半字节 \u2028 ist ein halbes Bëyte 🙂", "two"]
    text = end.join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + end + end
    path.write_bytes(text.encode(encoding))
    assert [row.text for row in rows(path)] == texts
    assert check(path).sentences()[1].startswith("set.jsonl: 2 rows, 2 to train on")


def test_what_the_person_says_overrides(tmp_path: Path) -> None:
    path = save_jsonl(tmp_path / "set.jsonl", [{"text": "no", "quote": "yes", "chosen": "a", "rejected": "b"}])
    assert [row.text for row in rows(path, ColumnMap.parse("text=quote"))] == ["yes"]
    (pair,) = rows(path, ColumnMap.parse("prompt = quote, completion = chosen"))
    assert [turn["content"] for turn in pair.messages] == ["yes", "a"]
    with pytest.raises(DataError, match="qoute.*quote"):
        list(rows(path, ColumnMap.parse("text=qoute")))
    with pytest.raises(DataError, match="FIELD=COLUMN"):
        ColumnMap.parse("quote")


def test_preference_data_is_refused_by_name(tmp_path: Path) -> None:
    for row in ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "completion": "b", "label": True}):
        report = check(save_jsonl(tmp_path / "set.jsonl", [row]))
        assert not report.ok and "preference data" in report.sentences()[-1]


def test_the_report_names_rows_and_counts(tmp_path: Path) -> None:
    values = [FORMS["alpaca"] | {"output": f"answer {n}"} for n in range(80)]
    values[9] = values[2]
    values[20] = {"instruction": "why?", "output": ""}
    path = save_jsonl(tmp_path / "set.jsonl", values)
    lines = path.read_text().splitlines()
    lines[56] = lines[56][:-1]
    path.write_text("\n".join(lines))
    report = check(path)
    assert not report.ok
    said = "\n".join(report.sentences())
    assert "Line 57 of set.jsonl is not valid JSON" in said and "Line 10 is the same as line 3." in said
    assert "Line 21 of set.jsonl has an empty answer" in said
    with pytest.raises(DataError, match="Line 21"):
        report.require()
    mild = check(path, ColumnMap(leave_out=True))
    assert mild.ok and mild.rows == 80 and mild.usable == 78
    assert len(list(rows(path, ColumnMap(leave_out=True)))) == 78


def test_limit_reads_only_the_first_rows(tmp_path: Path) -> None:
    path = save_jsonl(tmp_path / "set.jsonl", [{"text": str(n)} for n in range(100)])
    report = check(path, limit=10)
    assert report.rows == 10 and not report.complete and check(path, limit=100).complete


def test_characters_that_no_tokenizer_takes_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"text": "a\\u0000b\\ud83d"}\n{"text": "fine \\ud83d\\ude42"}\n')
    assert [row.text for row in rows(path)] == ["ab", "fine 🙂"]
    assert "Line 1 held characters" in check(path).sentences()[-1]


def test_a_column_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"text": "one", "a\\ud800": "two"}\n')
    report = check(path)
    with pytest.raises(DataError, match="no text"):
        report.require()
    json.dumps([told(report), first_rows(path)], ensure_ascii=False).encode()


def test_duplicates_among_many_rows(tmp_path: Path) -> None:
    path = save_jsonl(tmp_path / "set.jsonl", [{"text": str(n % 20_000)} for n in range(20_100)])
    (problem,) = check(path).problems
    assert problem.count == 100 and problem.rows == [20_001, 20_002, 20_003, 20_004, 20_005] and not problem.fatal


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    path = tmp_path / "set.parquet"
    parquet.write_table(arrow.Table.from_pylist([FORMS["messages"]] * 1000), path)
    assert [list(row.messages) for row in rows(path)] == [TURNS] * 1000
    path.write_bytes(path.read_bytes()[:-100])
    assert not check(path).ok


def test_parquet_without_pyarrow_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "set.parquet"
    path.write_bytes(b"PAR1 and more")
    assert "pip install pyarrow" in check(path).sentences()[-1]


json_rows = st.lists(
    st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.booleans() | st.integers() | st.floats(
        allow_nan=False) | st.text(max_size=20), lambda inner: st.lists(inner, max_size=3), max_leaves=5), max_size=4),
    min_size=1, max_size=8,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(values=json_rows, chunk=st.integers(1, 64), indent=st.sampled_from([None, 0, 3]))
def test_a_streamed_list_is_what_json_reads(
    values: list[Any], chunk: int, indent: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("json") / "set.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=False), encoding="utf-8", errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nibble.data.text.CHUNK", chunk)
        try:
            read = [record.value for record in open_source(path).records()]
        except DataError as error:
            assert "UTF-8" in error.message  # a lone surrogate cannot be written as UTF-8
            return
    assert read == values


@settings(max_examples=300, deadline=None)
@given(
    content=st.binary(max_size=300) | st.text('{}[]",:\\ntexav 1\n', max_size=120).map(str.encode),
    suffix=st.sampled_from([".json", ".jsonl", ".csv", ".tsv"]),
)
def test_any_bytes_give_a_report(content: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"set{suffix}"
    path.write_bytes(content)
    report = check(path)
    assert report.sentences() and (report.usable or not report.ok)
    if not report.ok:
        with pytest.raises(DataError):
            report.require()


names = st.sampled_from(["role", "content", "from", "value", "type", "text", "weight", "tool_calls"])
words = st.sampled_from(["user", "assistant", "human", "gpt", "system", "tool", "text", "", " ", "[", '[{"role": 1}]'])
values = st.recursive(
    words | st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=12,
)
columns = st.sampled_from(
    ["text", "quote", "messages", "conversations", "instruction", "input", "output", "system", "history", "prompt",
     "completion", "question", "answer", "chosen", "rejected", "label"]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(table=st.lists(st.dictionaries(columns, values, max_size=5) | values, min_size=1, max_size=5))
def test_any_rows_give_a_report(table: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("rows") / "set.jsonl"
    path.write_text("\n".join(json.dumps(value) for value in table))
    report, mild = check(path), check(path, ColumnMap(leave_out=True))
    assert report.usable or not report.ok
    assert not report.ok or len(list(rows(path))) == report.usable
    if mild.ok:
        made = list(rows(path, ColumnMap(leave_out=True)))
        assert len(made) == mild.usable > 0
        for row in made:
            spoken = [turn["role"] for turn in row.messages if turn["role"] != "system"]
            assert bool(row.text) != bool(row.messages)
            assert spoken == ["user", "assistant"] * (len(spoken) // 2)


SHIPPED_ROWS = {"quotes": 400, "instructions": 200}


@pytest.mark.parametrize("name", SHIPPED_ROWS)
def test_shipped_sets_are_clean(name: str) -> None:
    report = check(find(name))
    assert report.ok and not report.problems and report.usable >= SHIPPED_ROWS[name]


def test_shipped_instructions_speak_two_languages() -> None:
    answers = [row.messages[-1]["content"] for row in rows(find("instructions"))]
    chinese = sum(any("\u4e00" <= character <= "\u9fff" for character in answer) for answer in answers)
    assert 60 < chinese < len(answers) - 60


def test_a_name_leads_nowhere_else(tmp_path: Path) -> None:
    for name in ("/proc/self/environ", "../quotes", str(tmp_path), ""):
        with pytest.raises(DataError):
            find(name)


def test_real_sets(shared_data: Path, tmp_path: Path) -> None:
    gsm8k = check(shared_data / "sets" / "gsm8k" / "train.jsonl")
    assert gsm8k.ok and gsm8k.usable == 7473 and gsm8k.detection is not None and gsm8k.detection.form == "prompt"
    stories = check(shared_data / "sets" / "tinystories-1000" / "tinystories_1000.json")
    assert stories.ok and stories.usable == 1000 and stories.detection is not None
    assert stories.detection.form == "text"
    wiki = (shared_data / "sets" / "wikitext2-test" / "wiki.test.joined.txt").read_text(encoding="utf-8")
    lines = wiki.split("\n")
    report = check(save_json(tmp_path / "wiki.json", lines))
    assert report.ok and report.usable == sum(bool(line.strip()) for line in lines)
    refused = check(shared_data / "sets" / "wikitext2-test" / "wiki.test.joined.txt")
    assert not refused.ok and ".jsonl" in refused.sentences()[-1]


MEASURE = """
import sys
from pathlib import Path
from nibble.data import check
report = check(Path(sys.argv[1]))
# Not ru_maxrss: that one remembers the process that started this one.
peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(report.ok, report.usable, int(peak) // 1024)
"""


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_memory_is_flat(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"set.{kind}"
    row = {"instruction": "count to {}", "output": "word " * 100}
    opening, before, after = {"json": ("[", ",", "]"), "jsonl": ("", "", ""), "csv": ("", "", "")}[kind]
    count = 400_000
    with path.open("w", encoding="utf-8") as stream:
        stream.write(opening)
        if kind == "csv":
            stream.write("instruction,output\n")
        for number in range(count):
            values = row | {"instruction": f"count to {number}"}
            line = ",".join(values.values()) if kind == "csv" else json.dumps(values)
            stream.write((before if number else "") + line + "\n")
        stream.write(after)
    assert path.stat().st_size > 180 * 2**20
    run = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    ok, usable, peak_mib = run.stdout.split()
    print(f"{kind}: {path.stat().st_size / 2**20:.0f} MiB read, peak {peak_mib} MiB")
    assert ok == "True" and int(usable) == count
    assert int(peak_mib) < 90


@pytest.mark.parametrize(
    ("codec", "text", "name"),
    [
        ("gb18030", "把下面的句子改得更有礼貌。", "GBK"),
        ("cp1252", "Größe und Maß, être humain", "WINDOWS-1252"),
        ("shift_jis", "これは何ですか", "SHIFT-JIS"),
        ("euc_kr", "이것은 무엇입니까", "EUC-KR"),
        ("big5", "麻煩您把窗戶關上，好嗎？", ""),
        ("koi8-r", "что это такое", ""),
        ("cp1251", "книга на столе", ""),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_foreign_encoding_is_named_only_where_it_is_sure(
    codec: str, text: str, name: str, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / f"set.{kind}"
    path.write_bytes({"jsonl": f'{{"text": "{text}"}}\n', "csv": f"text\n{text}\n"}[kind].encode(codec))
    (problem,) = check(path).problems
    assert (f"iconv -f {name} " in problem.hint) if name else ("iconv" not in problem.hint and "UTF-8" in problem.hint)
    assert f"Line {2 if kind == 'csv' else 1} of" in problem.message


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("kind", WRITERS)
def test_marked_encodings_are_read(codec: str, kind: str, tmp_path: Path) -> None:
    path = WRITERS[kind](tmp_path / f"set.{kind}", [{"text": "半字节 ü"}])
    path.write_bytes(path.read_text(encoding="utf-8").encode(codec))
    assert [row.text for row in rows(path)] == ["半字节 ü"]
