"""The Models tab as a script sees it, and its pure parts: tables, report, jobs, console lines. The host is scripted."""

import asyncio
import re
import shlex
import time
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from hypothesis import given
from hypothesis import strategies as st

import app
from models_ui import forms, report, view
from models_ui.view import Say
from models_ui.widgets import build_widgets
from models_ui.wiring import Wiring
from nibble import jobs
from nibble.config import Settings
from nibble.errors import NibbleError
from nibble.lowbit.formats import FORMATS
from nibble.operator import Operator
from nibble.words import LANGUAGES
from parts import joblist
from parts.console import command
from parts.view import told
from tests.scripted import ScriptedHost
from tests.serving import page
from tests.support.hubs import Fault, Hubs
from tests.support.waiting import until

SAY = Say("en")
HOSTILE = "<img src=x onerror=alert(1)>\"'${1+1}{{x}}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(home: Path) -> Iterator[Client]:
    with page(home, ScriptedHost()) as address:
        made = Client(address, verbose=False)
        yield made
        made.close()


def ended(client: Client, job: dict[str, Any], seconds: float = 300.0) -> dict[str, Any]:
    """The job, once it has ended."""

    def look() -> dict[str, Any] | None:
        time.sleep(0.2)
        found = next(item for item in client.predict(api_name="/jobs") if item["id"] == job["id"])
        return found if found["state"] in jobs.FINAL else None

    return until(look, seconds)


def test_a_model_is_shrunk_listed_loaded_and_deleted(client: Client, home: Path, guide_model: Path) -> None:
    """The real job, on the real guide."""
    job = client.predict("guide", ["sym_int4", "nf4"], "mine", evaluate=False, api_name="/quantize")
    assert job["state"] in jobs.LIVE
    with pytest.raises(AppError, match="already"):
        client.predict("guide", "sym_int4,nf4", "mine", evaluate=False, api_name="/quantize")
    done = ended(client, job)
    assert (done["state"], done["cause"]) == ("done", "")
    assert [model["name"] for model in done["result"]["models"]] == ["mine-sym_int4", "mine-nf4"]
    assert isinstance(client.predict(job["id"], api_name="/job_log"), str)
    cards = {card["name"]: card for card in client.predict(api_name="/models")}
    assert (cards["mine-nf4"]["format"], cards["mine-nf4"]["problem"]) == ("nf4", "")
    (row,) = client.predict("mine-nf4", api_name="/estimates")
    assert row["format"] == "nf4" and row["fits"] and row["tokens_per_s"] > 0
    assert {row["format"] for row in client.predict("guide", api_name="/estimates")} >= {"sym_int4", "fp8_e5m2"}
    assert client.predict("mine-nf4", api_name="/report") == {}
    assert "mine-nf4 is loaded" in client.predict("mine-nf4", api_name="/load")
    with pytest.raises(AppError, match="is loaded"):
        client.predict("mine-nf4", api_name="/delete_model")
    client.predict("guide", api_name="/load")
    assert client.predict("mine-nf4", api_name="/delete_model")["bytes"] > 10_000_000
    assert "mine-nf4" not in [card["name"] for card in client.predict(api_name="/models")]


def test_a_cut_download_is_stopped_resumed_and_arrives(tmp_path: Path, hubs: Hubs) -> None:
    hubs.faults.append(Fault(r"GET .*safetensors", pause=0.3))
    with page(tmp_path / "home", ScriptedHost()) as address:
        client = Client(address, verbose=False)
        job = client.predict("org/tiny", name="small", api_name="/download")
        assert client.predict(job["id"], api_name="/stop_job")["state"] == "stopped"
        hubs.faults.clear()
        client.predict(job["id"], api_name="/resume_job")
        assert ended(client, job)["result"]["name"] == "small"
        job = client.predict("org/absent", api_name="/download")
        failed = ended(client, job)
        assert failed["state"] == "failed" and "org/absent" in failed["cause"]


