"""The task `finetune` on the console: an adapter that any PEFT can use, and what is refused before a start."""

import io
import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nibble import adapters, jobs, publish
from nibble.errors import NibbleError
from nibble.training import checkpoints


def finetune(home: Path, keep: bool = True, **spec: object) -> dict:
    """The task to its end, in this process."""
    given = {"home": str(home), "device": "cpu", "paths": True, **spec}
    return jobs.run_foreground("finetune", given, home=home, keep=keep, stream=io.StringIO())


def test_an_adapter_of_the_guide_is_in_pefts_own_form(guide_model: Path, home: Path) -> None:
    result = finetune(home, max_steps=3, save_steps=2, logging_steps=1, warmup_steps=0, eval_share=0.01)
    folder = home / "adapters" / "guide-quotes"
    assert (result["name"], result["adapter"], result["folder"]) == ("guide-quotes", "guide-quotes", str(folder))
    assert result["steps"] == 3 and not result["stopped_early"]
    assert [row["step"] for row in result["checkpoints"]] == [2, 3]
    publish.verify(folder, contents=True)

    said = publish.read_manifest(folder)
    assert said["kind"] == "adapter" and said["partial"] is False
    assert (said["base"]["name"], said["base"]["format"], said["base"]["family"]) == ("guide", "nf4", "qwen2")
    assert said["base"]["fingerprint"] == adapters.fingerprint(guide_model)
    assert adapters.base_folder(adapters.read(folder), home) == guide_model
    assert said["losses"]["first"] == result["loss_first"] and said["losses"]["eval"] == result["eval_loss"]
    assert result["eval_loss"] < result["eval_loss_before"]

    base = AutoModelForCausalLM.from_pretrained(guide_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert said["stop_token_id"] == tokenizer.eos_token_id
    inputs = tokenizer("The paradox of time", return_tensors="pt")
    with torch.no_grad():
        before = base(**inputs).logits
        after = peft.PeftModel.from_pretrained(base, folder)(**inputs).logits
    assert not torch.equal(before, after)

    [job] = jobs.list_jobs(home)
    assert (job.state, job.progress.stage) == ("done", "save")
    rows = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3]
    assert all({"loss", "learning_rate", "epoch", "grad_norm"} <= row.keys() for row in trained)
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 3]
    assert [found.step for found in checkpoints.whole(job.folder)] == [2, 3]
    assert all(checkpoints.verify(found.folder) for found in checkpoints.whole(job.folder))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"targets": ["nothing_here"]}, "its linear layers are: q_proj, k_proj, v_proj, o_proj, gate_proj"),
        ({"out": "guide"}, "cannot be an adapter's name"),
        ({"data": "none"}, "none"),
        ({"model": "none"}, "There is no model or folder 'none'"),
        ({"columns": {"text": "nowhere"}}, "nowhere"),
    ],
)
def test_what_cannot_be_is_a_sentence_and_keeps_nothing(spec: dict, says: str, guide_model: Path, home: Path) -> None:
    with pytest.raises(NibbleError, match=says):
        finetune(home, max_steps=1, **spec)
    assert not (home / "adapters").exists()


def test_a_dry_run_measures_and_keeps_nothing(guide_model: Path, home: Path) -> None:
    result = finetune(home, keep=False, dry_run=True, max_steps=50)
    assert result["dry_run"] and result["steps"] == 50
    # What is held out is measured besides.
    assert result["total_s"] > 50 * result["seconds_per_step"]
    assert result["samples"] == 418 and result["trained_tokens"] > 1000
    assert 0 < result["trainable_parameters"] < 200_000
    assert result["parameters"] > 13_000_000 and result["fits"]
    assert not (home / "adapters").exists() and not jobs.list_jobs(home)
    alone = finetune(home, keep=False, dry_run=True, max_steps=50, eval_share=0.0)
    assert alone["total_s"] == pytest.approx(50 * alone["seconds_per_step"])
