"""What an operator may wish for to teach a model, and that nothing broken starts a job."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble import jobs
from nibble.config import Settings
from nibble.errors import DataError, NibbleError
from nibble.operator import Operator
from nibble.wishes import Compare, Finetune, Merge
from tests.scripted import ScriptedHost
from tests.test_nibble_data_broken import BREAKS, SEEDS

BAD_NAMES = ["../x", "..", "/etc/passwd", "~", "a/../b", "C:\\x", "x" * 300, "", ".hidden", "a/b/c", "a\nb", "\x00", 7]

SAMPLE = ("preference", "wrong_column", "csv_fields", "empty", "packed", "cut_list", "strange_name")
"""Of the ways in which a data set is broken, those that are tried every time."""


@pytest.fixture
def operator(home: Path, guide_model: Path) -> Operator:
    return Operator(ScriptedHost(), Settings(home=str(home)))


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:20])
@pytest.mark.parametrize("field", ["model", "data", "out"])
def test_what_is_no_name_is_refused_in_a_sentence_and_starts_nothing(
    operator: Operator, field: str, name: object
) -> None:
    if field == "out" and name == "":
        return  # empty is a name made of the others
    for call in (operator.finetune, operator.dry_run):
        with pytest.raises(NibbleError) as caught:
            call(Finetune({field: name}))
        assert len(str(caught.value)) < 1_500
    assert jobs.list_jobs(operator.home) == []


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:20])
def test_no_adapter_and_no_run_is_a_path(operator: Operator, name: object) -> None:
    for wish in (Compare(name), Compare(run=name)):  # type: ignore[arg-type]
        with pytest.raises(NibbleError):
            operator.compare(wish)
    with pytest.raises(NibbleError):
        operator.merge(Merge(name))  # type: ignore[arg-type]
    assert jobs.list_jobs(operator.home) == []


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"home": "/tmp"}, "home"),
        ({"paths": True}, "paths"),
        ({"resume": True}, "resume"),
        ({"config": "/etc/passwd"}, "config"),
        ({"device": "cuda"}, "device"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"max_steps": 0}, "max_steps"),
        ({"low_bit": "int3"}, "int3"),
        ({"columns": {"text": "qoute"}}, "qoute"),
        ({"columns": "text=quote"}, "columns"),
        ({"out": "guide"}, "guide"),
        ("quotes", "mapping"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_named(operator: Operator, told: Any, says: str) -> None:
    with pytest.raises(NibbleError, match=says):
        operator.finetune(Finetune(told))
    assert jobs.list_jobs(operator.home) == []


ANYTHING = st.one_of(
    st.none(), st.text(max_size=20), st.integers(), st.floats(), st.booleans(), st.lists(st.text(max_size=9)),
    st.dictionaries(st.text(max_size=9), st.integers()),
)  # fmt: skip


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(["model", "data", "columns", "r", "targets", "out", "x"]), ANYTHING))
def test_whatever_a_script_sends_is_a_recipe_or_a_sentence(told: dict[str, Any]) -> None:
    for wish in (Finetune(told), Compare(*list(told.values())[:6]), Merge(*list(told.values())[:3] or [""])):
        try:
            wish.recipe() if isinstance(wish, Finetune) else wish.spec()
        except NibbleError as error:
            assert str(error)


def refused(operator: Operator, folder: Path, kind: str, seed: int) -> None:
    """A broken data set is uploaded and trained on, or would be; it is refused by name, and no job starts."""
    broken = BREAKS[kind](random.Random(f"{kind} {seed}"))
    path = folder / f"set{seed}{broken.suffix}"
    path.write_bytes(broken.content)
    columns = dict(broken.mapping.columns) if broken.mapping else {}
    with pytest.raises(NibbleError) as caught:
        operator.finetune(Finetune({"data": operator.keep_data(path), "columns": columns}))
    said = str(caught.value)
    assert re.search(broken.names, said), f"{kind} {seed}: {said}"
    assert "Traceback" not in said
    assert not path.exists(), "an upload stays behind"


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_broken_data_set_starts_no_job(operator: Operator, tmp_path: Path, kind: str) -> None:
    refused(operator, tmp_path, kind, 0)
    assert jobs.list_jobs(operator.home) == []


@pytest.mark.full
@pytest.mark.parametrize("kind", BREAKS)
def test_none_of_a_thousand_broken_data_sets_starts_a_job(operator: Operator, tmp_path: Path, kind: str) -> None:
    for seed in range(1 if kind == "10 MB" else SEEDS):
        refused(operator, tmp_path, kind, seed)
    assert jobs.list_jobs(operator.home) == []


def test_a_training_gets_a_name_that_replaces_nothing_and_is_not_begun_twice(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(operator, "_start", lambda task, spec, **more: started.append(dict(spec)) or {})
    (operator.home / "adapters" / "guide-quotes").mkdir(parents=True)
    operator.finetune(Finetune({}))
    assert started[0]["out"] == "guide-quotes-2"
    operator.finetune(Finetune({"out": "mine"}))
    assert started[1]["out"] == "mine" and started[1]["max_steps"] == 200
    operator.dry_run(Finetune({"data": "instructions"}))
    assert started[2]["dry_run"] is True
    (operator.home / "models" / "guide-instructions").mkdir(parents=True)
    operator.finetune(Finetune({"data": "instructions"}))
    assert started[3]["out"] == "guide-instructions-2"
    with pytest.raises(NibbleError, match="A model here is called guide-instructions"):
        operator.finetune(Finetune({"data": "instructions", "out": "guide-instructions"}))


def test_a_data_set_is_looked_at_and_kept(operator: Operator, tmp_path: Path) -> None:
    path = tmp_path / "my talk.csv"
    path.write_text("question,reply\nWho?,Me.\n", encoding="utf-8")
    name = operator.keep_data(path)
    assert name == "my-talk" and name in operator.data_sets()
    found = operator.look(Finetune({"data": name, "columns": {"prompt": "question", "completion": "reply"}}))
    assert found["ok"] and found["detection"]["form"] == "prompt" and found["first"] == [
        {"question": "Who?", "reply": "Me."}
    ]  # fmt: skip
    assert not operator.look(Finetune({"data": name}))["ok"]


def test_there_is_no_report_before_a_comparison(operator: Operator) -> None:
    for job_id in ("", "20260101-000000-compare-abcd", "../x"):
        with pytest.raises(NibbleError):
            operator.compare_report(job_id)


def test_what_only_a_tokenizer_can_tell_starts_no_job(operator: Operator, tmp_path: Path) -> None:
    """Every sample is longer than the longest that is trained on, so none ends."""
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps({"text": f"{number} " + "a word and more " * 40}) + "\n" for number in range(5)))
    name = operator.keep_data(file, "long.jsonl")
    with pytest.raises(DataError, match="too long"):
        operator.finetune(Finetune({"model": "guide", "data": name, "max_length": 16}))
    assert operator.jobs() == []