@pytest.mark.parametrize("name", ["../x", "/etc", "~/x", "a/../b", "x" * 300, "", "./guide", 7, None, ["x"]])
@pytest.mark.parametrize("endpoint", ["/quantize", "/evaluate", "/download", "/delete_model", "/estimates", "/report"])
def test_no_endpoint_takes_a_path(client: Client, endpoint: str, name: object) -> None:
    before = len(client.predict(api_name="/jobs"))
    with pytest.raises(AppError) as caught:
        client.predict(name, api_name=endpoint)
    said = str(caught.value)
    assert "Traceback" not in said and "Something went wrong" not in said
    assert len(client.predict(api_name="/jobs")) == before


@pytest.mark.parametrize("job_id", ["../x", "", "20260101-000000-quantize-0000", 7, None, "x" * 300])
@pytest.mark.parametrize("endpoint", ["/job_log", "/stop_job", "/resume_job"])
def test_no_endpoint_takes_what_is_no_job(client: Client, endpoint: str, job_id: object) -> None:
    with pytest.raises(AppError) as caught:
        client.predict(job_id, api_name=endpoint)
    assert "Something went wrong" not in str(caught.value)


def test_a_visitor_says_neither_home_nor_settings_nor_paths(client: Client) -> None:
    for word in ("home", "config", "paths", "text", "hubs"):
        with pytest.raises(TypeError):
            client.predict("guide", **{word: "/etc"}, api_name="/quantize")
            pytest.fail(f"{word} was taken")


# The pure parts.


CARD = {
    "name": "mine", "family": "qwen2", "format": "nf4", "parameters": 13_400_000, "size_bytes": 12_000_000,
    "context": 2048, "problem": "", "kind": "model", "template": "tokenizer", "note": "", "base": "", "loaded": True,
    "estimate": {"format": "nf4", "disk_bytes": 1, "peak_bytes": 2e9, "steady_bytes": 1.5e9, "tokens_per_s": 31.4},
    "quality": {"format": "nf4", "kl_mean": 0.0123},
}  # fmt: skip
ROW = {
    "format": "nf4", "name": "mine", "perplexity": 2.7, "kl_mean": 0.0123, "kl_p95": 0.05, "top1": 0.97,
    "size_bytes": 12_000_000, "tokens_per_s": 31.4,
    "layers": [{"name": "model.layers.0", "format": "nf4", "error": 0.1}],
}  # fmt: skip
REPORT = {
    "model": "mine", "text": {"name": "shipped", "tokens": 4096, "sha256": "0"}, "device": "cpu",
    "reference": ROW | {"format": "bf16", "name": "guide", "kl_mean": 0.0, "top1": 1.0},
    "formats": [ROW, ROW | {"format": "sym_int8", "name": "guide", "kl_mean": 0.0004, "size_bytes": 19_000_000}],
}  # fmt: skip
JOB = {
    "id": "20261120-161502-quantize-ab12", "task": "quantize", "state": "running", "cause": "", "created": 0.0,
    "started": 1.0, "elapsed_s": 3.0, "result": None, "note": "", "spec": {"model": "guide", "low_bit": ["nf4"]},
    "progress": {"done": 12.0, "total": 28.0, "unit": "layers", "stage": "pack", "speed": 3.1, "seconds_left": 5.0},
}  # fmt: skip


