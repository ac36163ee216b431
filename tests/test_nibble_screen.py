"""Nothing hostile: more than a hundred folders with a canary each, refused at every door with a reason and in no time;
and the folders of real life, which stay welcome."""

import asyncio
import json
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nibble.checkpoint import read_header
from nibble.config import Settings
from nibble.engines.bigdl import judge
from nibble.engines.host import ModelHost
from nibble.errors import ModelError, NibbleError, SourceError
from nibble.library import models
from nibble.prompts.trial import refuse_bombs
from nibble.screen import check, check_adapter, check_code, check_source, templates
from tests.support.hostile import BOMBS, DEAD, FOLDERS, SECRET, Watch, code, edit, pickled, watch

LONGEST_S = 5.0
"""A bound against hanging; what it took is printed."""

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def watcher(tmp_path_factory: pytest.TempPathFactory) -> Watch:
    return watch(tmp_path_factory.getbasetemp())


@pytest.fixture
def folder(stories: Path, tmp_path: Path) -> Path:
    """A good folder with the canary that nothing may read beside it."""
    copy = tmp_path / "models" / "stories"
    shutil.copytree(stories, copy)
    (copy.parent / SECRET).write_text("secret")
    return copy


def refused(call, watcher: Watch, folder: Path) -> tuple[NibbleError, float]:
    """What a door says, and how long it took; no canary died."""
    watcher.deeds.clear()
    start = time.perf_counter()
    with pytest.raises(NibbleError) as told, watcher.over():
        call()
    took = time.perf_counter() - start
    assert watcher.canaries == []
    assert told.value.message.endswith(".")
    assert told.value.hint
    assert "Traceback" not in str(told.value)
    assert took < LONGEST_S
    return told.value, took


SLOWEST: dict[str, tuple[float, str]] = {}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_folder_is_refused_at_every_door(name: str, folder: Path, watcher: Watch) -> None:
    from nibble.transformers import AutoModelForCausalLM

    FOLDERS[name](folder)
    doors = {
        "screen.check": lambda: check(folder),
        "the page's judge": lambda: judge(folder, "stories", trusted=False, settings=Settings()),
        "from_pretrained": lambda: AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True),
        "a source": lambda: check_source(folder),
        "the host": lambda: asyncio.run(ModelHost(Settings(home=str(folder.parents[1]))).load("stories")),
    }
    for door, call in doors.items():
        error, took = refused(call, watcher, folder)
        assert "stories" in error.message
        SLOWEST[door] = max(SLOWEST.get(door, (0.0, "")), (took, name))
    listed = {card.name: card for card in models(folder.parents[1])}["stories"]
    assert listed.problem
    assert watcher.canaries == []


def test_how_long_it_took() -> None:
    assert len(FOLDERS) >= 40
    for door, (took, name) in SLOWEST.items():
        print(f"\n{door}: at most {1000 * took:.0f} ms of {len(FOLDERS)} folders ({name})", end="")


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_blows_up_is_refused_before_anything_is_loaded(name: str, folder: Path, watcher: Watch) -> None:
    BOMBS[name](folder)
    check(folder)
    _, took = refused(lambda: refuse_bombs(templates(folder)), watcher, folder)
    print(f"\n{name}: {took:.2f} s", end="")


ASKED = ("auto_map in config.json", "pickle alone", "pipe for config.json", "index to ../", "template with a class")


