"""Saves that are killed at random moments, and saves in which each call to the disk fails: never half a model."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nibble import publish
from nibble.errors import ModelError

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[1]


def crashing(action: str, number: int, work: Path, preload: Path | None = None) -> dict[str, int]:
    """What tests/support/crashing.py counts; its own assertions are ours."""
    seed = random.SystemRandom().randrange(10**6)
    command = [sys.executable, "-m", "tests.support.crashing", action, str(work), str(number), str(seed)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"LD_PRELOAD": str(preload)} if preload else {})
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, f"seed {seed}: {run.stderr[-2000:]}"
    return json.loads(run.stdout)


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.full)])
def test_a_killed_save_leaves_the_old_model_or_the_new_one(count: int, tmp_path: Path) -> None:
    ends = crashing("kills", count, tmp_path)
    assert ends["old"] + ends["new"] == count
    # The moments lay all over the save, else this has shown nothing.
    assert min(ends["killed"], ends["old"], ends["new"], ends["unfinished"]) > count / 20, ends


def test_each_call_to_the_disk_may_fail(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler: the library that makes calls fail cannot be built")
    library, source = tmp_path / "faults.so", ROOT / "tests" / "support" / "faults.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", str(source), "-o", str(library), "-ldl"], check=True)
    ends = crashing("faults", 1, tmp_path, library)
    assert ends["calls"] > 15
    assert ends["refused"] > 2 * ends["calls"]
    assert ends.get("refused without the cause", 0) == 0


def save(folder: Path, text: str) -> None:
    with publish.publication(folder, {}) as fresh:
        (fresh / "file").write_text(text)


def test_a_start_cleans_up_after_dead_saves_and_lets_living_ones_be(tmp_path: Path) -> None:
    for name in ("kept", "moved", "busy"):
        save(tmp_path / name, name)
    (tmp_path / f".kept.tmp-{1:032x}").mkdir()
    (tmp_path / f".kept.old-{1:032x}").mkdir()
    (tmp_path / "moved").rename(tmp_path / f".moved.old-{1:032x}")  # killed between two renames
    with publish.publication(tmp_path / "busy", {}) as fresh:
        publish.clean_all(tmp_path)
        assert fresh.is_dir()
        with pytest.raises(ModelError, match="being saved already"):
            save(tmp_path / "busy", "second")
    assert {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")} == {"kept", "moved", "busy"}
    assert (tmp_path / "moved" / "file").read_text() == "moved"


def test_a_file_system_that_cannot_exchange_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "_exchange", lambda one, other: False)
    save(tmp_path / "m", "old")
    renames = []
    true_rename = Path.rename

    def rename(path: Path, target: Path) -> Path:
        renames.append(target)
        if len(renames) == 2:
            raise OSError(28, "No space left on device")
        return true_rename(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path / "m", "new")
    assert (tmp_path / "m" / "file").read_text() == "old"
    save(tmp_path / "m", "new")
    assert (tmp_path / "m" / "file").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"m", ".m.lock"}
