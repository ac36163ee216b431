"""What an operator may wish for and do; names only, whatever a script sends."""

import asyncio
import json
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble import jobs, library, probe
from nibble.config import Settings
from nibble.errors import DeviceError, JobError, NibbleError
from nibble.jobs.control import make_folder
from nibble.jobs.folder import new_run
from nibble.operator import Operator
from nibble.quality.kept import keep
from nibble.wishes import Download, Evaluate, Quantize
from tests.scripted import ScriptedHost
from tests.support.hubs import Fault, Hubs

BAD_NAMES = [
    "../x", "..", "/etc", "~", "a/../b", "C:\\x", "x" * 300, "", " ", ".hidden", "a/b/c", "a\nb", "\x00", 7, None,
    ["guide"], {"name": "guide"}, True,
]  # fmt: skip
"""What is neither a model's name nor its id on a hub."""


@pytest.fixture
def operator(home: Path) -> Operator:
    return Operator(ScriptedHost(), Settings(home=str(home)))


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:20])
def test_what_is_no_name_is_refused_in_a_sentence_and_starts_nothing(operator: Operator, name: object) -> None:
    calls = [
        lambda: operator.quantize(Quantize(name, ["nf4"])),
        lambda: operator.evaluate(Evaluate(name)),
        lambda: operator.download(Download(name)),
        lambda: operator.delete(name),
        lambda: operator.report(name),
        lambda: operator.estimates(name),
    ]
    for call in calls:
        with pytest.raises(NibbleError) as caught:
            call()
        assert len(str(caught.value)) < 1_000
    assert jobs.list_jobs(operator.home) == []


