"""The real IPEX-LLM in its own environment, through the worker: quantize, save, reload, stream, stop, refuse."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nibble.config import Settings
from nibble.engines.base import Chunk, LoadSpec, Sampling
from nibble.engines.bigdl import judge, make_worker, models
from nibble.engines.worker import WorkerEngine
from nibble.errors import ConfigError, DeviceError, ModelError, NibbleError

pytestmark = pytest.mark.full

SETTINGS = Settings(engine="bigdl")
STORY = [{"role": "user", "content": "Once upon a time"}]
GREEDY = Sampling(max_new_tokens=48, temperature=0)

SAVE = """
import sys
from ipex_llm.transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], load_in_low_bit=sys.argv[3])
model.save_low_bit(sys.argv[2])
"""


@pytest.fixture(scope="module")
def engine(bigdl_python: Path, stories: Path) -> Iterator[WorkerEngine]:
    worker = make_worker(LoadSpec(str(stories), "sym_int4"), SETTINGS)
    worker.load()
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def saved(bigdl_python: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K as the real library's save_low_bit leaves it, and the tokenizer copied beside, as its users do."""
    folder = tmp_path_factory.mktemp("ipex") / "stories-int4"
    subprocess.run([bigdl_python, "-W", "ignore", "-c", SAVE, stories, folder, "sym_int4"], check=True)
    for path in stories.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def answer(worker: WorkerEngine, sampling: Sampling = GREEDY) -> list[Chunk]:
    return list(worker.stream(STORY, sampling, threading.Event()))


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def test_it_is_the_real_library(engine: WorkerEngine) -> None:
    info = engine.info
    assert info.kernel == "ipex-llm 2.2.0"
    assert (info.format, info.device, info.family, info.context) == ("sym_int4", "cpu", "llama", 512)
    assert info.memory_bytes > 0


def test_the_answer_grows_token_by_token(engine: WorkerEngine) -> None:
    chunks = answer(engine)
    assert [chunk.tokens for chunk in chunks if chunk.text] == list(range(1, 49))
    assert chunks[-1].finish_reason == "length"
    assert text_of(chunks).startswith(", there was a little")


def test_a_seed_gives_the_same_answer_twice(engine: WorkerEngine) -> None:
    wild = Sampling(max_new_tokens=24, temperature=1.5, seed=7)
    assert text_of(answer(engine, wild)) == text_of(answer(engine, wild))
    assert text_of(answer(engine, wild)) != text_of(answer(engine, replace(wild, seed=8)))


def test_stop_ends_the_answer_and_the_next_one_comes(engine: WorkerEngine) -> None:
    stop = threading.Event()
    chunks = []
    for chunk in engine.stream(STORY, replace(GREEDY, max_new_tokens=400), stop):
        chunks.append(chunk)
        if chunk.tokens == 5:
            stop.set()
    assert chunks[-1].finish_reason == "stopped"
    assert chunks[-1].tokens < 400
    assert text_of(answer(engine)).startswith(", there was a little")


def test_what_the_library_saved_says_the_same_again(engine: WorkerEngine, saved: Path) -> None:
    assert json.loads((saved / "config.json").read_text())["bigdl_transformers_low_bit"] == "sym_int4"
    worker = make_worker(LoadSpec(str(saved), ""), SETTINGS)
    try:
        assert worker.load().format == "sym_int4"
        assert text_of(answer(worker)) == text_of(answer(engine))
    finally:
        worker.close()