def text_of(html: str) -> str:
    """What a person reads."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def test_the_library_tells_size_loss_memory_and_speed() -> None:
    shown = text_of(view.library([CARD], "mine", SAY))
    for word in ("mine", "loaded", "qwen2 · 13.4 M · nf4", "12.0 MB", "0.0123", "1.5 GB", "31"):
        assert word in shown


def test_the_formats_are_marked_by_what_fits() -> None:
    rows = [
        {"format": name, "disk_bytes": 1e9, "peak_bytes": 3e9, "steady_bytes": 2e9, "tokens_per_s": 0.0, "fits": fits}
        for name, fits in (("nf4", True), ("sym_int8", False))
    ]
    shown = view.formats(rows, REPORT, SAY)
    assert shown.count("<input type='checkbox'") == sum(row.quantized for row in FORMATS.values())
    assert shown.count("<tr class='fits'>") == 1 and shown.count("<tr class='too_large'>") == 1
    mixed = REPORT | {"formats": [ROW | {"overrides": {"lm_head": "sym_int8"}}]}
    assert "0.0123" in shown and "0.0123" not in view.formats(rows, mixed, SAY)
    assert "0.00040" in shown and "as it is stored" in view.formats(rows, {}, SAY, source=True)


def test_the_report_shows_every_format_beside_the_reference() -> None:
    shown = report.report(REPORT, "mine", SAY)
    for word in (
        "bf16",
        "reference",
        "nf4",
        "sym_int8",
        "2.700",
        "97.0 %",
        "4,096 tokens",
        "model.layers.0",
        "10.00 %",
    ):
        assert word in text_of(shown)
    assert shown.count("<circle") == 2 and shown.count("<g class='chosen'>") == 1
    assert "Not measured" in report.report({}, "mine", SAY)


@given(st.lists(st.tuples(st.floats(1e6, 1e12), st.floats(1e-9, 1e3)), min_size=2, max_size=14))
def test_the_chart_stays_in_its_frame_and_names_do_not_overlap(pairs: list[tuple[float, float]]) -> None:
    rows = [
        ROW | {"size_bytes": round(size), "kl_mean": loss, "format": f"f{n}"} for n, (size, loss) in enumerate(pairs)
    ]
    drawn = report.chart(rows, "", SAY)
    for x, y in re.findall(r"<circle cx='([^']+)' cy='([^']+)'", drawn):
        assert 0 <= float(x) <= report.WIDTH and 0 <= float(y) <= report.HEIGHT
    names = [(float(x), float(y)) for x, y in re.findall(r"class='name' x='([^']+)' y='([^']+)'", drawn)]
    assert len(names) == len(rows)
    for place, (x, y) in enumerate(names):
        assert not any(abs(x - u) < report.LETTER and abs(y - v) < report.LINE - 1 for u, v in names[:place])


def test_a_job_tells_how_far_it_is_in_both_languages() -> None:
    for language, words in (
        ("en", ("running", "shrinking 12/28 layers · 43 %", "5 s left")),
        ("zh", ("进行中", "剩余 5 s")),
    ):
        shown = text_of(joblist.joblist([JOB], "", "", Say(language)))
        for word in words:
            assert word in shown
    done = JOB | {"state": "done", "result": {"models": [{"name": "guide-nf4"}]}}
    assert "data-act='load' data-subject='guide-nf4'" in joblist.joblist([done], "", "", SAY)
    shown = joblist.joblist([JOB], JOB["id"], "line one\nline two", SAY)
    assert "python -m nibble quantize guide --low-bit nf4" in shown and "line two" in shown


@pytest.mark.parametrize("state", [*jobs.LIVE, *jobs.FINAL])
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_state_has_a_word(state: str, language: str) -> None:
    for task in ("download", "quantize", "evaluate", "finetune", ""):
        spec = {"repo": "org/name", "model": "guide"}
        shown = joblist.joblist(
            [JOB | {"state": state, "task": task, "spec": spec, "cause": "why"}], "", "", Say(language)
        )
        assert "why" in shown
        assert language == "en" or state not in text_of(shown)


def test_nothing_of_a_file_reaches_the_page_unescaped() -> None:
    card = CARD | {"name": HOSTILE, "family": HOSTILE, "format": HOSTILE, "base": HOSTILE, "note": HOSTILE}
    row = ROW | {"format": HOSTILE, "layers": [{"name": HOSTILE, "error": 0.1}]}
    known = REPORT | {
        "formats": [row, row | {"kl_mean": 1.0}],
        "text": {"name": HOSTILE, "tokens": 1},
        "device": HOSTILE,
    }
    job = JOB | {"state": "failed", "cause": HOSTILE, "note": HOSTILE, "spec": {"model": HOSTILE, "low_bit": [HOSTILE]}}
    parts = [
        view.library([card], "", SAY), view.facts(card, SAY), view.facts(card | {"problem": HOSTILE}, SAY),
        told(HOSTILE), report.report(known, HOSTILE, SAY), joblist.joblist([job], job["id"], HOSTILE, SAY),
        joblist.joblist([JOB | {"progress": JOB["progress"] | {"stage": HOSTILE, "unit": HOSTILE}}], "", "", SAY),
    ]  # fmt: skip
    for part in parts:
        assert "<img" not in part and "\"'" not in part
        assert HOSTILE.split("=")[0].strip("<") in unescape(part)


@given(st.text(min_size=1), st.lists(st.sampled_from(sorted(FORMATS))), st.text())
def test_a_console_line_is_read_back_as_it_was_meant(name: str, formats: list[str], out: str) -> None:
    line = command(
        "quantize", {"model": name, "low_bit": formats, "out": out, "skip": ["lm_head", "a"], "evaluate": False}
    )
    words = shlex.split(line)
    assert words[:5] == ["python", "-m", "nibble", "quantize", name]
    assert words[5:] == [
        *(["--low-bit", ",".join(formats)] if formats else []), *(["--out", out] if out else []),
        "--skip", "lm_head", "--skip", "a", "--no-report",
    ]  # fmt: skip


def test_every_console_line_is_one_that_the_console_takes() -> None:
    """Held against the commands' own parsers."""
    import argparse
    import importlib

    specs: dict[str, dict[str, Any]] = {
        "download": {"repo": "org/name", "hub": "modelscope", "revision": "main", "name": "mine", "file": "a.gguf"},
        "quantize": {
            "model": "guide", "low_bit": ["nf4", "fp4"], "out": "mine", "skip": ["lm_head"], "evaluate": False,
            "overrides": {"layers.0": "sym_int8"}, "pick": {"memory_bytes": 4e9, "max_kl": 0.05},
        },
        "evaluate": {"model": "guide", "low_bit": ["nf4"], "against": "guide", "tokens": 64},
    }  # fmt: skip
    for task, spec in specs.items():
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(f"nibble.commands.{task}").configure(parser)
        parser.parse_args(shlex.split(command(task, spec))[4:])


