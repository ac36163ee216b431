"""The Fine-tune tab as a script sees it, and its pure parts: form, tokens, curves, console lines. Scripted host."""

import argparse
import importlib
import shlex
import time
from collections.abc import Iterator
from dataclasses import fields
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

import app
from finetune_ui import after, forms, view
from finetune_ui.curves import MOST_POINTS, by_step, curve
from finetune_ui.view import Say
from nibble import jobs
from nibble.config import Settings
from nibble.errors import NibbleError
from nibble.hosting import MOST_UPLOAD, upload_refusal
from nibble.training.recipe import NAMES, Recipe
from nibble.wishes import Compare, Merge
from nibble.words import LANGUAGES
from parts.console import command
from parts.joblist import joblist
from tests.scripted import ScriptedHost
from tests.serving import page
from tests.support.waiting import until

SAY = Say("en")
HOSTILE = "<img src=x onerror=alert(1)>\"'${1+1}{{x}}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    with page(home, ScriptedHost()) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    made = Client(url, verbose=False)
    yield made
    made.close()


# As a script sees it.


def test_a_file_is_uploaded_looked_at_and_tried_for_two_steps(
    client: Client, home: Path, tmp_path: Path, guide_model: Path
) -> None:
    """The real jobs, on the real guide."""
    path = tmp_path / "talk.jsonl"
    path.write_text('{"q": "Who are you?", "a": "A nibble."}\n' * 40, encoding="utf-8")
    columns = {"prompt": "q", "completion": "a"}
    seen = client.predict(file=handle_file(path), columns=columns, api_name="/preview_data")
    assert seen["ok"] and seen["detection"]["form"] == "prompt"
    sample = seen["samples"][0]
    learnt = "".join(piece["text"] for piece in sample["pieces"] if piece["trained"])
    assert learnt.startswith("A nibble.") and "Who" not in learnt and sample["ends"]
    assert (home / "data" / "talk.jsonl").exists()
    settings = {"columns": columns, "r": 4, "dropout": 0}
    job = client.predict("guide", "talk", settings=settings, max_steps=3, batch_size=2, api_name="/dry_run")
    assert job["state"] in jobs.LIVE and job["spec"]["dry_run"] and job["spec"]["r"] == 4

    def ended() -> dict[str, Any] | None:
        time.sleep(0.3)
        found = next(item for item in client.predict(api_name="/jobs") if item["id"] == job["id"])
        return found if found["state"] in jobs.FINAL else None

    done = until(ended, 240)
    assert (done["state"], done["cause"]) == ("done", "")
    assert done["result"]["seconds_per_step"] > 0 and done["result"]["fits"] is True
    assert "It fits" in view.dry(done, changed=False, say=SAY)
    assert not (home / "adapters").exists()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"data": "/etc/passwd"}, "no data set"),
        ({"data": "../guide/data/quotes.jsonl"}, "no data set"),
        ({"model": "../x"}, "x"),
        ({"file": {"path": "/etc/passwd"}}, "not an upload"),
        ({"file": {"path": 7}}, "not an upload"),
        ({"settings": {"paths": True}}, "paths"),
        ({"settings": {"data": "~/x.jsonl"}}, "no data set"),
        ({"max_steps": -1}, "max_steps"),
        ({"low_bit": "int3"}, "int3"),
    ],
    ids=str,
)
@pytest.mark.parametrize("endpoint", ["/finetune", "/dry_run"])
def test_an_endpoint_refuses_in_a_sentence_and_takes_no_path(
    client: Client, home: Path, endpoint: str, values: dict[str, Any], says: str
) -> None:
    before = len(jobs.list_jobs(home))
    with pytest.raises(AppError, match=says) as caught:
        client.predict(**values, api_name=endpoint)
    assert "Traceback" not in str(caught.value)
    assert len(jobs.list_jobs(home)) == before


