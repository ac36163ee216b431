"""A run that is killed, stopped or poisoned: what it leaves is whole, finite, and leads to the same adapter."""

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from nibble import jobs, publish
from nibble.errors import NibbleError
from nibble.training import checkpoints
from tests.support.learning import digest, furnish, learn

ROOT = Path(__file__).parents[1]


@pytest.fixture
def learning(home: Path, guide_model: Path) -> Path:
    """A home with a tiny model and its texts."""
    return furnish(home, guide_model)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model waits for a second thread longer than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def warm(action: str, guide: Path, place: Path, count: int) -> dict[str, Any]:
    """What the process of `tests.support.learning` found."""
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    command = [sys.executable, "-m", "tests.support.learning", action, str(guide), str(place), str(count), str(seed)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("count", [3, pytest.param(50, marks=[pytest.mark.full, pytest.mark.timeout(1800)])])
def test_killed_and_resumed_runs_end_with_the_unbroken_runs_adapter(
    count: int, tmp_path: Path, guide_model: Path
) -> None:
    ends = warm("kills", guide_model, tmp_path, count)
    print(ends)
    assert ends["equal"] == count and "different" not in ends


@contextmanager
def poisoned(step: int, part: int, parts: int, what: str, value: float) -> Iterator[None]:
    """Within it the loss or the gradient of one micro-batch of one step is no number.

    Through torch's own hooks: every forward of the output head in training is one micro-batch.
    """
    seen = 0

    def poison(module: nn.Module, inputs: Any, output: Any) -> Any:
        nonlocal seen
        if not (isinstance(module, nn.Linear) and module.out_features == 6144 and module.training):
            return None
        seen += 1
        if seen != (step - 1) * parts + part:
            return None
        if what == "loss":
            return output * value
        output.register_hook(lambda grad: grad * value)
        return output

    handle = register_module_forward_hook(poison)
    try:
        yield
    finally:
        handle.remove()


PLACES = [
    (step, part, parts, what, value)
    for parts, step, part in ((1, 1, 1), (1, 2, 1), (1, 6, 1), (1, 12, 1), (3, 2, 1), (3, 2, 2), (3, 2, 3), (2, 5, 2))
    for what, value in (("loss", math.nan), ("gradient", math.nan), ("gradient", math.inf))
][:20]
FEW = [PLACES[3], PLACES[7], PLACES[16]]


@pytest.mark.parametrize(
    ("step", "part", "parts", "what", "value"),
    [*FEW, *(pytest.param(*case, marks=pytest.mark.full) for case in PLACES if case not in FEW)],
)
def test_a_number_that_is_none_ends_the_run_at_its_step(
    step: int, part: int, parts: int, what: str, value: float, learning: Path
) -> None:
    told = {"accumulation": parts, "save_steps": 1, "eval_share": 0.0}
    with (
        poisoned(step, part, parts, what, value),
        pytest.raises(NibbleError, match=rf"The {what} became .* in step {step}, so the run stopped before"),
    ):
        learn(learning, **{**told, "save_steps": 4})
    assert not (learning / "adapters").exists()
    [job] = jobs.list_jobs(learning)
    assert job.state == "failed" and f"step {step}" in job.cause
    kept = checkpoints.whole(job.folder)
    if step == 1:
        assert not kept
        return
    assert kept[-1].step == step - 1 and checkpoints.verify(kept[-1].folder)
    for name in ("adapter_model.safetensors", "state.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(kept[-1].folder / name).values())
    learn(learning, **told)
    clean = next(job for job in jobs.list_jobs(learning) if job.state == "done")
    assert digest(kept[-1].folder) == digest(checkpoints.place(clean.folder, step - 1))


def test_only_the_newest_checkpoints_can_be_gone_on_from_and_all_hold_the_adapter(learning: Path) -> None:
    learn(learning)
    [job] = jobs.list_jobs(learning)
    found = checkpoints.whole(job.folder)
    assert [(one.step, one.resumable) for one in found] == [(3, False), (6, False), (9, True), (12, True)]
    assert all(checkpoints.verify(one.folder) for one in found)
    assert all((one.folder / "adapter_config.json").exists() for one in found)


def test_a_torn_checkpoint_is_passed_over_and_dropped(learning: Path) -> None:
    learn(learning)
    [job] = jobs.list_jobs(learning)
    newest, before = (checkpoints.place(job.folder, step) for step in (12, 9))
    for tear in (lambda path: os.truncate(path, 10), lambda path: path.write_bytes(b"x" * path.stat().st_size)):
        assert checkpoints.latest(job.folder).folder == newest
        kept = (newest / "state.json").read_bytes()
        tear(newest / "state.json")
        assert checkpoints.latest(job.folder).folder == before
        (newest / "state.json").write_bytes(kept)
    (newest / publish.MANIFEST).unlink()
    assert checkpoints.latest(job.folder).folder == before
    assert checkpoints.drop_broken(job.folder) == ["checkpoint-12"]
    assert not newest.exists()


def test_two_processes_have_the_losses_of_one(tmp_path: Path, guide_model: Path) -> None:
    found = warm("pair", guide_model, tmp_path, 2)
    assert found["runs"] == 2, "only the first process keeps a run"
    alone, together = found["1 rows"], found["2 rows"]
    assert len(alone) == len(together) >= 8
    for one, two in zip(alone, together, strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    assert found["2"] == pytest.approx(found["1"], rel=1e-4)
