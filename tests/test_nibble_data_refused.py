"""The broken data sets of `test_nibble_data_broken`, sent the ways that a person sends them: none starts a run."""

import functools
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nibble.__main__ import main
from nibble.data import ColumnMap
from nibble.errors import NibbleError
from nibble.tasks import finetune
from tests.support.downloads import Told
from tests.test_nibble_data_broken import BREAKS, SEEDS, Broken

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[1]
CONSOLE = random.Random(4).sample([name for name in BREAKS if name != "10 MB"], 20)


def write(folder: Path, name: str, seed: int) -> tuple[Path, Broken]:
    broken = BREAKS[name](random.Random(f"{name} {seed}"))
    path = folder / f"set{seed}{broken.suffix}"
    path.write_bytes(broken.content)
    return path, broken


def columns(broken: Broken) -> dict[str, str]:
    return dict((broken.mapping or ColumnMap()).columns)


@pytest.mark.parametrize("name", BREAKS)
def test_the_task_refuses_every_one(
    name: str, tmp_path: Path, home: Path, guide_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nibble.training import session

    monkeypatch.setattr(session, "open_reader", _reader(session.open_reader))
    monkeypatch.setattr(session, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    for seed in range(1 if name == "10 MB" else SEEDS):
        path, broken = write(tmp_path, name, seed)
        if broken.mapping and broken.mapping.form:
            continue  # a recipe names columns, and no form
        spec = {"data": str(path), "columns": columns(broken), "paths": True, "home": str(home), "device": "cpu"}
        with pytest.raises(NibbleError) as told:
            finetune.run(spec, Told())
        assert re.search(broken.names, told.value.message), f"seed {seed}: {told.value}"
    assert not home.exists()


READERS: dict[Any, Any] = {}


def _reader(open_reader: Any) -> Any:
    """The guide's reader, opened once: each data set gets one of its own length."""

    @functools.wraps(open_reader)
    def opened(*given: Any, **named: Any) -> Any:
        key = (given, tuple(named.items()))
        if key not in READERS:
            READERS[key] = open_reader(*given, **named)
        return READERS[key]

    return opened


@pytest.mark.parametrize("name", CONSOLE)
def test_the_console_s_command_refuses_it(
    name: str, tmp_path: Path, home: Path, guide_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, broken = write(tmp_path, name, 0)
    said = [f"--columns={','.join('='.join(pair) for pair in columns(broken).items())}"] if columns(broken) else []
    assert main(["finetune", "--data", str(path), "--home", str(home), *said]) == 1
    told = capsys.readouterr()
    assert re.search(broken.names, told.err) and "Traceback" not in told.err and not told.out
    assert not home.exists()


def test_a_console_of_its_own_says_it_in_two_lines(tmp_path: Path, home: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"text": "one"}\n{"text": 2}\n')
    command = [sys.executable, "-m", "nibble", "finetune", "--data", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 2
    assert "Line 2 of set.jsonl" in done.stderr and not home.exists()


def test_what_only_tokens_tell_is_refused_before_a_run_too(
    tmp_path: Path, home: Path, guide_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "%s", "completion": "yes"}\n' % ("why " * 200))
    assert main(["finetune", "--data", str(path), "--home", str(home), "--max-length", "32"]) == 1
    assert "begins beyond the longest sample" in capsys.readouterr().err and not home.exists()