@pytest.mark.parametrize("name", [*BAD_NAMES, "org/name"], ids=lambda name: repr(name)[:20])
def test_a_model_is_loaded_by_its_name_alone(operator: Operator, name: object) -> None:
    with pytest.raises(NibbleError):
        asyncio.run(operator.load(name))
    assert operator.answering == "guide"


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        (Quantize("guide", ["sym_int3"]), "sym_int3"),
        (Quantize("guide", [7]), "7"),
        (Quantize("guide", "nf4,../x"), "../x"),
        (Quantize("guide", ["nf4"], out="../x"), "../x"),
        (Quantize("guide", ["nf4"], out="guide"), "guide"),
        (Quantize("guide", ["nf4"], out="x" * 300), "cannot be the name"),
        (Quantize("guide", ["nf4"], skip=["lm head"]), "lm head"),
        (Quantize("guide", ["nf4"], skip=[".*"]), "module"),
        (Quantize("guide", ["nf4"], skip=["a"] * 1_001), "list"),
        (Quantize("guide", ["nf4"], overrides={"lm_head": "int9"}), "int9"),
        (Quantize("guide", ["nf4"], overrides="lm_head"), "mapping"),
        (Quantize("guide", ["nf4"], memory_bytes=-1), "memory_bytes"),
        (Quantize("guide", ["nf4"], memory_bytes="4GB"), "memory_bytes"),
        (Quantize("guide", ["nf4"], max_kl=float("nan")), "max_kl"),
        (Quantize("guide", ["nf4"], max_kl=float("inf")), "max_kl"),
        (Evaluate("guide", tokens=0), "tokens"),
        (Evaluate("guide", against="../x"), "../x"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wish_that_cannot_be_names_what_is_wrong(operator: Operator, wish: Quantize | Evaluate, told: str) -> None:
    with pytest.raises(NibbleError, match="(?s)" + told.replace(".", r"\.")):
        operator.quantize(wish) if isinstance(wish, Quantize) else operator.evaluate(wish)
    assert jobs.list_jobs(operator.home) == []


@settings(max_examples=200)
@given(
    st.lists(st.one_of(st.none(), st.text(), st.integers(), st.lists(st.text()), st.booleans()), min_size=8, max_size=8)
)
def test_whatever_a_script_sends_is_a_spec_or_a_sentence(values: list) -> None:
    for wish in (Quantize(*values), Evaluate(*values[:4]), Download(*values[:5])):
        try:
            assert isinstance(wish.spec(), dict)
        except NibbleError as error:
            assert str(error)


@pytest.mark.parametrize(
    "wish", [Download("evil/x", name="t"), Quantize("guide", ["nf4"], "t"), Quantize("evil/x", ["nf4"], "t")], ids=str
)
def test_a_name_whose_code_may_run_is_never_a_visitors_to_give(home: Path, wish: Download | Quantize) -> None:
    operator = Operator(ScriptedHost(), Settings(home=str(home), trust_remote_code=("t",)))
    with pytest.raises(NibbleError, match="stands in trust_remote_code"):
        operator.download(wish) if isinstance(wish, Download) else operator.quantize(wish)
    assert jobs.list_jobs(home) == []


def test_a_wish_becomes_what_the_task_reads() -> None:
    wish = Quantize("guide", "nf4, NF4 ,sym_int8", "mine", "lm_head", {"layers.0": "sym_int8"}, False, 4e9, 0.05)
    assert wish.spec() == {
        "low_bit": ["nf4", "sym_int8"], "out": "mine", "skip": ["lm_head"], "overrides": {"layers.0": "sym_int8"},
        "pick": {"memory_bytes": 4e9, "max_kl": 0.05}, "evaluate": False,
    }  # fmt: skip
    assert Quantize("guide", ["nf4"]).spec() == {"low_bit": ["nf4"], "evaluate": True}
    assert Quantize("guide").spec() == {"low_bit": [], "evaluate": True}
    assert Evaluate("guide", tokens=64).spec() == {"low_bit": [], "tokens": 64}
    assert Download(" org/name ", revision="main").spec() == {"repo": "org/name", "revision": "main"}


def test_cards_tell_what_is_loaded_and_no_path(operator: Operator, guide_model: Path) -> None:
    (card,) = operator.cards()
    assert (card["name"], card["loaded"], card["kind"], card["problem"]) == ("guide", True, "model", "")
    assert str(guide_model.parent) not in str(card)
    assert operator.names() == ["guide"]


def test_the_folder_that_the_server_was_started_with_is_one_of_the_models(home: Path, stories: Path) -> None:
    operator = Operator(ScriptedHost(), Settings(home=str(home), model=str(stories)))
    assert operator.names() == [stories.name, "guide"]
    assert [card["name"] for card in operator.cards()] == [stories.name, "guide"]


def put_model(stories: Path, home: Path, name: str, report: dict | None = None) -> None:
    """A model in home/models; with what its own nibble.json says of its quality."""
    shutil.copytree(stories, home / "models" / name)
    (home / "models" / name / "nibble.json").write_text(json.dumps({"quality": report} if report else {}))


def report_of(name: str, reference: str, *rows: dict) -> dict:
    return {
        "model": name, "device": "cpu", "text": {"name": "t", "tokens": 9, "sha256": "a"}, "measured": 1.0,
        "reference": {"name": reference, "format": "bf16"},
        "formats": [{"format": "nf4", "name": name, "kl_mean": 0.1} | row for row in rows],
    }  # fmt: skip


def test_what_a_folder_says_of_its_quality_is_shown_for_itself_alone(
    home: Path, stories: Path, guide_model: Path
) -> None:
    operator = Operator(ScriptedHost(), Settings(home=str(home)))
    put_model(stories, home, "came", report_of("came", "guide", {"kl_mean": 0.0001}))
    put_model(stories, home, "broken", {"formats": [1]})
    put_model(stories, home, "made", report_of("made", "guide", {}))
    keep("made", home, report_of("made", "guide", {}))
    assert {"came", "broken", "made"} <= {card["name"] for card in operator.shelf()}
    assert operator.report("came")["formats"][0]["name"] == "came"
    assert [row["name"] for row in operator.report("guide")["formats"]] == ["made"]
    assert operator.report("broken") == {}


def test_neither_the_guide_nor_what_is_loaded_is_deleted(operator: Operator, guide_model: Path) -> None:
    for name in ("guide", "absent"):
        with pytest.raises(NibbleError, match=name):
            operator.delete(name)
    assert guide_model.is_dir()


def put_adapter(stories: Path, home: Path, name: str, base: str) -> None:
    folder = home / "adapters" / name
    folder.mkdir(parents=True)
    shutil.copy(stories / "model.safetensors", folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))


def test_an_adapter_may_have_a_models_name(operator: Operator, stories: Path, guide_model: Path) -> None:
    put_adapter(stories, operator.home, "guide", "org/base")
    assert [(card["kind"], card["loaded"]) for card in operator.cards()] == [("model", True), ("adapter", False)]
    with pytest.raises(NibbleError, match="Both"):
        operator.delete("guide")
    assert operator.delete("guide", "adapter") > 0
    with pytest.raises(NibbleError, match="part of Nibble"):
        operator.delete("guide")


@pytest.mark.parametrize(
    ("base", "shown"),
    [("org/base-1.5B", "org/base-1.5B"), ("base", "base"), ("/home/me/secret/base/", "base"), ("C:\\me\\base", "base"),
     ("~/base", "base"), ("../base", "base"), ("a/b/base", "base"), ("", "")],
)  # fmt: skip
def test_of_an_adapters_base_no_path_is_shown(home: Path, stories: Path, base: str, shown: str) -> None:
    put_adapter(stories, home, "mine", base)
    (card,) = (card for card in Operator(ScriptedHost(), Settings(home=str(home))).cards() if card["name"] == "mine")
    assert card["base"] == shown
    strangers = Operator(ScriptedHost(), Settings(home=str(home), public=True))
    assert "adapter" not in [card["kind"] for card in strangers.cards()]


