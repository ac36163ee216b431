"""Reports: measured by child processes, kept, shown; what is refused; the search for the smallest form that holds."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble import quality
from nibble.errors import EngineDied, NibbleError
from nibble.lowbit.formats import FORMATS
from nibble.quality import measuring, processes, table
from nibble.quality.kept import keep, kept
from nibble.quality.picking import RAISED, Limits, Search
from nibble.tasks import evaluate

ROOT = Path(__file__).parents[1]


class Listener:
    """A report that remembers."""

    folder = None

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[tuple[float, float]] = []

    def progress(self, done: float, total: float, unit: str = "", stage: str = "") -> None:
        assert (unit, stage) == ("models", "evaluate")
        self.steps.append((done, total))

    def metric(self, **numbers: float) -> None:
        """Nothing is told here."""

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("Once upon a time there was a girl who had a red ball. She liked to play. " * 40, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def measured(stories: Path, words: Path) -> tuple[dict[str, Any], Listener]:
    listener = Listener()
    report = quality.measure(stories, ["sym_int4"], text=words, tokens=300, report=listener)
    return report, listener


def test_a_report_has_every_figure(measured: tuple[dict[str, Any], Listener], stories: Path) -> None:
    report, listener = measured
    json.dumps(report, allow_nan=False)
    assert report["model"] == stories.name
    assert report["device"] == "cpu"
    assert report["text"]["name"] == "words.txt"
    assert report["text"]["tokens"] == 300
    assert {"nibble", "torch", "transformers"} == report["versions"].keys()
    assert abs(report["measured"] - time.time()) < 3600
    full, low = report["reference"], report["formats"][0]
    for row in (full, low):
        assert {"format", "name", *measuring.FIGURES} == row.keys()
        assert None not in row.values()
        assert 10**7 < row["steady_bytes"] <= row["peak_bytes"] < 2 * 10**9
        assert row["load_s"] > 0
        assert row["tokens_per_s"] > 0
    assert (full["format"], full["kl_mean"], full["kl_p95"], full["top1"], full["layers"]) == ("fp32", 0, 0, 1, [])
    assert low["format"] == "sym_int4"
    assert 0 < low["kl_mean"] < low["kl_p95"]
    assert 0.5 < low["top1"] < 1
    assert low["size_bytes"] < full["size_bytes"]
    assert low["bits_per_weight"] == pytest.approx(8 * low["size_bytes"] / 260_032)
    assert len(low["layers"]) == 10
    assert 0.02 < low["layers"][0]["error"] < 0.3
    assert listener.steps[0] == (0, 3)
    assert listener.steps[-1] == (3, 3)
    assert listener.steps == sorted(listener.steps)


def test_the_table_shows_every_format(measured: tuple[dict[str, Any], Listener]) -> None:
    report, _ = measured
    head, full, low, told = table.lines(report)
    assert head.split()[:2] == ["format", "bits"]
    assert full.startswith("fp32 (full)")
    assert f"{report['formats'][0]['kl_mean']:.5f}" in low
    assert "300 tokens of words.txt" in told
    assert len(table.worst_layers(report)) == 11
    blind = {**report, "reference": None, "formats": [{**report["formats"][0], "kl_mean": None, "layers": []}]}
    assert " - " in table.lines(blind)[1]
    assert table.worst_layers(blind) == []


@pytest.mark.full
def test_a_reference_that_does_not_fit_is_left_out(stories: Path, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "PROCESS_BYTES", 10**15)
    listener = Listener()
    report = quality.measure(stories, ["sym_int8"], text=words, tokens=100, report=listener)
    row = report["formats"][0]
    assert report["reference"] is None
    assert row["kl_mean"] is row["kl_p95"] is row["top1"] is None
    assert 1 < row["perplexity"] < 1e4
    assert row["layers"][0]["error"] < 0.02
    assert any("without it" in note for note in listener.notes)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"model": "none"}, "no model 'none'"),
        ({"model": "guide", "low_bit": ["int3"]}, "no low-bit format"),
        ({"model": "guide", "against": "none"}, "no model 'none'"),
        ({"model": "guide", "tokens": -1}, "cannot be measured"),
        ({"model": "guide", "text": "/none.txt", "paths": True}, "cannot be read"),
        ({"model": "guide", "texts": "a"}, "no setting"),
    ],
)
def test_what_cannot_be_measured_gets_a_sentence(home: Path, guide_model: Path, spec: Any, words: str) -> None:
    with pytest.raises(NibbleError, match=words):
        evaluate.run(spec, Listener())
    assert not (home / "reports").exists()


def test_a_visitor_cannot_name_a_file(home: Path, guide_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def measure(folder: Path, formats: Sequence[str], **named: Any) -> dict[str, Any]:
        asked.update(named)
        return {"formats": [], "reference": None, "text": {}}

    monkeypatch.setattr(evaluate, "measure", measure)
    evaluate.run({"model": "guide", "text": "/etc/passwd"}, Listener())
    assert asked["text"] is None


@pytest.mark.full
def test_different_vocabularies_are_refused(guide_model: Path, stories: Path) -> None:
    with pytest.raises(NibbleError, match="different vocabularies"):
        quality.measure(guide_model, ["sym_int4"], against=stories, tokens=100)


def test_a_child_that_dies_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(code: str) -> EngineDied:
        monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", code))
        with pytest.raises(EngineDied) as caught:
            processes.ask({}, lambda done, total: None)
        return caught.value

    killed = dies("import os, sys; sys.stdin.readline(); os.kill(os.getpid(), 9)")
    assert "memory" in killed.message
    broken = dies("import sys; sys.stdin.readline(); sys.exit('the disk is on fire')")
    assert broken.hint == "the disk is on fire"


def test_a_stopped_comparison_leaves_no_process_and_no_file(home: Path, stories: Path, words: Path) -> None:
    before = {process.pid for process in psutil.process_iter()}
    spool = home.parent / "tmp"
    spool.mkdir()
    run = subprocess.Popen(
        [sys.executable, "-m", "nibble", "evaluate", str(stories), "--text", str(words)],
        cwd=ROOT, stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": str(spool)},
    )  # fmt: skip
    end = time.monotonic() + 60
    while not (children := psutil.Process(run.pid).children()) and time.monotonic() < end:
        time.sleep(0.05)
    assert children
    run.send_signal(signal.SIGTERM)
    _, told = run.communicate(timeout=30)
    assert b"stopped" in told
    assert not [child for child in children if child.is_running() and child.pid not in before]
    assert list(spool.iterdir()) == []


# --- kept -------------------------------------------------------------------------------------------------------------


def report_of(*formats: str, sha: str = "a", kl: float = 0.1) -> dict[str, Any]:
    return {
        "model": "m", "device": "cpu", "text": {"name": "t", "tokens": 9, "sha256": sha}, "measured": 1.0,
        "reference": {"name": "m", "format": "bf16"},
        "formats": [{"format": name, "name": "m", "kl_mean": kl} for name in formats],
    }  # fmt: skip


def test_reports_of_the_same_kind_are_put_together(home: Path) -> None:
    keep("m", home, report_of("sym_int4", "nf4"))
    keep("m", home, report_of("nf4", "fp4", kl=0.2))
    rows = (kept("m", home) or {})["formats"]
    assert [(row["format"], row["kl_mean"]) for row in rows] == [("sym_int4", 0.1), ("nf4", 0.2), ("fp4", 0.2)]
    keep("m", home, report_of("fp4", sha="b"))
    assert [row["format"] for row in (kept("m", home) or {})["formats"]] == ["fp4"]


def test_a_report_that_cannot_be_read_is_none(home: Path) -> None:
    assert kept("m", home) is None
    (home / "reports").mkdir(parents=True)
    for content in ("", "{", "[]", '{"formats": 3}', "\x00"):
        (home / "reports" / "m.json").write_text(content, encoding="utf-8")
        assert kept("m", home) is None
    with pytest.raises(NibbleError):
        kept("../m", home)


@pytest.mark.parametrize(
    "wrong",
    [
        {"formats": [1]}, {"formats": [{}]}, {"formats": [{"format": "nf4"}]}, {"device": "\ud800"}, {"formats": {}},
        {"text": None},
        {"text": {"name": "t", "tokens": "9"}}, {"device": None}, {"measured": None}, {"measured": float("nan")},
        {"reference": []}, {"reference": {"name": 3, "format": "bf16"}}, {"formats": [{}] * 10_000},
        *({"formats": [{"format": "nf4", "name": "m", **row}]} for row in (
            {"kl_mean": float("nan")}, {"kl_mean": "0.1"}, {"kl_mean": True}, {"kl_mean": 10**400}, {"size_bytes": -1},
            {"top1": float("inf")}, {"overrides": [1]}, {"overrides": {"a": 1}}, {"layers": [1]}, {"layers": 3},
            {"layers": [{"name": "a", "error": "x"}]}, {"perplexity": {}},
        )),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_a_report_with_a_field_that_cannot_be_is_none(home: Path, wrong: dict[str, Any]) -> None:
    """Where it came with a download, and where it lies in home/reports."""
    folder, reports = home / "models" / "m", home / "reports"
    folder.mkdir(parents=True)
    reports.mkdir()
    report = report_of("nf4")
    for said, found in ((report, report), (report | wrong, None), ([], None)):
        (folder / "nibble.json").write_text(json.dumps({"quality": said}), encoding="utf-8")
        assert kept("m", home) == found
        assert kept("m", home, brought=False) is None
        (folder / "nibble.json").unlink()
        (reports / "m.json").write_text(json.dumps(said), encoding="utf-8")
        assert kept("m", home) == found
        (reports / "m.json").unlink()


def test_reports_kept_at_once_are_all_there(home: Path) -> None:
    names = [name for name, row in FORMATS.items() if row.quantized]
    threads = [threading.Thread(target=keep, args=("m", home, report_of(name))) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {row["format"] for row in (kept("m", home) or {})["formats"]} == set(names)
    assert {file.name for file in (home / "reports").iterdir()} == {".lock", "m.json"}


# --- pick -------------------------------------------------------------------------------------------------------------


class Bench:
    """A model made of numbers: what each layer costs in each format adds up."""

    def __init__(self, weights: Sequence[int], costs: Mapping[str, Sequence[float]], overhead: int = 10**8) -> None:
        self.weights, self.costs, self.overhead = weights, costs, overhead

    def _bytes(self, low_bit: str, layer: int) -> int:
        return FORMATS[low_bit].nbytes(self.weights[layer], 64)

    def measure(self, subject: measuring.Subject) -> dict[str, Any]:
        formats = [subject.overrides.get(f"layers.{layer}", subject.low_bit) for layer in range(len(self.weights))]
        size = sum(self._bytes(low_bit, layer) for layer, low_bit in enumerate(formats))
        kl = sum(self.costs[low_bit][layer] for layer, low_bit in enumerate(formats))
        row = {"format": subject.low_bit, "name": "m", "size_bytes": size, "kl_mean": kl}
        row["peak_bytes"] = size + self.overhead
        return row | ({"overrides": dict(subject.overrides)} if subject.overrides else {})

    def sensitivities(self, folder: Path, formats: Sequence[str]) -> list[dict[str, Any]]:
        return [
            {
                "name": f"layers.{layer}",
                "bytes": {low_bit: self._bytes(low_bit, layer) for low_bit in formats},
                "kl": {low_bit: self.costs[low_bit][layer] for low_bit in formats},
            }
            for layer in range(len(self.weights))
        ]


LOSS = {"sym_int4": 1.0, "nf4": 1.1, "fp4": 3.0, "asym_int4": 0.8, "sym_int5": 0.26, "asym_int5": 0.2,
        "fp8_e4m3": 0.1, "fp8_e5m2": 0.4, "sym_int8": 0.004}  # fmt: skip
"""As on the guide, about."""


def search(bench: Bench, limits: Limits) -> quality.Proposal:
    return Search(bench, Path("m"), limits, Listener()).run()


def bench_of(costs: Sequence[float], overhead: int = 10**8) -> Bench:
    return Bench([640] * len(costs), {name: [cost * loss for cost in costs] for name, loss in LOSS.items()}, overhead)


def test_the_costly_layer_is_raised_and_no_other() -> None:
    found = search(bench_of([0.001] * 9 + [0.05]), Limits(0.02))
    assert found.holds
    assert (found.format, found.overrides) == ("sym_int4", {"layers.9": RAISED})
    assert found.kl_mean <= 0.02


def test_a_whole_format_is_taken_where_it_is_enough() -> None:
    found = search(bench_of([0.001] * 10), Limits(0.02))
    assert (found.format, found.overrides, len(found.tried)) == ("sym_int4", {}, 3)


def test_where_nothing_holds_the_nearest_is_told() -> None:
    found = search(bench_of([0.01] * 10), Limits(1e-5))
    assert not found.holds
    assert found.format == "sym_int8"
    assert "None of" in found.why
    small = search(bench_of([0.01] * 10, overhead=10**9), Limits(0.01, memory_bytes=10**8))
    assert not small.holds


@given(
    costs=st.lists(st.floats(1e-5, 0.1), min_size=1, max_size=30),
    sizes=st.lists(st.integers(1, 2000), min_size=30, max_size=30),
    limit=st.floats(1e-5, 1.0),
)
@settings(max_examples=200, deadline=None)
def test_a_proposal_was_measured_and_is_no_larger_than_any_whole_format_that_holds(
    costs: list[float], sizes: list[int], limit: float
) -> None:
    bench = Bench(sizes[: len(costs)], {name: [cost * loss for cost in costs] for name, loss in LOSS.items()})
    found = search(bench, Limits(limit))
    again = bench.measure(measuring.Subject(Path("m"), found.format, found.overrides))
    whole = [bench.measure(measuring.Subject(Path("m"), name)) for name in LOSS]
    holding = [row["size_bytes"] for row in whole if row["kl_mean"] <= limit]
    assert found.holds == bool(holding)
    assert found.kl_mean == again["kl_mean"]
    if holding:
        assert found.kl_mean <= limit
        assert found.size_bytes <= min(holding)
    assert found == search(bench, Limits(limit))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_limit_that_cannot_be_held_gets_a_sentence(value: float) -> None:
    with pytest.raises(NibbleError, match="cannot be held"):
        Limits(value)