@pytest.mark.parametrize("name", [*ASKED, "doubles"])
def test_the_console_refuses(name: str, folder: Path) -> None:
    (FOLDERS | BOMBS)[name](folder)
    command = [sys.executable, "-m", "nibble", "ask", "Hello", "--model", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("nibble: ")
    assert "Traceback" not in done.stderr
    assert not (folder.parent / DEAD).exists()


def test_the_page_refuses_a_template_that_blows_up_before_torch_is_imported(folder: Path) -> None:
    BOMBS["doubles"](folder)

    async def story() -> None:
        host = ModelHost(Settings(home=str(folder.parents[1])))
        try:
            with pytest.raises(ModelError, match="chat template"):
                await host.load("stories")
            assert host.state == "failed"
        finally:
            await asyncio.to_thread(host.close)

    asyncio.run(story())


def test_canaries_die_where_nobody_looks(folder: Path, watcher: Watch) -> None:
    """The control: what is refused above does work on a program that trusts."""
    import pickle
    import runpy

    code(folder)
    runpy.run_path(str(folder / "modeling_evil.py"))
    assert watcher.canaries
    (folder.parent / DEAD).unlink()
    pickled(folder, "pytorch_model.bin")
    with watcher.over():
        pickle.loads((folder / "pytorch_model.bin").read_bytes())
        (folder.parent / SECRET).read_text()
    assert any("unpickled" in deed for deed in watcher.deeds)
    assert any("opened" in deed for deed in watcher.deeds)
    assert (folder.parent / DEAD).exists()


def test_trust_lets_code_through_and_nothing_else(folder: Path) -> None:
    FOLDERS["auto_map in config.json"](folder)
    check(folder, trust_remote_code=True)
    edit(folder / "config.json", _attn_implementation_internal="evil/kernel")
    with pytest.raises(ModelError, match="_attn_implementation_internal"):
        check(folder, trust_remote_code=True)


CONFIGS: list[dict[str, object]] = [
    {"_name_or_path": "meta-llama/Llama-2-7b-chat-hf"}, {"_commit_hash": None}, {"_num_labels": 2},
    {"_attn_implementation_autoset": True}, {"attn_implementation": None}, {"attn_implementation": "sdpa"},
    {"attn_implementation": {"": "eager", "text_config": "sdpa"}}, {"experts_implementation": "grouped_mm"},
    {"trust_remote_code": False}, {"quantization_config": None}, {"_flash_attn_2_enabled": True},
    {"_remove_final_layer_norm": False}, {"_sliding_window_pattern": 6}, {"tokenizer_class": "LlamaTokenizerFast"},
    {"tokenizer_class": None}, {"transformers_weights": "model.safetensors"}, {"max_position_embeddings": 10_485_760},
    {"rope_scaling": {"factor": 8.0, "rope_type": "llama3", "high_freq_factor": 4.0}}, {"pruned_heads": {}},
    {"id2label": {"0": "_x", "1": "__label__"}, "label2id": {"_x": 0, "__label__": 1}}, {"auto_map": {}},
    {"text_config": {"_name_or_path": "", "model_type": "llama", "_attn_implementation_autoset": False}},
    {"task_specific_params": {"text-generation": {"do_sample": True}}}, {"torch_dtype": "float16"},
    {"time_step_limit": [0.0, {"__float__": "Infinity"}]}, {"_comment": "made by hand"},
    {"quantization_config": {"quant_method": "nibble", "low_bit": "sym_int4", "modules_to_not_convert": []}},
    {"num_experts": 512, "n_routed_experts": 256, "num_nextn_predict_layers": 1}, {"vocab_size": 262_144},
]  # fmt: skip


@pytest.mark.parametrize("keys", CONFIGS, ids=str)
def test_a_config_of_real_life_is_welcome(keys: dict[str, object], folder: Path) -> None:
    edit(folder / "config.json", **keys)
    check(folder)


TOKENIZERS: list[dict[str, object]] = [
    {"special_tokens_map_file": "/etc/hostname"}, {"tokenizer_file": "/home/maker/.cache/tokenizer.json"},
    {"tokenizer_file": None, "vocab_file": "vocab.json"}, {"tokenizer_class": "PreTrainedTokenizerFast"},
    {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}, {"init_inputs": []}, {"_commit_hash": None},
    {"bos_token": {"__type": "AddedToken", "content": "<s>"}}, {"model_max_length": 10**30},
    {"chat_template": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"},
    {"chat_template": "{% for m in messages %}{% if loop.index0 > 9 %}{% break %}{% endif %}{% endfor %}"},
    {"chat_template": "{% if this is not a template"}, {"chat_template": None}, {"processor_class": "XProcessor"},
    {"tokenizer_class": "Qwen2TokenizerFast"}, {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]},
]  # fmt: skip


@pytest.mark.parametrize("keys", TOKENIZERS, ids=str)
def test_a_tokenizer_of_real_life_is_welcome(keys: dict[str, object], folder: Path) -> None:
    edit(folder / "tokenizer_config.json", **keys)
    check(folder)
    refuse_bombs(templates(folder))


def test_what_lies_beside_a_model_on_a_hub_is_welcome(folder: Path) -> None:
    for name in ("README.md", ".gitattributes", "onnx/model.onnx", "original/params.json", ".git/hooks/commit.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    pickled(folder, "pytorch_model.bin")  # lies there in half of all repositories; nothing reads it
    check(folder)


def test_a_folder_of_a_hubs_cache_is_welcome(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--maker--stories"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(cache / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    check(snapshot)
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    check(linked)


def test_a_link_leads_to_no_folder(folder: Path) -> None:
    (folder / ".h").mkdir()
    (folder / ".h" / "x.jinja").symlink_to("/etc/hostname")
    check(folder)
    for target in (".h", "."):
        link = folder / "additional_chat_templates"
        link.symlink_to(target)
        with pytest.raises(ModelError, match="additional_chat_templates in .* is a link to a folder"):
            check(folder)
        link.unlink()


def test_weights_may_lie_on_another_disk(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "large")
    (folder / "model.safetensors").symlink_to(tmp_path / "large")
    check(folder)


def test_what_is_shipped_and_shared_is_welcome(guide_model: Path, shared_data: Path) -> None:
    check(guide_model)
    refuse_bombs(templates(guide_model))
    for tokenizer in sorted((shared_data / "tokenizers").iterdir()):
        check_code(tokenizer, json.loads((tokenizer / "config.json").read_text()), trusted=False)
        refuse_bombs(templates(tokenizer))


FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "gemma3_text", "phi3", "falcon", "opt", "mamba", "gpt_neox")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_welcome(family: str, folder: Path, tmp_path: Path) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
    config = CONFIG_MAPPING[family](**small)
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / family, max_shard_size="20KB")
    check(tmp_path / family, tokenizer=False)


def test_what_peft_saves_is_welcome(folder: Path, tmp_path: Path) -> None:
    """The keys of PEFT 0.17's adapter_config.json, in the layout of its save_pretrained."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    edit(adapter / "adapter_config.json", **{
        "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "Qwen/Qwen2-1.5B", "bias": "none",
        "corda_config": None, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "layer_replication": None, "loftq_config": {},
        "lora_alpha": 16, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
        "peft_type": "LORA", "r": 8, "rank_pattern": {}, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
    })  # fmt: skip
    shutil.copy(folder / "model.safetensors", adapter / "adapter_model.safetensors")
    assert check_adapter(adapter)["r"] == 8
    edit(
        adapter / "adapter_config.json", auto_mapping={"base_model_class": "X", "parent_library": "transformers.models"}
    )
    check_adapter(adapter)
    for keys in ({"auto_mapping": {"parent_library": "evil"}}, {"megatron_config": {"a": 1}}):
        whole = (adapter / "adapter_config.json").read_text()
        edit(adapter / "adapter_config.json", **keys)
        with pytest.raises(ModelError, match="foreign module"):
            check_adapter(adapter)
        (adapter / "adapter_config.json").write_text(whole)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        check_adapter(adapter)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_what_can_be_converted_says_so(method: str, folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    check_source(folder)
    with pytest.raises(SourceError, match=f"(?s){method.upper()}.*nibble quantize stories"):
        check(folder)


quickly = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@quickly
@given(data=st.data())
def test_a_damaged_weight_file_is_refused_or_read_and_nothing_else(
    data: st.DataObject, stories: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = bytearray((stories / "model.safetensors").read_bytes())
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, length - 1), st.integers(0, 255)), max_size=4)):
        whole[place] = byte
    file = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))])
    try:
        assert isinstance(read_header(file), dict)
    except ModelError as error:
        assert "model.safetensors" in error.message
    shutil.rmtree(file.parent)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=6,
)


@quickly
@given(data=st.data())
def test_a_mutated_config_is_refused_or_welcome_and_nothing_else(
    data: st.DataObject, stories: Path, tmp_path_factory
) -> None:
    folder = tmp_path_factory.mktemp("mutant")
    for path in stories.iterdir():
        (folder / path.name).symlink_to(path) if path.suffix == ".safetensors" else shutil.copy(path, folder)
    name = data.draw(st.sampled_from(["config.json", "tokenizer_config.json", "generation_config.json"]))
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    known = [*content, "quantization_config", "text_config", "auto_map", "attn_implementation", "chat_template",
             "tokenizer_class", "vocab_file", "rope_scaling", "num_hidden_layers"]  # fmt: skip
    for key in data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=3)):
        content[key] = data.draw(VALUES)
    text = json.dumps(content)
    if data.draw(st.booleans()):
        text = text[: data.draw(st.integers(0, len(text)))]
    (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    card = judge_or_none(folder)
    assert card is None or card.name == "mutant"
    shutil.rmtree(folder)


def judge_or_none(folder: Path):
    try:
        return judge(folder, "mutant", trusted=False, settings=Settings())
    except NibbleError as error:
        assert error.message
        return None