def test_a_forged_upload_leads_nowhere(url: str, home: Path) -> None:
    """What gradio_client would not send."""
    forged = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    names = ["", "", forged, None, "", None, None, None, ""]
    reply = httpx.post(f"{url}/gradio_api/call/finetune", json={"data": names})
    events = httpx.get(f"{url}/gradio_api/call/finetune/{reply.json()['event_id']}", timeout=30).text
    assert "event: error" in events and "root:" not in events
    assert not (home / "data" / "passwd").exists()


def test_uploads_are_limited_and_public_mode_takes_none(url: str, tmp_path: Path) -> None:
    assert upload_refusal(b"1000") == (200, "")
    assert upload_refusal(b"")[0] == 411 and upload_refusal(b"x")[0] == 411
    assert upload_refusal(b"%d" % (2 * MOST_UPLOAD))[0] == 413
    address = "gradio_api/upload"
    assert httpx.post(f"{url}/{address}", files={"files": ("a.jsonl", b"{}")}).status_code == 200
    with page(tmp_path, public=True) as public:
        assert httpx.post(f"{public}/{address}", files={"files": ("a.jsonl", b"{}")}).status_code == 404


def test_public_mode_has_a_sentence_in_place_of_the_tab(tmp_path: Path) -> None:
    built = app.build_app(Settings(public=True, home=str(tmp_path)), ScriptedHost())
    registered = {str(fn.api_name) for fn in built.fns.values()}
    assert not registered & {"finetune", "dry_run", "preview_data", "merge", "compare", "compare_report"}
    assert "finetune-page" not in str(built.get_config_file()["components"])


# The form.


def test_every_setting_has_one_field_with_its_words_and_default() -> None:
    grouped = [name for names in forms.GROUPS.values() for name in names]
    assert sorted([*forms.ELSEWHERE, *forms.SIMPLE, *grouped]) == sorted(NAMES)
    for language in LANGUAGES:
        shown = view.form(Say(language))
        for name in [*forms.SIMPLE, *grouped]:
            assert shown.count(f"data-field='{name}'") == 1
    assert forms.problems(forms.settings("guide", "quotes", {}, False, forms.defaults())) == {}
    recipe = Recipe(**forms.from_yaml(forms.as_yaml(forms.settings("guide", "quotes", {}, False, forms.defaults()))))
    assert recipe == Recipe()


def test_a_setting_that_cannot_be_is_told_beside_its_field() -> None:
    written = forms.defaults() | {"learning_rate": "2e-4", "r": "many", "max_steps": "0", "warmup_steps": ""}
    told = forms.settings("guide", "quotes", {}, False, written)
    found = forms.problems(told)
    assert found.keys() == {"r", "max_steps"} and "whole number" in found["r"]
    assert told["warmup_steps"] == Recipe().warmup_steps
    assert forms.problems(told | {"low_bit": "bf16", "method": "lora"}).keys() == {"r", "max_steps"}


def test_the_form_is_saved_and_opened_again() -> None:
    written = forms.defaults() | {"learning_rate": "0.001", "targets": "all-linear", "packing": True, "out": "mine"}
    told = forms.settings("guide", "talk", {"text": "quote"}, True, written)
    opened = forms.from_yaml(forms.as_yaml(told))
    assert (opened["columns"], opened["leave_out"], opened["data"]) == ({"text": "quote"}, True, "talk")
    assert forms.fill(opened) == written
    of_a_job = yaml.safe_dump({"task": "finetune", "spec": opened | {"home": "/x", "paths": True}, "created": 1.0})
    assert forms.from_yaml(of_a_job) == opened
    assert forms.shown(0.000123456789) == "0.000123456789" and forms.shown(2e-4) == "0.0002"
    nine = [f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in pairwise("abcdefghi")]
    bomb = "a: &a [x,x,x,x,x,x,x,x]\n" + "".join(nine)
    twice = "model: guide\nmodel: other"
    for bad in (
        "", "[1]", "a: b", "x: [", "r: many\nmodel: guide", "&a [*a]", "model: " + "[" * 10_000, twice,
        bomb + "model: guide\nr: *i",
    ):  # fmt: skip
        with pytest.raises(NibbleError):
            forms.from_yaml(bad)


