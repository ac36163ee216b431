"""A run that is killed, stopped or poisoned: what it leaves is whole, finite, and leads to the same adapter."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from nibble import jobs, publish
from nibble.errors import NibbleError
from nibble.lowbit import FORMATS
from nibble.tasks import finetune as task
from nibble.training import checkpoints
from nibble.training.recipe import OPTIMIZERS, SCHEDULERS
from nibble.training.watch import Watch
from nibble.transformers import AutoModelForCausalLM
from tests.support.learning import TOLD, digest, furnish, learn

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

    Through torch's own hooks: every forward of the model's body in training is one micro-batch.
    """
    seen = 0

    def poison(module: nn.Module, inputs: Any, output: Any) -> Any:
        nonlocal seen
        if type(module).__name__ != "Qwen2Model" or not module.training:
            return None
        seen += 1
        if seen != (step - 1) * parts + part:
            return None
        if what == "loss":
            output.last_hidden_state = output.last_hidden_state * value
        else:
            output.last_hidden_state.register_hook(lambda grad: grad * value)
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


@pytest.mark.parametrize("save_steps", [2, 3, 4])
def test_an_adapter_that_holds_what_is_no_number_is_never_kept(
    save_steps: int, learning: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = Watch.on_step_end

    def spoil(self: Watch, args: Any, state: Any, control: Any, **more: Any) -> Any:
        if state.global_step == 3:
            next(parameter for parameter in more["model"].parameters() if parameter.requires_grad).data[0, 0] = math.inf
        return ends(self, args, state, control, **more)

    monkeypatch.setattr(Watch, "on_step_end", spoil)
    with pytest.raises(NibbleError, match=r"not finite|stopped before"):
        learn(learning, save_steps=save_steps, eval_share=0.0)
    assert not (learning / "adapters").exists()
    [job] = jobs.list_jobs(learning)
    assert [one.step for one in checkpoints.whole(job.folder)] == ([2] if save_steps == 2 else [])


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


def test_a_run_that_no_longer_gets_better_stops_early_with_its_best_adapter(learning: Path) -> None:
    # So small a rate changes no loss that a float can hold: the first measurement stays the best.
    told = {"learning_rate": 1e-9, "eval_steps": 2, "early_stop": 2, "dropout": 0.0, "max_steps": 40, "save_steps": 40}
    result = learn(learning, **told)
    assert result["stopped_early"] and result["steps"] < 40
    [note] = [note for note in result["notes"] if "was the lowest" in note]
    best = int(re.search(r"step (\d+)", note)[1])
    assert result["steps"] == best + 4, "two measurements without a better loss"
    [job] = jobs.list_jobs(learning)
    assert digest(learning / "adapters" / "learnt") == digest(checkpoints.place(job.folder, best))
    said = publish.read_manifest(learning / "adapters" / "learnt")
    assert not said["partial"]


def test_a_run_that_is_killed_once_it_has_stopped_early_goes_no_step_further(learning: Path) -> None:
    told = {"learning_rate": 1e-9, "eval_steps": 2, "early_stop": 2, "dropout": 0.0, "max_steps": 40, "save_steps": 2}
    result = learn(learning, **told)
    whole = digest(learning / "adapters" / "learnt")
    [job] = jobs.list_jobs(learning)
    assert checkpoints.whole(job.folder)[-1].step == result["steps"]
    shutil.rmtree(learning / "adapters")
    again = task.run({**job.spec, "resume": True}, task.Silent(job.folder))
    assert (again["steps"], again["stopped_early"]) == (result["steps"], True)
    assert digest(learning / "adapters" / "learnt") == whole
    assert not publish.read_manifest(learning / "adapters" / "learnt")["partial"]


def test_a_run_does_not_go_on_with_other_data(learning: Path) -> None:
    learn(learning)
    [job] = jobs.list_jobs(learning)
    texts = learning / "texts.jsonl"
    texts.write_text(texts.read_text().replace("model", "modal"))
    with pytest.raises(NibbleError, match="has changed since step 12"):
        task.run({**job.spec, "resume": True}, task.Silent(job.folder))


@pytest.mark.parametrize(("scheduler", "optimizer"), zip(SCHEDULERS, OPTIMIZERS * 2, strict=True))
def test_every_scheduler_and_optimizer_goes_on_bit_for_bit(scheduler: str, optimizer: str, learning: Path) -> None:
    told = {"scheduler": scheduler, "optimizer": optimizer, "max_steps": 4, "save_steps": 2, "accumulation": 2}
    told |= {"max_grad_norm": 0.0, "eval_share": 0.0}
    learn(learning, **told, out="whole")
    learn(learning, **told, out="again")
    job = jobs.list_jobs(learning)[0]
    shutil.rmtree(checkpoints.place(job.folder, 4))
    spec = jobs.find(job.id, learning).spec
    result = task.run({**spec, "resume": True}, task.Silent(job.folder))
    assert "The run goes on from step 2." in result["notes"]
    assert digest(learning / "adapters" / "again") == digest(learning / "adapters" / "whole")


def test_epochs_count_passes_over_what_is_trained_on(learning: Path) -> None:
    result = learn(learning, epochs=2.0, eval_share=0.1, batch_size=4)
    assert result["steps"] == math.ceil(2 * 27 / 4)


def test_packed_rows_are_trained_on(learning: Path) -> None:
    result = learn(learning, packing=True, max_length=64, max_steps=3)
    assert any("are packed into" in note for note in result["notes"])


def test_a_cpu_does_not_train_in_float16_and_says_so(learning: Path) -> None:
    result = learn(learning, dtype="float16", max_steps=1)
    assert any("A CPU does not train in float16; bfloat16 is used instead." in note for note in result["notes"])


def test_too_little_memory_is_a_sentence(learning: Path) -> None:
    def full(module: nn.Module, inputs: Any, output: Any) -> None:
        if type(module).__name__ == "Qwen2Model" and module.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    handle = register_module_forward_hook(full)
    try:
        with pytest.raises(
            NibbleError, match="A step did not fit into the memory of the cpu. Try a smaller batch_size"
        ):
            learn(learning, dry_run=True, keep=False)
    finally:
        handle.remove()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_lora_trains_on_bf16_and_qlora_on_every_format(method: str, learning: Path) -> None:
    formats = [name for name, row in FORMATS.items() if row.quantized] if method == "qlora" else ["nf4"]
    for low_bit in formats:
        result = learn(learning, method=method, low_bit=low_bit, max_steps=2, save_steps=2, learning_rate=0.01)
        said = publish.read_manifest(learning / "adapters" / "learnt")
        assert said["base"]["format"] == ("bf16" if method == "lora" else low_bit)
        assert all(math.isfinite(result[key]) for key in ("loss_first", "loss_last", "eval_loss"))


def test_a_base_that_is_packed_already_is_trained_on_as_it_is(learning: Path) -> None:
    folder = learning / "models" / "tiny"
    AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True).save_low_bit(learning / "models" / "packed")
    result = learn(learning, model="packed", max_steps=2)
    assert "packed is packed as sym_int4 already and is trained on in this form." in result["notes"]
    assert publish.read_manifest(learning / "adapters" / "learnt")["base"]["format"] == "sym_int4"


