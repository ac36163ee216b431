"""The task `compare`: base, tuned and checkpoints on one loaded base; the report as JSON and as a page."""

import argparse
import io
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from nibble import jobs, publish
from nibble.commands import compare as command
from nibble.comparing import bench, page, table
from nibble.comparing import order as ordering
from nibble.comparing.attach import attached
from nibble.comparing.order import PROMPTS
from nibble.config import load_settings
from nibble.data import find
from nibble.errors import ConfigError, ModelError, NibbleError
from nibble.training import learner
from nibble.transformers import AutoModelForCausalLM

FEW = {"tokens": 200, "max_new_tokens": 8, "device": "cpu"}
WEIGHTS = "adapter_model.safetensors"


def finetune(home: Path, **spec: object) -> dict:
    given = {"home": str(home), "device": "cpu", "warmup_steps": 0, "batch_size": 2, **spec}
    return jobs.run_foreground("finetune", given, home=home, keep=True, stream=io.StringIO())


def compare(home: Path, keep: bool = False, **spec: object) -> dict:
    given = {"home": str(home), **FEW, **spec}
    return jobs.run_foreground("compare", given, home=home, keep=keep, stream=io.StringIO())


@pytest.fixture(scope="module")
def tuned(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a small model, an adapter of it trained for six steps on the quotes, and its run."""
    home = tmp_path_factory.mktemp("tuned")
    shutil.copytree(stories, home / "models" / "stories")
    spec = {"model": "stories", "data": "quotes", "low_bit": "sym_int8", "max_steps": 6, "save_steps": 2}
    finetune(home, **spec, logging_steps=2, learning_rate=1e-2, eval_share=0.02)
    return home


def run_of(home: Path) -> str:
    return next(job.id for job in jobs.list_jobs(home) if job.task == "finetune")


def adapter_of(home: Path, name: str, change: object = None) -> str:
    """A copy of the tuned adapter under another name, its weights changed by a function."""
    source, folder = home / "adapters" / "stories-quotes", home / "adapters" / name
    facts = {key: value for key, value in publish.read_manifest(source).items() if key != "files"}
    with publish.publication(folder, facts) as fresh:
        for path in source.iterdir():
            if path.name not in (publish.MANIFEST, WEIGHTS):
                (fresh / path.name).write_bytes(path.read_bytes())
        weights = load_file(source / WEIGHTS)
        save_file({key: change(key, value) for key, value in weights.items()}, fresh / WEIGHTS)  # type: ignore[operator]
    return name


def test_base_checkpoints_and_tuned_stand_side_by_side(tuned: Path) -> None:
    found = compare(tuned, keep=True, adapter="stories-quotes", checkpoints="all")
    assert (found["base"], found["format"], found["adapter"]) == ("stories", "sym_int8", "stories-quotes")
    # The last checkpoint is the adapter itself.
    assert [subject["name"] for subject in found["subjects"]] == ["base", "step 2", "step 4", "tuned"]
    assert found["prompts"] == list(PROMPTS) and found["sampling"] == {"seed": 42, "max_new_tokens": 8}
    assert not found["chat"] and "running text" in found["chat_why"]

    losses = [subject["loss"] for subject in found["subjects"]]
    assert found["heldout"] == {"data": "quotes", "samples": 9, "why": ""}
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
    # What training measured on the same samples, but for the order in which they are padded.
    for subject in found["subjects"]:
        assert subject["loss"] == pytest.approx(subject["recorded_loss"], rel=2e-3)
    base, *others = found["subjects"]
    assert (base["kl_mean"], base["top1"]) == (0.0, 1.0)
    assert all(subject["kl_mean"] > 0 and math.isfinite(subject["perplexity"]) for subject in others)
    assert found["neutral"]["tokens"] == 200
    for subject in found["subjects"]:
        assert len(subject["answers"]) == 3
        assert all(0 <= answer["tokens"] <= 8 for answer in subject["answers"])
    assert base["answers"] != found["subjects"][-1]["answers"]

    job = next(job for job in jobs.list_jobs(tuned) if job.task == "compare")
    assert (job.state, job.progress.stage, job.progress.done) == ("done", "compare", job.progress.total)
    assert [row["subject"] for row in job.metrics()] == [0, 1, 2, 3]
    assert [row["loss"] for row in job.metrics()] == pytest.approx(losses)
    assert json.loads((job.folder / "compare.json").read_text()) == found == job.status.result
    assert (job.folder / found["html"]).read_text() == page.render(found)


def test_the_same_twice_is_the_same_and_a_run_is_its_adapter(tuned: Path) -> None:
    spec = {"prompts": ["Time is"], "temperature": 1.5, "seed": 7}
    first, again = (compare(tuned, adapter="stories-quotes", **spec) for _ in range(2))
    by_run = compare(tuned, run=run_of(tuned), **spec)
    for found in (first, again, by_run):
        del found["measured"]
    assert first == again == by_run


def test_an_adapter_that_changes_nothing_shows_no_difference(tuned: Path) -> None:
    name = adapter_of(tuned, "nothing", lambda key, value: torch.zeros_like(value) if "lora_B" in key else value)
    base, same = compare(tuned, adapter=name)["subjects"]
    for key in ("loss", "perplexity", "kl_mean", "kl_p95", "top1", "answers"):
        assert base[key] == same[key], key


def test_a_run_without_an_adapter_is_compared_by_its_checkpoints(tuned: Path) -> None:
    run, folder = run_of(tuned), tuned / "adapters" / "stories-quotes"
    away = folder.rename(tuned / "away")
    try:
        found = compare(tuned, run=run, checkpoints="2")
    finally:
        away.rename(folder)
    assert [subject["name"] for subject in found["subjects"]] == ["base", "step 2", "step 6"]
    for subject in found["subjects"][1:]:
        assert subject["loss"] == pytest.approx(subject["recorded_loss"], rel=2e-3)


def test_chat_data_puts_prompts_through_the_template(guide_model: Path, tmp_path: Path) -> None:
    finetune(tmp_path, data="instructions", max_steps=1, eval_share=0, out="chatty")
    found = compare(tmp_path, adapter="chatty", prompts=["Who are you?"], max_new_tokens=24)
    assert found["chat"] and "chat template" in found["chat_why"]
    assert found["heldout"]["samples"] == 0 and "eval_share was 0" in found["heldout"]["why"]
    assert found["subjects"][0]["loss"] is None
    assert "guide" in found["subjects"][0]["answers"][0]["text"]
    assert "-" in table.rows(found)[1]


def test_a_base_alone_can_be_looked_at(tuned: Path) -> None:
    found = compare(tuned, model="stories", low_bit="sym_int5", prompts=["Once upon a time"])
    assert [subject["name"] for subject in found["subjects"]] == ["base"]
    assert (found["format"], found["adapter"]) == ("sym_int5", "")
    assert not found["chat"] and "Nothing was trained" in found["heldout"]["why"]
    assert found["subjects"][0]["answers"][0]["text"].startswith(", there was")


def test_an_adapter_leaves_no_trace(guide_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(guide_model, load_in_low_bit="sym_int8").eval()
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        before = model(ids).logits
    names = list(model.state_dict())
    config = peft.LoraConfig(
        target_modules=["q_proj"], bias="all", modules_to_save=["norm"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    other = AutoModelForCausalLM.from_pretrained(guide_model, load_in_low_bit="sym_int8")
    other = peft.get_peft_model(other, config)
    for name, parameter in other.named_parameters():
        if parameter.requires_grad and ("bias" in name or "norm" in name):
            parameter.data.add_(0.5)
    other.save_pretrained(tmp_path)
    with torch.inference_mode():
        wanted = other.eval()(ids).logits
        with attached(model, tmp_path):
            assert torch.equal(model(ids).logits, wanted)
        assert torch.equal(model(ids).logits, before)
    assert not torch.equal(before, wanted)
    assert list(model.state_dict()) == names


def test_adapters_that_do_not_belong_are_sentences(tuned: Path, guide_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(guide_model, load_in_low_bit="bf16")
    before = dict(model.named_modules())
    with (
        pytest.raises(ModelError, match="belongs to another model"),
        attached(model, tuned / "adapters/stories-quotes"),
    ):
        pytest.fail("it was put on")
    assert dict(model.named_modules()) == before

    renamed = tuned / "renamed"
    source = tuned / "adapters" / "stories-quotes"
    renamed.mkdir()
    for path in source.iterdir():
        (renamed / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "adapter_config.json").read_text())
    (renamed / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(ModelError, match="Only LoRA"), attached(model, renamed):
        pytest.fail("it was put on")
    for more in ({"init_lora_weights": "pissa_niter_4"}, {"alora_invocation_tokens": [1]}):
        (renamed / "adapter_config.json").write_text(json.dumps(config | more))
        with pytest.raises(ModelError, match="more than a sum on its base"), attached(model, renamed):
            pytest.fail("it was put on")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"adapter": "nowhere"}, "There is no adapter 'nowhere'. Adapters here: .*stories-quotes"),
        ({"adapter": "../models"}, "There is no adapter"),
        ({"run": "nowhere"}, "nowhere"),
        ({}, "told nothing to compare"),
        ({"adapter": "stories-quotes", "model": "stories"}, "told adapter and model"),
        ({"adapter": "stories-quotes", "checkpoints": [2, 3]}, "no checkpoint of step 3 .* Checkpoints here: 2, 4, 6"),
        ({"adapter": "stories-quotes", "checkpoints": "two"}, "It must be all, or steps"),
        ({"adapter": "stories-quotes", "prompts": ["  "]}, "cannot be a prompt"),
        ({"adapter": "stories-quotes", "prompts": ["x"] * 21}, "too many"),
        ({"adapter": "stories-quotes", "seed": "x"}, "seed is 'x'"),
        ({"adapter": "stories-quotes", "temperature": 99}, "temperature is 99"),
        ({"model": "stories", "checkpoints": "all"}, "has no checkpoints"),
        ({"adapter": "stories-quotes", "adaptor": 1}, "adaptor"),
    ],
)
def test_what_cannot_be_compared_is_a_sentence(tuned: Path, spec: dict, says: str) -> None:
    with pytest.raises(NibbleError) as caught:
        compare(tuned, **spec)
    assert re.search(says, str(caught.value)), str(caught.value)


def test_a_data_set_that_has_changed_is_told(tuned: Path) -> None:
    order = ordering.of_adapter(tuned / "adapters" / "stories-quotes", tuned)
    reader = learner.open_reader(order.base, 512)
    assert len(bench.heldout(order, reader, find).rows) == order.heldout["samples"] == 9
    changed = replace(order, heldout=order.heldout | {"samples": 3})
    found = bench.heldout(changed, reader, find)
    assert not found.rows and "quotes has changed since" in found.why
    other = bench.heldout(replace(order, heldout=order.heldout | {"digest": "0" * 64}), reader, find)
    assert not other.rows and "quotes has changed since" in other.why
    # What an adapter says of its data is foreign: a path is not followed.
    elsewhere = replace(order, heldout=order.heldout | {"data": "/etc/passwd"})
    found = bench.heldout(elsewhere, reader, find)
    assert not found.rows and "cannot be made again" in found.why and found.chat is False


def report_of(*texts: str) -> dict:
    answers = [{"text": text, "tokens": 3, "finish_reason": "length"} for text in texts]
    figures = {"loss": None, "perplexity": 2.0, "kl_mean": 0.1, "kl_p95": 0.2, "top1": 0.9, "step": None}
    return {
        "base": "b<b>", "format": "nf4", "device": "cpu", "dtype": "bfloat16", "adapter": "a\x00&", "run": "",
        "chat_why": "why", "prompts": ["<script>alert(1)</script>"], "sampling": {"seed": 1}, "versions": {"x": "1"},
        "heldout": {"samples": 0, "data": "", "why": "none"}, "neutral": {"tokens": 1, "name": "n", "sha256": ""},
        "subjects": [{"name": name, **figures, "answers": [answer]}
                     for name, answer in zip(("base", "tuned"), answers, strict=True)],
    }  # fmt: skip


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_page_keeps_foreign_text_as_text() -> None:
    bad = '</div><script src="https://evil.example/x.js"></script><img src=x onerror=alert(1)>\u202egnp.exe\x07\ud800'
    written = page.render(report_of(bad, bad + "!"))
    tags = Tags()
    tags.feed(written)
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "img", "link", "iframe", "a", "form", "b"}
    assert not {key for _, attributes in tags.seen for key in attributes if key.startswith("on")}
    assert not {"src", "href"} & {key for _, attributes in tags.seen for key in attributes}
    assert "default-src 'none'" in written and "url(" not in written and "@import" not in written
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ud800]", written)
    assert written.encode()
    assert "&lt;script&gt;" in written
    assert "light dark" in written and "width=device-width" in written


def test_what_is_the_bases_own_stands_back() -> None:
    written = page.render(report_of("the same start and end", "the same start"))
    assert '<span class="same">the same start</span>' in written
    same = page.render(report_of("equal", "equal"))
    assert "the same as the base" in same


def test_the_console_prints_and_writes_the_page(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def console(*argv: str) -> str:
        parser = argparse.ArgumentParser()
        parser.add_argument("--config", default=None)
        command.configure(parser)
        command.run(parser.parse_args(list(argv)), load_settings({"home": str(tuned), "device": "cpu"}))
        return capsys.readouterr().out

    html = tmp_path / "report.html"
    few = ["--tokens", "100", "--max-new-tokens", "4", "--prompt", "Time is"]
    found = json.loads(console("stories-quotes", "--checkpoints", "2", "--html", str(html), "--json", *few))
    shown = "\n".join(table.lines(found))
    assert re.search(r"^base +\d", shown, re.M) and re.search(r"^step 2 +\d", shown, re.M)
    assert "> Time is" in shown
    assert html.read_text() == page.render(found)
    with pytest.raises(ModelError, match="no adapter, run or model 'nowhere'"):
        console("nowhere")
    with pytest.raises(ConfigError):
        console("stories-quotes", "--checkpoints", "some")
