"""Names of data sets: what ships, uploads that are kept whole or not at all, hubs' data sets, and paths."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble import publish
from nibble.data import SHIPPED, check, rows, store
from nibble.errors import DataError

ROOT = Path(__file__).parents[1]
LINES = '{"text": "one"}\n{"text": "two"}\n'


def upload(folder: Path, name: str = "mine.jsonl", content: str = LINES) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


def from_hub(home: Path, parts: dict[str, str], name: str = "org/set") -> Path:
    """A hub's data set as a download leaves it."""
    folder = store.hub_folder(name, home)
    with publish.publication(folder, {"kind": "dataset", "source": name, "parts": list(parts)}) as fresh:
        for path, content in parts.items():
            (fresh / path).parent.mkdir(exist_ok=True)
            (fresh / path).write_text(content)
    return folder


def test_shipped_names_lead_to_sound_files(home: Path) -> None:
    assert store.names(home) == list(SHIPPED)
    assert all(check(store.find(name, home)).ok for name in SHIPPED)


def test_an_upload_is_kept_listed_replaced_and_deleted(home: Path, tmp_path: Path) -> None:
    assert store.keep(upload(tmp_path / "up"), home) == "mine"
    assert store.names(home) == [*SHIPPED, "mine"]
    assert store.find("mine", home).read_text() == LINES
    # Another ending under the same name replaces it: one name, one file.
    assert store.keep(upload(tmp_path / "up", "other.csv", "text\nthree\n"), home, "mine") == "mine"
    assert [row.text for row in rows(store.find("mine", home))] == ["three"]
    entry = store.entries(home)[-1]
    assert (entry.name, entry.kind, entry.size_bytes, entry.note) == ("mine", "upload", 11, "mine.csv")
    assert store.delete("mine", home) == 11
    assert store.names(home) == list(SHIPPED) and not list((home / "data").iterdir())
    with pytest.raises(DataError, match="no data set 'mine'"):
        store.find("mine", home)


@pytest.mark.parametrize(
    ("name", "called"),
    [("Мои данные.jsonl", "upload"), ("a b (2).jsonl", "a-b-2"), ("..a.jsonl", "a"), ("x" * 200 + ".csv", "x" * 120)],
)  # fmt: skip
def test_a_name_is_made_of_the_file_s_own(name: str, called: str) -> None:
    assert store.made_name(Path(name)) == called


