"""A data set looked at by a process of its own: what it is, what is wrong, and its first rows as tokens."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from nibble.data import glimpse, looking, store
from nibble.errors import EngineDied, NibbleError


def look(model: Path, data: Path, **more: Any) -> dict[str, Any]:
    """As the child does it, in this process."""
    spec = {"model": str(model), "data": str(data), "max_length": 64, "n": 2} | more
    answer = looking.look(spec)
    json.dumps(answer)
    return answer


def save(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_a_child_tells_all_the_page_shows(guide_model: Path, home: Path) -> None:
    found = glimpse.glimpse(guide_model, store.find("instructions", home), n=2)
    assert found["ok"] and found["complete"] and found["detection"]["form"] == "alpaca" and not found["problems"]
    assert found["columns"] == ["instruction", "input", "output"] == list(found["first"][0])
    assert found["rows"] == found["usable"] > 100 and found["tokens"] > found["trained_tokens"] > 0
    assert found["template"] == "tokenizer" and found["padding"] and not found["model_problem"]
    for sample in found["samples"]:
        assert sample["ends"] and sample["begins"] == 0 and not sample["cut"]
        answer = "".join(piece["text"] for piece in sample["pieces"] if piece["trained"])
        assert answer.startswith(found["first"][sample["row"] - 1]["output"])


def test_the_longest_sample_and_the_mapping_are_the_person_s(guide_model: Path, tmp_path: Path) -> None:
    data = save(tmp_path / "set.jsonl", *[{"q": "why " * 20, "a": f"because {n} " * 20} for n in range(4)])
    found = look(guide_model, data)
    assert not found["ok"] and found["detection"] is None and "No form fits" in found["problems"][0]["sentence"]
    assert found["columns"] == ["q", "a"] and len(found["first"]) == 4
    said = {"columns": {"prompt": "q", "completion": "a"}}
    found = look(guide_model, data, **said, max_length=128)
    assert found["ok"] and found["detection"]["given"] and found["truncated_share"] == 0
    found = look(guide_model, data, **said, max_length=48)
    assert not found["ok"] and found["truncated_share"] == 1.0 and not found["samples"][0]["ends"]


def test_a_broken_row_does_not_hide_the_sound_ones(guide_model: Path, tmp_path: Path) -> None:
    data = save(tmp_path / "set.jsonl", {"text": "one two"}, {"text": 3}, {"text": "three four"})
    found = look(guide_model, data)
    assert not found["ok"] and found["problems"][0]["rows"] == [2] and found["problems"][0]["fatal"]
    assert [sample["row"] for sample in found["samples"]] == [1, 3]
    assert look(guide_model, data, leave_out=True)["ok"]


def test_of_a_long_file_the_first_rows_are_read(guide_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    data = save(tmp_path / "set.jsonl", *[{"text": f"row number {n}"} for n in range(500)])
    assert look(guide_model, data)["complete"]
    monkeypatch.setattr(looking, "MOST_ROWS", 100)
    found = look(guide_model, data)
    assert found["ok"] and found["rows"] == 100 and not found["complete"]
    assert any("the first 100 rows" in sentence for sentence in found["sentences"])
    monkeypatch.setattr(looking, "MOST_S", 0.0)
    assert look(guide_model, data)["rows"] == 1


def test_long_values_and_samples_are_told_in_part(guide_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(looking, "MOST_PIECES", 10)
    data = save(tmp_path / "set.jsonl", {"text": "word " * 3000, "n": {"deep": [1]}, "bad": "\ud800"})
    found = look(guide_model, data, max_length=512)
    assert found["first"][0]["text"].endswith("…") and len(found["first"][0]["text"]) == 301
    assert found["first"][0]["n"] == '{"deep": [1]}' and found["first"][0]["bad"] == "?"
    assert len(found["samples"][0]["pieces"]) == 10 and found["samples"][0]["cut"]


def test_a_model_that_cannot_be_used_leaves_the_data_to_be_seen(tmp_path: Path, guide_model: Path) -> None:
    model = shutil.copytree(guide_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(
        "{% for a in range(10**9) %}{% for b in range(10**9) %}x{% endfor %}{% endfor %}"
    )
    data = save(tmp_path / "set.jsonl", {"text": "one two"})
    found = glimpse.glimpse(model, data)
    assert found["model_problem"] and not found["ok"] and found["samples"] == [] and found["tokens"] is None
    assert found["detection"]["form"] == "text" and found["usable"] == 1
    assert "not there" in str(look(tmp_path / "not there", data)["model_problem"])


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "too much memory or time"),
        ("raise SystemExit('a last line')", "a last line"),
        ('print(\'{"error": ["It is wrong.", "Mend it."]}\')', "It is wrong. Mend it."),
        ("print('noise')", "exit code 0"),
    ],
)
def test_however_the_child_ends_it_is_a_sentence(monkeypatch: Any, tmp_path: Path, code: str, says: str) -> None:
    monkeypatch.setattr(glimpse, "COMMAND", (sys.executable, "-c", code))
    with pytest.raises(NibbleError) as told:
        glimpse.glimpse(tmp_path, tmp_path / "x.jsonl")
    assert says in str(told.value)


def test_a_child_that_never_ends_is_ended(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(glimpse, "COMMAND", (sys.executable, "-c", "import time; time.sleep(600)"))
    monkeypatch.setattr(glimpse, "WALL_S", 0.3)
    with pytest.raises(NibbleError, match="took longer"):
        glimpse.glimpse(tmp_path, tmp_path / "x.jsonl")


def test_the_child_s_memory_is_bounded(tmp_path: Path) -> None:
    code = "from nibble.data.looking import _limit; _limit(); bytearray(3 * 2**30)"
    command = (sys.executable, "-c", code)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(EngineDied, match="MemoryError|ended"):
        patch.setattr(glimpse, "COMMAND", command)
        glimpse.glimpse(tmp_path, tmp_path / "x.jsonl")