@pytest.mark.parametrize("limit", [0, -1, 1_000, True, "3", None])
def test_a_number_of_jobs_that_cannot_be_is_refused(operator: Operator, limit: object) -> None:
    with pytest.raises(NibbleError, match="limit"):
        operator.jobs(limit)
    with pytest.raises(NibbleError):
        operator.job("../runs")


def test_a_job_that_lives_is_listed_however_many_have_ended_since(home: Path) -> None:
    operator = Operator(ScriptedHost(), Settings(home=str(home)))
    first = "20200101-000000-download-0000"
    folder, lock = make_folder(new_run("download", {"repo": "org/first"}, None), home)
    folder.rename(folder.with_name(first))
    with lock:
        for number in range(3):
            with make_folder(new_run("download", {"repo": f"org/{number}"}, None), home)[1]:
                pass  # its process is gone
        assert [job["id"] == first for job in operator.jobs(2)] == [True, False]
        assert len(operator.jobs(4)) == 4
    assert first not in [job["id"] for job in operator.jobs(2)]


def test_mixed_bits_are_shown_as_the_loss_of_their_own_model_alone(
    home: Path, stories: Path, guide_model: Path
) -> None:
    operator = Operator(ScriptedHost(), Settings(home=str(home)))
    put_model(stories, home, "mine")
    for name, shown in (("mine", 0.1), ("other", None)):
        row = {"format": "fp32", "name": name, "overrides": {"lm_head": "sym_int8"}}
        keep("mine", home, report_of("mine", "guide", row))
        (card,) = (card for card in operator.shelf() if card["name"] == "mine")
        assert card["format"] == "fp32"
        assert (card["quality"] or {}).get("kl_mean") == shown
        (home / "reports" / "mine.json").unlink()


def test_a_measurement_that_failed_is_tried_again(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[Path] = []

    def ensure(home: Path) -> probe.Machine:
        tries.append(home)
        if len(tries) == 1:
            raise DeviceError("It is busy.")
        return probe.unmeasured()

    monkeypatch.setattr(probe, "ensure", ensure)
    with pytest.raises(DeviceError):
        asyncio.run(operator.measure())
    assert operator.unmeasurable and not operator.measured
    asyncio.run(operator.measure())
    assert not operator.unmeasurable and len(tries) == 2


def test_the_servers_own_folder_will_do_to_compare_with(
    home: Path, stories: Path, guide_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = Operator(ScriptedHost(), Settings(home=str(home), model=str(stories)))
    started: list[dict] = []
    monkeypatch.setattr(operator, "_start", lambda task, spec: started.append(spec))
    operator.evaluate(Evaluate("guide", against=stories.name))
    (spec,) = started
    assert (spec["model"], spec["against"], spec["paths"]) == ("guide", str(stories.resolve()), True)
    assert library.find(spec["against"], home, paths=True) == stories.resolve()


def test_a_model_arrives_and_the_same_again_is_refused_meanwhile(home: Path, hubs: Hubs) -> None:
    """The real job, in its own process, from a hub on this machine that is slow."""
    hubs.faults.append(Fault(r"GET .*safetensors", pause=0.3))
    operator = Operator(ScriptedHost(), Settings(home=str(home)))
    job = operator.download(Download("org/tiny"))
    assert job["state"] in jobs.LIVE
    with pytest.raises(JobError, match=f"already .*{job['id']}"):
        operator.download(Download("org/tiny"))
    assert job["spec"] == {"repo": "org/tiny", "hubs": ["huggingface"], "home": str(home)}
    stopped = operator.stop(job["id"])
    assert stopped["state"] == "stopped"
    hubs.faults.clear()
    operator.resume(job["id"])
    while operator.job(job["id"]).live:
        time.sleep(0.05)
    (ended,) = operator.jobs()
    assert (ended["state"], ended["result"]["name"]) == ("done", "org__tiny")
    assert "org__tiny" in [card["name"] for card in operator.cards()]
    operator.delete("org__tiny")
    assert "org__tiny" not in [card["name"] for card in operator.cards()]


def test_a_job_reads_the_settings_file_that_the_server_was_started_with(home: Path, hubs: Hubs, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("queue_size: 3\n")
    operator = Operator(ScriptedHost(), Settings(home=str(home)), str(config))
    job = operator.download(Download("org/tiny"))
    assert job["spec"]["config"] == str(config)
    operator.stop(job["id"])


@pytest.mark.parametrize(
    ("device", "loaded", "kind"), [("auto", True, "cpu"), ("auto", False, "cpu"), ("xpu", True, "xpu")]
)
def test_jobs_are_exclusive_on_the_device_of_the_settings(home: Path, device: str, loaded: bool, kind: str) -> None:
    host = ScriptedHost()
    host.info = host.info if loaded else None
    assert Operator(host, Settings(home=str(home), device=device)).device == kind