@pytest.mark.full
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        ["accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"],
    ],
)
def test_the_same_run_starts_under_torchrun_and_accelerate(launcher: list[str], learning: Path) -> None:
    told = {**TOLD, "model": "tiny", "data": str(learning / "texts.jsonl"), "dtype": "float32", "dropout": 0.0}
    told |= {"device": "cpu", "home": str(learning)}
    run_yaml = learning / "run.yaml"
    run_yaml.write_text(yaml.safe_dump({**told, "out": "shared"}), encoding="utf-8")
    command = [sys.executable, "-m", *launcher, "-m", "nibble.tasks.finetune", str(run_yaml)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    learn(learning, dropout=0.0, out="alone")
    shared, alone = (publish.read_manifest(learning / "adapters" / name)["losses"] for name in ("shared", "alone"))
    assert shared == pytest.approx(alone, rel=1e-4)

    # The run.yaml of that job goes on in its folder: here from the end, so that it only publishes again.
    [job] = [job for job in jobs.list_jobs(learning) if job.spec["out"] == "shared"]
    shutil.rmtree(checkpoints.place(job.folder, 12))
    command[-1] = str(job.folder / "run.yaml")
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert jobs.find(job.id, learning).status.attempt == 2
    assert "The run goes on from step 9." in jobs.find(job.id, learning).status.result["notes"]