@pytest.mark.parametrize("values", [None, [], "x", {"r": object()}, {"home": "/"}, {"r": []}])
def test_a_form_that_no_page_sends_is_a_sentence(values: Any) -> None:
    told = forms.settings(None, 7, ["x"], "yes", values)
    assert set(told) <= set(NAMES)
    assert isinstance(forms.problems(told), dict)


# The console.


def test_a_console_line_says_what_the_form_says() -> None:
    told = forms.settings(
        "guide", "talk set", {"prompt": "q", "completion": "a b"}, True,
        forms.defaults() | {"r": "4", "targets": "all-linear", "packing": True, "gradient_checkpointing": False},
    )  # fmt: skip
    spec = Recipe(**told).as_spec() | {"dry_run": True, "home": "/h", "config": "/c.yaml", "device": "cpu"}
    module = importlib.import_module("nibble.commands.finetune")
    parser = argparse.ArgumentParser(exit_on_error=False)
    module.configure(parser)
    for name in ("--home", "--config", "--device"):
        parser.add_argument(name)
    read = parser.parse_args(shlex.split(command("finetune", spec))[4:])
    assert (read.model, read.data, read.dry_run, read.home) == ("guide", "talk set", True, "/h")
    assert (read.r, read.targets, read.packing, read.gradient_checkpointing) == ("4", "all-linear", True, False)
    assert read.columns == "prompt=q, completion=a b" and read.max_steps is None
    assert command("finetune", Recipe().as_spec()) == "python -m nibble finetune --base guide --data quotes"


def test_the_lines_of_what_comes_after_are_taken_by_the_console() -> None:
    wishes = {
        "merge": Merge("mine", "out", ["sym_int4", "nf4"]).spec(),
        "compare": Compare("mine", checkpoints=[100, 200], prompts=["One?", "Two?"], max_new_tokens=8).spec(),
    }
    for task, spec in wishes.items():
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(f"nibble.commands.{task}").configure(parser)
        read = vars(parser.parse_args(shlex.split(command(task, spec))[4:]))
        assert "mine" in read.values()
    assert (read["checkpoints"], read["prompt"], read["max_new_tokens"]) == ("100,200", ["One?", "Two?"], 8)


# What is shown.

PIECES = [{"text": "Who", "ids": [1], "trained": False}, {"text": " I\n", "ids": [2], "trained": True}]
SAMPLE = {
    "row": 3, "pieces": PIECES, "tokens": 2, "trained": 1, "truncated": False, "ends": True, "begins": 1, "cut": False,
}  # fmt: skip
SEEN = {
    "ok": True, "unit": "line", "problems": [], "samples": [SAMPLE], "tokens": 1_200, "trained_tokens": 900,
    "truncated": 3, "truncated_share": 0.25, "max_length": 512, "notes": [], "model_problem": "",
}  # fmt: skip


def test_tokens_are_marked_by_whether_they_are_trained() -> None:
    shown = view.trained(SEEN, SAY)
    assert "<span>Who</span>" in shown and "<span class=t> I<i>↵</i>" in shown
    for word in ("Line 3: 1 of 2 tokens trained", "learns to stop", "25.0 %", "One beginning-of-text", "900 of them"):
        assert word in unescape(shown)
    odd = view.trained(SEEN | {"samples": [SAMPLE | {"ends": False, "begins": 2, "truncated": True}]}, SAY)
    assert "begins with 2" in odd and "Cut at the longest" in odd
    assert "cannot be used" in view.trained(SEEN | {"model_problem": "It cannot be used."}, SAY)


def test_the_curves_are_those_of_the_rows() -> None:
    rows = [
        {"t": 1, "step": 2, "loss": 2.0, "learning_rate": 1e-4}, {"step": 2, "eval_loss": 3.0}, {"step": "x"}, {},
        {"step": 4, "loss": None}, {"step": 4, "loss": 1.0}, {"step": 2, "loss": 1.5}, {"step": True, "loss": 9.0},
    ]  # fmt: skip
    steps = by_step(rows)
    assert [(row["step"], row["loss"]) for row in steps] == [(2.0, 1.5), (4.0, 1.0)]
    assert curve(steps, {"loss": "a", "eval_loss": "b"}) == [(2.0, 1.5, "a"), (4.0, 1.0, "a"), (2.0, 3.0, "b")]
    many = curve([{"step": float(n), "loss": 1.0} for n in range(10_001)], {"loss": "a"})
    assert len(many) <= MOST_POINTS + 1 and (many[0][0], many[-1][0]) == (0.0, 10_000.0)