@pytest.mark.parametrize("name", ["quotes", "../x", "a/b", ".hidden", "con", "a\0b", "x" * 200, "ä"])
def test_a_name_that_cannot_be_is_refused(home: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be the name"):
        store.keep(upload(tmp_path / "up"), home, name)
    assert not (home / "data").exists()


def test_a_file_that_is_called_as_a_shipped_set_gets_another_name(home: Path, tmp_path: Path) -> None:
    assert store.keep(upload(tmp_path / "up", "quotes.jsonl"), home) == "quotes-2"
    assert store.find("quotes", home) != store.find("quotes-2", home)


def test_another_file_of_the_same_name_takes_nothing_from_the_first(home: Path, tmp_path: Path) -> None:
    first, other = upload(tmp_path / "a"), upload(tmp_path / "b", "mine.jsonl", '{"text": "other"}\n')
    assert [store.keep(path, home) for path in (first, other, first, other)] == ["mine", "mine-2", "mine", "mine-2"]
    assert store.find("mine", home).read_text() == LINES


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", "set.py", "set"])
def test_only_data_files_are_kept(home: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="data files end in"):
        store.keep(upload(tmp_path / "up", name), home)
    assert store.names(home) == list(SHIPPED)


def test_a_pipe_is_not_read(home: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="is a pipe"):
        store.keep(tmp_path / "pipe.jsonl", home)


def test_uploads_have_a_quota_and_a_replaced_one_does_not_count(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "QUOTA_BYTES", len(LINES) + 5)
    store.keep(upload(tmp_path / "up"), home)
    with pytest.raises(DataError, match="no room"):
        store.keep(upload(tmp_path / "up"), home, "two")
    store.keep(upload(tmp_path / "up"), home, "mine")
    assert [path.name for path in (home / "data").iterdir()] == ["mine.jsonl"]


def test_a_disk_is_not_filled(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SPARE_BYTES", 2**60)
    with pytest.raises(DataError, match="no room"):
        store.keep(upload(tmp_path / "up"), home)
    assert not list((home / "data").iterdir())


def test_an_upload_that_is_killed_leaves_what_stood_there(home: Path, tmp_path: Path) -> None:
    store.keep(upload(tmp_path / "up"), home)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom nibble.data import store\n"
        "def slow(stream, fresh, room, name):\n"
        "    fresh.write_bytes(b'half'); print('half', flush=True); time.sleep(60)\n"
        "store._copy = slow\n"
        f"store.keep(Path({str(tmp_path / 'up' / 'mine.jsonl')!r}), Path({str(home)!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"half\n"
        child.send_signal(signal.SIGKILL)
    left = [path for path in (home / "data").iterdir() if path.name.startswith(".")]
    assert len(left) == 1 and store.find("mine", home).read_text() == LINES
    assert store.names(home) == [*SHIPPED, "mine"]
    # The next upload sweeps it away, once nobody can still be writing it.
    os.utime(left[0], (time.time() - 7200,) * 2)
    store.keep(upload(tmp_path / "up"), home, "two")
    assert not left[0].exists()


def test_a_hub_s_data_set_is_read_as_one(home: Path) -> None:
    folder = from_hub(home, {"data/train-0.jsonl": LINES, "data/train-1.jsonl": '{"text": "three"}'})
    assert store.names(home) == [*SHIPPED, "org/set"]
    assert store.find("org/set", home) == folder
    assert [(row.number, row.text) for row in rows(folder)] == [(1, "one"), (2, "two"), (3, "three")]
    report = check(folder)
    assert report.ok and report.unit == "row" and "3 rows" in " ".join(report.sentences())
    assert store.delete("org/set", home) > 0 and store.names(home) == list(SHIPPED)


def test_a_broken_row_of_a_later_part_is_named_in_its_file(home: Path) -> None:
    folder = from_hub(home, {"a.jsonl": LINES, "b.jsonl": '{"text": 3}\n{"text": "four"}\n'})
    report = check(folder)
    assert not report.ok and "Row 3 of org__set" in report.problems[0].message


def test_a_folder_that_is_no_data_set_is_not_listed_and_not_read(home: Path) -> None:
    (home / "data" / "org__x").mkdir(parents=True)
    (home / "data" / "org__x" / "a.jsonl").write_text(LINES)
    assert store.names(home) == list(SHIPPED)
    assert "is a folder" in check(store.find("org/x", home)).problems[0].message


def test_what_is_not_here_says_how_to_fetch_it(home: Path) -> None:
    with pytest.raises(DataError) as told:
        store.find("tatsu-lab/alpaca", home)
    assert "python -m nibble download tatsu-lab/alpaca --dataset" in told.value.hint


def test_a_path_is_a_path_only_where_paths_are_allowed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = upload(tmp_path / "up")
    assert store.find(str(path), home, paths=True) == path
    monkeypatch.chdir(tmp_path)
    assert store.find("up/mine.jsonl", home, paths=True) == Path("up/mine.jsonl")
    assert "no file" in check(store.find("up/typo.jsonl", home, paths=True)).problems[0].message
    for name in (str(path), "up/mine.jsonl", "../up/mine.jsonl"):
        with pytest.raises(DataError):
            store.find(name, home)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.sampled_from(["../", "a/../b", "~/x", "org/..", "..", "a//b", "org/na\nme"]))
def test_no_name_leads_out_of_home(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    home = tmp_path_factory.getbasetemp() / "empty-home"
    if name in SHIPPED:
        return
    with pytest.raises(DataError):
        store.find(name, home)
    with pytest.raises(DataError):
        store.delete(name, home)
