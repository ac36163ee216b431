"""`nibble quantize` as a person uses it: a process, its output, its exit code."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nibble.commands.quantize import size
from nibble.jobs.folder import device_lock
from nibble.jobs.processes import Lock
from tests.test_nibble_commands import ROOT, nibble


def test_it_says_what_there_is_now_and_how_to_chat_with_it(home: Path, stories: Path) -> None:
    run = nibble("quantize", str(stories), "--low-bit", "sym_int4,nf4", "--out", "mine", "--no-report")
    assert run.returncode == 0, run.stderr
    first, second, chat = run.stdout.strip().splitlines()
    assert first.startswith("mine-sym_int4: sym_int4, 1.0 → 0.2 MB"), first
    assert second.startswith("mine-nf4: nf4, 1.0 →")
    assert chat == 'Chat with it:   python -m nibble ask --model mine-sym_int4 "Hello"'
    assert "pack 47/47 tensors" in run.stderr and "Loading weights" not in run.stderr
    answer = nibble("ask", "Once upon a time", "--model", "mine-sym_int4", "--max-new-tokens", "5", "--greedy")
    assert answer.returncode == 0 and answer.stdout.strip()


def test_as_json_it_is_one_object(home: Path, stories: Path) -> None:
    run = nibble(
        "quantize", str(stories), "--low-bit", "fp8", "--skip", "lm_head", "--override", "mlp.down_proj=sym_int8",
        "--no-report", "--json",
    )  # fmt: skip
    [model] = json.loads(run.stdout)["models"]
    assert (model["name"], model["format"]) == ("stories260K-hf-fp8_e5m2", "fp8_e5m2")
    stored = json.loads((Path(model["folder"]) / "config.json").read_text())["quantization_config"]
    assert stored["modules_to_not_convert"] == ["lm_head"] and stored["overrides"] == [["mlp.down_proj", "sym_int8"]]


@pytest.mark.full
def test_the_report_is_a_table(home: Path, guide_model: Path) -> None:
    run = nibble("quantize", "guide", "--low-bit", "asym_int5")
    assert run.returncode == 0, run.stderr
    assert "perplexity" in run.stdout and "KL mean" in run.stdout and "asym_int5" in run.stdout
    assert "guide on cpu" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("guide",), 1, "--low-bit"),
        (("guide", "--low-bit", "q4_k"), 1, "GGUF"),
        (("guide", "--low-bit", "bf16"), 1, "packs nothing"),
        (("nothing-here", "--low-bit", "nf4"), 1, "nothing-here"),
        (("guide", "--low-bit", "nf4", "--out", "a/b"), 1, "a/b"),
        (("guide", "--low-bit", "nf4", "--override", "lm_head"), 2, "PATTERN=FORMAT"),
        (("guide", "--low-bit", "nf4", "--text", "/none.txt"), 1, "none.txt"),
        (("guide", "--pick", "--max-memory", "much"), 2, "4GB"),
        (("guide", "--pick", "--low-bit", "nf4"), 1, "Either"),
        ((), 2, "MODEL"),
    ],
)
def test_bad_input_gets_a_sentence(home: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    run = nibble("quantize", *arguments)
    assert run.returncode == code
    assert words in run.stderr


def test_it_waits_for_the_device_and_says_so(home: Path, stories: Path) -> None:
    with Lock(device_lock(home, "cpu")) as lock:
        assert lock.take()
        command = [sys.executable, "-m", "nibble", "quantize", str(stories), "--low-bit", "nf4", "--no-report"]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ.copy()
        )
        assert process.stderr
        assert "Waits for cpu" in process.stderr.readline()
        time.sleep(0.2)
        assert process.poll() is None and not (home / "models").exists()
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and "nf4" in out


@pytest.mark.parametrize(
    ("text", "count"), [("4GB", 4 * 10**9), ("1.5 g", 15 * 10**8), ("700MiB", 700 * 2**20), ("9", 9)]
)
def test_sizes(text: str, count: int) -> None:
    assert size(text) == count