def test_the_fields_of_the_card_become_a_wish() -> None:
    wish = forms.quantize(
        "en", "guide", ["nf4"], " mine ", "lm_head, layers.0", "layers.1=sym_int8\n\nhead = bf16", True
    )
    assert wish.spec() == {
        "low_bit": ["nf4"], "out": "mine", "skip": ["lm_head", "layers.0"],
        "overrides": {"layers.1": "sym_int8", "head": "bf16"}, "evaluate": True,
    }  # fmt: skip
    for bad in ((["guide"], []), (["guide"], ["", "nf4"])):
        with pytest.raises(NibbleError):
            forms.quantize("en", bad[0][0], bad[1], "", "", "", True)
    with pytest.raises(NibbleError, match="lm_head"):
        forms.rules("en", "lm_head")
    for text, number in (("", None), ("4", 4e9), ("0,5", 5e8)):
        assert forms.limit("en", "pick_memory", text, 1e9) == number
    for text in ("-1", "0", "nan", "inf", "many", "1e999"):
        with pytest.raises(NibbleError, match="memory"):
            forms.limit("en", "pick_memory", text)


def test_no_word_stands_in_the_tables_of_two_tabs() -> None:
    keys = [key for tab in app.TABS for key in tab.WORDS.of("en")]
    assert len(keys) == len(set(keys))
    for tab in app.TABS:
        for key, sentence in tab.WORDS.of("en").items():
            fields = set(re.findall(r"{(\w+)", sentence))
            assert fields == set(re.findall(r"{(\w+)", tab.WORDS.of("zh")[key])) or key == "died", key


@pytest.mark.parametrize("limit", [0, -1, 1_000, "many"])
def test_a_list_of_jobs_has_a_limit(client: Client, limit: object) -> None:
    assert len(client.predict(1, api_name="/jobs")) <= 1
    with pytest.raises(AppError, match="limit"):
        client.predict(limit, api_name="/jobs")