JOB = {
    "id": "20261126-120000-finetune-abcd", "task": "finetune", "state": "running", "cause": "", "note": "",
    "started": 1.0, "created": 1.0, "elapsed_s": 10.0, "log_end": [], "result": None,
    "spec": Recipe().as_spec() | {"out": "mine"},
    "progress": {"done": 50, "total": 200, "unit": "step", "stage": "train", "speed": 2.0, "seconds_left": 75.0},
}  # fmt: skip
RESULT = {
    "name": "mine", "adapter": "mine", "steps": 200, "loss_first": 2.0, "loss_last": 1.0, "eval_loss": 1.5,
    "eval_loss_before": 2.5, "seconds_per_step": 0.5, "peak_memory_bytes": 5e8, "notes": ["so"],
    "checkpoints": [{"step": 100, "folder": "x"}, {"step": 200, "folder": "y"}],
}  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_run_tells_how_far_it_is_and_what_it_has_come_to(language: Any) -> None:
    say = Say(language)
    shown = joblist([JOB], "", "", say)
    assert "50/200" in shown and "data-act='stop'" in shown
    assert "25 %" in view.runs([JOB], "", say)
    done = JOB | {"state": "done", "result": RESULT}
    assert "2.000 → 1.000" in view.result(done, say) and "2.00 → 1.00" in view.runs([done], done["id"], say)
    assert after.checkpoints(done) == [100, 200] and after.checkpoints(None) == []


def test_nothing_of_a_file_or_a_model_reaches_the_page_unescaped() -> None:
    report = {
        "ok": False, "rows": 1, "usable": 0, "characters": 0, "complete": True, "first": [{HOSTILE: HOSTILE}],
        "detection": {"why": HOSTILE, "form": "text", "columns": {"text": HOSTILE}, "found": [HOSTILE], "given": True},
        "problems": [{"fatal": True, "sentence": HOSTILE}],
    }  # fmt: skip
    sample = SAMPLE | {"pieces": [{"text": HOSTILE, "ids": [1], "trained": True}]}
    answers = [{"text": HOSTILE, "tokens": 1, "finish_reason": "length"}]
    compared = {
        "base": HOSTILE, "adapter": HOSTILE, "prompts": [HOSTILE], "heldout": {"why": HOSTILE, "samples": 0},
        "subjects": [{"name": HOSTILE, "step": None, "loss": 1.0, "answers": answers}],
    }  # fmt: skip
    job = JOB | {
        "state": "done", "result": RESULT | {"name": HOSTILE, "notes": [HOSTILE]},
        "spec": {"model": HOSTILE, "data": HOSTILE, "out": HOSTILE},
    }  # fmt: skip
    parts = [
        view.found(report, SAY), view.mapper(report, SAY), view.trained(SEEN | {"samples": [sample]}, SAY),
        view.trained(SEEN | {"model_problem": HOSTILE}, SAY), view.trained(SEEN | {"notes": [HOSTILE]}, SAY),
        view.runs([job], "", SAY), view.result(job, SAY), joblist([job], job["id"], HOSTILE, SAY),
        after.report(compared, SAY),
    ]  # fmt: skip
    for part in parts:
        assert "<img" not in part and "\"'" not in part
        assert HOSTILE.split("=")[0].strip("<") in unescape(part)


def test_a_field_of_a_recipe_is_in_the_console_s_parser() -> None:
    parser = argparse.ArgumentParser()
    importlib.import_module("nibble.commands.finetune").configure(parser)
    known = {action.dest for action in parser._actions}
    assert {item.name for item in fields(Recipe)} <= known
