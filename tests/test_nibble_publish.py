"""A folder is put in place whole or not at all, whatever fails on the way."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nibble import publish
from nibble.errors import ModelError


def save(folder: Path, text: str) -> None:
    with publish.publication(folder, {"format": text}) as fresh:
        for index in range(3):
            (fresh / f"part{index}").write_text(text * 50)
        (fresh / "more").mkdir()
        (fresh / "more" / "last").write_text(text)


def whole(folder: Path) -> str:
    """Which version stands there; empty if none. Fails if it is a mix."""
    if not folder.exists():
        return ""
    publish.verify(folder, contents=True)
    text = publish.read_manifest(folder)["format"]
    assert (folder / "more" / "last").read_text() == text
    assert [(folder / f"part{index}").read_text() for index in range(3)] == [text * 50] * 3
    return text


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if path.name not in (folder.name, f".{folder.name}.lock")]


def test_a_save_and_a_second_one(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "m"
    for text in ("old", "new"):
        save(folder, text)
        assert whole(folder) == text
    assert not leftovers(folder)
    assert set(publish.read_manifest(folder)["files"]) == {"part0", "part1", "part2", "more/last"}


class Failing:
    """The n-th call raises; the ones before and after it work."""

    def __init__(self, real: Callable, at: int) -> None:
        self.real, self.left = real, at

    def __call__(self, *arguments: object, **more: object) -> object:
        self.left -= 1
        if self.left == -1:
            raise OSError(errno.ENOSPC, "no space left on device")
        return self.real(*arguments, **more)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("existing", ["", "old"])
@pytest.mark.parametrize(
    ("owner", "name"), [(os, "fsync"), (Path, "rename"), (Path, "write_text"), (Path, "mkdir"), (publish, "_exchange")]
)
def test_any_step_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, existing: str, exchange: bool
) -> None:
    folder = tmp_path / "m"
    seen = set()
    for at in range(12):
        shutil.rmtree(folder, ignore_errors=True)
        if existing:
            save(folder, existing)
        with monkeypatch.context() as patch:
            if not exchange:
                patch.setattr(publish, "_exchange", lambda one, other: False)
            patch.setattr(owner, name, broken := Failing(getattr(owner, name), at))
            if owner is Path:
                # A plain object is no method: hand the path over.
                patch.setattr(owner, name, lambda self, *a, broken=broken, **k: broken(self, *a, **k))
            try:
                save(folder, "new")
            except OSError:
                assert broken.left < 0
                # The last sync is that of the directory above: the new folder stands by then.
                assert whole(folder) in (existing, "new")
                seen.add("failed")
            else:
                assert whole(folder) == "new"
                seen.add("worked")
        assert not leftovers(folder)
    assert "worked" in seen
    needs_existing = name == "_exchange" and not existing
    assert "failed" in seen or needs_existing or (name == "rename" and existing and exchange)


SAVER = """
import sys, pathlib
from nibble import publish
from tests.test_nibble_publish import save
turn = 0
while True:
    turn += 1
    save(pathlib.Path(sys.argv[1]), "ab"[turn % 2] * 400)
    print(turn, flush=True)
"""


def test_a_kill_at_any_time_leaves_a_whole_folder(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    root = Path(__file__).parents[1]
    for turn in range(12):
        child = subprocess.Popen([sys.executable, "-c", SAVER, str(folder)], cwd=root, stdout=subprocess.PIPE)
        assert child.stdout
        child.stdout.readline()
        time.sleep(0.003 * turn)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert whole(folder)[0] in "ab"
    save(folder, "end")
    assert whole(folder) == "end"
    assert not leftovers(folder)


def test_a_kill_between_the_two_renames_is_mended(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save(folder, "old")
    folder.rename(tmp_path / f".m.old-{0:032x}")
    with pytest.raises(RuntimeError), publish.publication(folder, {}):
        raise RuntimeError
    assert whole(folder) == "old"


def test_what_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").write_text("x")
    with pytest.raises(ModelError, match="photos"):
        save(foreign, "new")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ModelError):
        save(file, "new")
    assert (foreign / "cat.jpg").exists()
    assert file.read_text() == "x"
    empty = tmp_path / "empty"
    empty.mkdir()
    save(empty, "new")
    assert whole(empty) == "new"


def test_a_second_save_at_the_same_time_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    with publish.publication(folder, {"format": "a"}) as fresh:
        (fresh / "x").write_text("1")
        with pytest.raises(ModelError, match="being saved"):
            save(folder, "b")
    assert publish.read_manifest(folder)["format"] == "a"


def test_damage_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save(folder, "new")
    (folder / "part1").write_text("wen" * 50)
    publish.verify(folder)
    with pytest.raises(ModelError, match="part1"):
        publish.verify(folder, contents=True)
    (folder / "part1").write_text("cut")
    with pytest.raises(ModelError, match="part1"):
        publish.verify(folder)
    (folder / publish.MANIFEST).write_text("[")
    with pytest.raises(ModelError, match="broken"):
        publish.verify(folder)


def test_what_is_beside_for_another_model_is_let_be(tmp_path: Path) -> None:
    for name in ("m", "m.old-2", "m.tmp-2", "m[1]"):
        save(tmp_path / name, "old")
    mine = tmp_path / f".m[1].tmp-{1:032x}"
    mine.mkdir()
    others = {path.name for path in tmp_path.iterdir()} - {mine.name, "m"}
    (tmp_path / "m").rename(tmp_path / "away")
    for name in ("m", "m[1]"):
        publish.clean(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == others | {"away"}