@pytest.fixture
def wiring(tmp_path: Path) -> Wiring:
    """The handlers of a page, with a scripted host and a home of their own."""
    with gr.Blocks():
        operator = Operator(ScriptedHost(), Settings(home=str(tmp_path / "home")))
        return Wiring(build_widgets(lambda key: key), operator, gr.HTML(), lambda request: "")


REQUEST = SimpleNamespace(headers={})


def test_a_run_whose_folder_is_gone_stops_no_page(wiring: Wiring, guide_model: Path) -> None:
    gone = JOB["id"]
    changes = asyncio.run(wiring.tick(REQUEST, "guide", "", gone, [gone]))
    assert changes[wiring.w.live] == [] and "guide" in changes[wiring.w.keep.library]["rows"]
    wiring.operator.jobs = lambda limit: [JOB]
    assert gone in asyncio.run(wiring.scene.work(SAY, gone))[wiring.w.jobs]["rows"]


def test_a_model_that_goes_while_the_page_looks_stops_no_page(wiring: Wiring, guide_model: Path) -> None:
    (card,) = wiring.operator.shelf()
    wiring.operator.shelf = lambda: [card | {"name": "gone"}]
    changes = asyncio.run(wiring.scene.shelf(SAY, "gone", "gone"))
    assert "Not measured yet" in changes[wiring.w.keep.known]


def test_an_adapter_with_a_models_name_is_chosen_and_deleted_for_itself(wiring: Wiring, guide_model: Path) -> None:
    folder = wiring.operator.home / "adapters" / "guide"
    folder.mkdir(parents=True)
    changes = asyncio.run(wiring.scene.shelf(SAY, "guide", ""))
    assert not changes[wiring.w.keep.delete]["interactive"]
    rows = changes[wiring.w.keep.library]["rows"]
    assert "data-name='guide' aria-pressed='true'" in rows
    assert "data-name='adapter:guide' aria-pressed='false'" in rows
    changes = asyncio.run(wiring.scene.shelf(SAY, "adapter:guide", ""))
    assert changes[wiring.w.keep.delete]["interactive"]
    assert not changes[wiring.w.keep.load]["interactive"]
    changes = asyncio.run(wiring.delete(REQUEST, "adapter:guide", "guide", ""))
    assert "guide is deleted" in changes[wiring.w.keep.said]
    assert not folder.exists() and guide_model.is_dir()


def test_the_folder_that_was_judged_is_chosen_by_its_name(
    wiring: Wiring, guide_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = JOB | {"task": "evaluate", "state": "done", "spec": {"model": "/elsewhere/guide", "paths": True}}
    monkeypatch.setattr(wiring.operator, "job", lambda job_id: SimpleNamespace(as_dict=lambda: done))
    changes = asyncio.run(wiring.tick(REQUEST, "", "", "", [JOB["id"]]))
    assert changes[wiring.w.keep.library]["value"] == "guide"


def test_a_field_that_is_too_long_makes_no_line_and_cannot_be_typed(wiring: Wiring) -> None:
    assert asyncio.run(wiring.get_line("x" * 1_001, "", "", "", "")) == ""
    assert "org/name" in asyncio.run(wiring.get_line("org/name", "", "", "", ""))
    get, shrink = wiring.w.get, wiring.w.shrink
    for field in (get.repo, get.revision, get.file, get.name, shrink.out, shrink.memory, shrink.loss):
        assert field.max_length == 1_000
    assert shrink.skip.max_length == shrink.overrides.max_length == 4_000


def test_a_button_that_is_none_is_refused(wiring: Wiring, guide_model: Path) -> None:
    async def press(data: dict[str, str]) -> list[Any]:
        return [changes async for changes in wiring.act(REQUEST, gr.EventData(None, data), "")]

    for data in ({}, {"act": "stop"}, {"act": "delete", "subject": "guide"}, {"act": "stop", "subject": JOB["id"]}):
        (changes,) = asyncio.run(press(data))
        assert "class='wrong'" in changes[wiring.w.keep.said]