def test_an_extension_that_does_not_fit_is_reported(
    bigdl_python: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own __init__ prints this and calls `os.exit`, which there is not."""
    package = tmp_path / "intel_extension_for_pytorch"
    package.mkdir()
    (package / "__init__.py").write_text('import os\nprint("ERROR! needs to work with PyTorch 2.8.*")\nos.exit(127)\n')
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    worker = make_worker(LoadSpec(str(stories), "sym_int8"), SETTINGS)
    try:
        assert "needs to work with PyTorch 2.8.*" in worker.load().reason
        assert answer(worker)[-1].tokens == 48
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("low_bit", "device", "words"), [("nf4", "cpu", "Intel GPUs only"), ("sym_int4", "cuda", "no CUDA")]
)
def test_what_the_library_lacks_is_refused_at_load(
    bigdl_python: Path, stories: Path, low_bit: str, device: str, words: str
) -> None:
    worker = make_worker(LoadSpec(str(stories), low_bit, device), SETTINGS)
    try:
        with pytest.raises(DeviceError, match=words):
            worker.load()
    finally:
        worker.close()


# --- judged on the page's side, without the library ------------------------------------------------------------------


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def with_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "code.Model"}}))


def of_nibble(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "nibble"}}))


def saved_without_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "bigdl_transformers_low_bit": "sym_int4"}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_tokenizer, "no tokenizer"),
        (with_code, "Python code of its own"),
        (of_nibble, "does not read"),
        (saved_without_weights, "no weights"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_refused(
    bigdl_python: Path, stories: Path, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stories, folder)
    spoil(folder)
    with pytest.raises(ModelError, match=words):
        judge(folder, "model", trusted=False, settings=SETTINGS)


def test_a_saved_folder_is_described_without_opening_its_pickles(saved: Path) -> None:
    card = judge(saved, "mine", trusted=False, settings=SETTINGS)
    assert (card.name, card.format, card.context) == ("mine", "sym_int4", 512)
    assert card.size_bytes == (saved / "pytorch_model.bin").stat().st_size


def test_without_its_environment_the_engine_says_how_to_build_it(stories: Path, tmp_path: Path) -> None:
    settings = Settings(engine="bigdl", bigdl_python=str(tmp_path / "python"))
    for call in (
        lambda: make_worker(LoadSpec(str(stories)), settings),
        lambda: judge(stories, "s", trusted=False, settings=settings),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert "make bigdl" in caught.value.hint


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(NibbleError, match="engine is 'ollama'"):
        Settings(engine="ollama")


def test_a_saved_folder_is_offered_by_the_engine_that_can_load_it(saved: Path, home: Path) -> None:
    shutil.copytree(saved, home / "models" / "mine")
    settings = Settings(home=str(home))
    mine = {engine: models(replace(settings, engine=engine))[-1] for engine in ("nibble", "bigdl")}
    assert (mine["bigdl"].name, mine["bigdl"].format, mine["bigdl"].problem) == ("mine", "sym_int4", "")
    assert (mine["nibble"].kind, mine["nibble"].format, mine["nibble"].problem) == ("source", "sym_int4", "")
    assert "nibble quantize mine" in mine["nibble"].note
    assert "engine: bigdl" in mine["nibble"].note


@pytest.mark.parametrize(("trusted", "words"), [(False, "not allowed"), (True, "needs transformers 4; here is 5")])
def test_a_family_of_transformers_4_says_where_it_runs(
    stories: Path, tmp_path: Path, trusted: bool, words: str
) -> None:
    folder = tmp_path / "chatglm3-6b"
    shutil.copytree(stories, folder)
    config = {"model_type": "chatglm", "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words) as caught:
        judge(folder, folder.name, trusted=trusted, settings=Settings())
    assert "make bigdl" in caught.value.hint
    assert trusted or "trust_remote_code: [chatglm3-6b]" in caught.value.hint


def test_the_console_speaks_through_the_engine(bigdl_python: Path, stories: Path, home: Path) -> None:
    command = [sys.executable, "-m", "nibble", "ask", "Once upon a time", "--engine", "bigdl", "--model", str(stories)]
    done = subprocess.run([*command, "--greedy", "--max-new-tokens", "8"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(", there was a little")
    refused = subprocess.run([*command, "--low-bit", "nf4"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "Intel GPUs only" in refused.stderr
    assert "Traceback" not in refused.stderr
