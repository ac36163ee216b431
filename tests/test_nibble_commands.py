"""The console as a person uses it: a process, its output, its exit code. No traceback, whatever is asked."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nibble.adapters import fingerprint
from nibble.library import GUIDE_FOLDER
from tests.support.adapters import make_adapter, sign

ROOT = Path(__file__).parents[1]


def nibble(
    *arguments: str, stdin: str = "", program: tuple[str, ...] = ("-m", "nibble"), timeout: float = 240
) -> subprocess.CompletedProcess:
    run = subprocess.run(
        [sys.executable, *program, *arguments], cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=timeout
    )
    assert "Traceback" not in run.stderr + run.stdout, run.stderr
    return run


@pytest.fixture
def broken(stories: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    shutil.copytree(stories, folder)
    return folder


def test_ask_streams_an_answer_and_tells_its_timing(home: Path, stories: Path) -> None:
    run = nibble("ask", "Once upon a time", "--model", str(stories), "--max-new-tokens", "12", "--greedy")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    assert "tokens/s" in run.stderr
    assert "first token" in run.stderr


def test_ask_as_json_is_one_object(home: Path, stories: Path) -> None:
    model = ("--model", str(stories), "--low-bit", "asym_int5", "--max-new-tokens", "8", "--greedy")
    run = nibble("ask", "Once upon a time", *model, "--json")
    report = json.loads(run.stdout)
    assert report["format"] == "asym_int5"
    assert report["tokens"] == 8
    assert report["finish_reason"] == "length"
    assert report["answer"]


def test_chat_ends_with_stop(home: Path, stories: Path) -> None:
    lines = "One day\nstop\nnever asked\n"
    run = nibble("chat", "--model", str(stories), "--max-new-tokens", "6", "--greedy", stdin=lines)
    assert run.returncode == 0
    assert run.stderr.count("tokens/s") == 1


def test_the_guide_answers(home: Path, guide_model: Path) -> None:
    run = nibble("ask", "Which port does the page use?")
    assert run.returncode == 0, run.stderr
    assert "7860" in run.stdout


@pytest.fixture
def tuned(home: Path) -> Path:
    """An adapter of the guide, and one of a model that is not here."""
    folder = make_adapter(home / "adapters" / "tuned")
    lost = Path(shutil.copytree(folder, home / "adapters" / "lost"))
    sign(folder, "guide", fingerprint(GUIDE_FOLDER))
    sign(lost, "somewhere", "0" * 64)
    return folder


def test_an_adapter_answers_on_its_base_and_is_listed_with_it(home: Path, tuned: Path) -> None:
    told = ("What is nf4?", "--greedy", "--max-new-tokens", "8", "--json")
    plain, other = (json.loads(nibble("ask", *told, *who).stdout)["answer"] for who in ((), ("--model", "tuned")))
    assert other != plain
    line = "What is nf4?\nstop\n"
    chat = nibble("chat", "--adapter", "tuned", "--greedy", "--max-new-tokens", "8", stdin=line)
    assert "guide + tuned" in chat.stdout
    assert other in chat.stdout
    listed = {card["name"]: card for card in json.loads(nibble("models", "--json").stdout)}
    assert (listed["tuned"]["base"], listed["lost"]["base"]) == ("guide", "somewhere")
    lines = nibble("models").stdout.splitlines()
    assert any(line.split()[:3] == ["tuned", "guide", "LORA"] for line in lines)


@pytest.mark.parametrize("who", [("--model", "lost"), ("--adapter", "none"), ("--model", "guide", "--adapter", "lost")])
def test_an_adapter_that_cannot_answer_is_a_sentence(home: Path, tuned: Path, who: tuple[str, ...]) -> None:
    run = nibble("ask", "What is nf4?", *who)
    assert run.returncode == 1
    assert "somewhere" in run.stderr or "no adapter 'none'" in run.stderr


def test_models_lists_what_is_there(home: Path, stories: Path) -> None:
    shutil.copytree(stories, home / "models" / "tiny")
    cards = {card["name"]: card for card in json.loads(nibble("models", "--json").stdout)}
    assert cards["tiny"]["parameters"] == 260_032
    assert "tiny" in nibble("models").stdout


def test_doctor_reports_and_never_fails(home: Path) -> None:
    run = nibble("doctor", "--json")
    topics = {finding["topic"]: finding for finding in json.loads(run.stdout)}
    assert run.returncode == 0
    assert {"torch", "device", "memory", "home", "page", "ModelScope DSW"} <= topics.keys()
    assert "secret" not in nibble("doctor", "--auth", "me:secret").stdout


def spoil_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").unlink()


def spoil_shard(folder: Path) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])


def spoil_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def spoil_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')", encoding="utf-8")


SPOILS = {
    "no tokenizer": spoil_tokenizer,
    "model.safetensors": spoil_shard,
    "pickle": spoil_pickle,
    "trust_remote_code": spoil_code,
}


@pytest.mark.parametrize("words", SPOILS)
def test_a_folder_that_cannot_be_loaded_gets_one_line_and_a_hint(home: Path, broken: Path, words: str) -> None:
    SPOILS[words](broken)
    run = nibble("ask", "Hello", "--model", str(broken))
    assert run.returncode == 1
    message, hint = run.stderr.strip().splitlines()
    assert words in message + hint
    assert run.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("ask", "Hello", "--low-bit", "sym_int3"), 1, "sym_int4"),
        (("ask", "Hello", "--low-bit", "q4_k"), 1, "GGUF"),
        (("ask", "Hello", "--model", "nothing-here"), 1, "nothing-here"),
        (("ask", "   "), 1, "empty"),
        (("ask", "Hello", "--temperature", "-1"), 2, "temperature"),
        (("ask", "Hello", "--top-p", "nan"), 2, "top_p"),
        (("ask", "Hello", "--top-k", "many"), 2, "--top-k"),
        (("ask", "Hello", "--device", "tpu"), 2, "tpu"),
        (("ask", "Hello", "--config", "/none.yaml"), 2, "none.yaml"),
        (("ask",), 2, "QUESTION"),
        (("sing",), 2, "sing"),
        ((), 2, "COMMAND"),
    ],
)
def test_bad_input_gets_a_sentence(home: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    run = nibble(*arguments)
    assert run.returncode == code
    assert words in run.stderr
