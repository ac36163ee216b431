"""Estimates against what the engine then holds, and against folders that are odd."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Qwen2Config, Qwen3Config

from nibble import devices, probe
from nibble.errors import NibbleError
from nibble.estimate import cost, estimates, needed_bytes, read_shape
from nibble.lowbit import attention, int4_cpu, int4_cuda, lean
from nibble.lowbit.formats import FORMATS
from nibble.lowbit.linear import LowBitLinear, prepare
from nibble.lowbit.quantizer import LowBitConfig, LowBitQuantizer, pack_model
from nibble.lowbit.recipes import RECIPES
from nibble.transformers import AutoModelForCausalLM as LowBitModel
from tests.support.ggufs import write_gguf
from tests.support.headers import write_headers

ROOT = Path(__file__).parents[1]
RATES = dict.fromkeys(FORMATS, 1e10)
LAYER_S = {"lean": 1e-4, "kernel": 2e-4, "portable": 5e-4, "dense": 3e-4}
MACHINE = replace(
    probe.unmeasured(), bandwidth=2e10, rates=RATES, kernels=tuple(RECIPES), layer_s=LAYER_S, token_s=1e-4, measured=1.0
)
CHAT = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000, "max_position_embeddings": 512,
}  # fmt: skip


def tensors_of(model: nn.Module, dtype: str = "BF16") -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a model's files, each once."""
    return {name: (dtype, tuple(tensor.shape)) for name, tensor in model.named_parameters()}


def write_config(folder: Path, config: Any) -> Path:
    """A folder with the headers of a model of this configuration."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return write_headers(folder, config.to_dict(), tensors_of(model))


def held_bytes(model: Any) -> int:
    """Bytes of every tensor that a model holds, each piece of memory once."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [module._fast.terms for module in model.modules() if isinstance(module, LowBitLinear) and module._fast]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", [Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("tied", [True, False])
def test_the_bytes_of_the_tensors_are_told_exactly(tmp_path: Path, name: str, family: Any, tied: bool) -> None:
    config = family(**CHAT, tie_word_embeddings=tied, dtype="bfloat16")
    folder = write_config(tmp_path / "model", config)
    told = estimates(folder, replace(MACHINE, process_bytes=0), formats=[name], context=40)[0]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if FORMATS[name].quantized:
        pack_model(model, name)
    attention.use(model)
    lean.offer(model)
    prepare(model)
    cache = DynamicCache(config=config)
    with torch.inference_mode():
        model(torch.ones(1, 39, dtype=torch.long), **{lean.CACHE: cache})
        model(torch.ones(1, 1, dtype=torch.long), **{lean.CACHE: cache})
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    tables = sum(buffer.nbytes for buffer in model.buffers() if buffer.dtype == torch.float32 and buffer.ndim == 1)
    small = 1000 * cost.TOKENIZER_BYTES
    assert told.steady_bytes - small == pytest.approx(held_bytes(model) - tables + cached, abs=0)
    assert told.peak_bytes > told.steady_bytes


def test_disk_is_told_for_what_is_then_saved(tmp_path: Path, guide_model: Path) -> None:
    for name in ("sym_int4", "asym_int5", "fp8_e4m3"):
        told = estimates(guide_model, MACHINE, formats=[name])[0]
        LowBitModel.from_pretrained(guide_model, load_in_low_bit=name).save_low_bit(tmp_path / name)
        written = (tmp_path / name / "model.safetensors").stat().st_size
        assert told.disk_bytes == pytest.approx(written, rel=0.01)
        again = estimates(tmp_path / name, MACHINE)
        assert [row.format for row in again] == [name]
        assert again[0].disk_bytes == written
        assert again[0].steady_bytes == told.steady_bytes
        assert again[0].tokens_per_s == pytest.approx(told.tokens_per_s)


def measured(folder: Path, name: str, context: int) -> dict[str, float]:
    """What the real engine takes in a fresh process."""
    program = [sys.executable, str(ROOT / "bench" / "estimates.py"), "--measure", str(folder), "--formats", name]
    run = subprocess.run(
        [*program, "--context", str(context), "--answers", "0"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> probe.Machine:
    """This machine, really measured."""
    return probe.ensure(tmp_path_factory.mktemp("home"))


def test_the_machine_is_measured_and_known_afterwards(machine: probe.Machine) -> None:
    assert machine.rates.keys() == FORMATS.keys()
    assert machine.layer_s.keys() == {"lean", "kernel", "portable", "dense"}
    assert all(figure > 0 for figure in (*machine.rates.values(), machine.bandwidth, machine.process_bytes))
    assert machine.identity == probe.identity()


def test_memory_of_the_guide(machine: probe.Machine, guide_model: Path) -> None:
    found = measured(guide_model, "sym_int8", 200)
    told = estimates(guide_model, machine, formats=["sym_int8"], context=int(found["context"]))[0]
    assert told.steady_bytes == pytest.approx(found["steady_bytes"], rel=0.15)
    assert told.peak_bytes == pytest.approx(found["peak_bytes"], rel=0.15)


@pytest.mark.full
@pytest.mark.parametrize("name", ["sym_int4", "asym_int5", "nf4", "fp8_e5m2", "bf16"])
def test_memory_beside_the_process(machine: probe.Machine, tmp_path: Path, guide_model: Path, name: str) -> None:
    """A model of 145 million weights: what it adds to the process, for the process itself would hide an error."""
    from bench.estimates import Model, write

    shape = {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": 6144, "tie_word_embeddings": True,
    }  # fmt: skip
    write(tmp_path / "model", Model("qwen2", "guide", shape), None)
    found = measured(tmp_path / "model", name, 200)
    told = estimates(tmp_path / "model", machine, formats=[name], context=int(found["context"]))[0]
    for key in ("steady_bytes", "peak_bytes"):
        assert getattr(told, key) == pytest.approx(found[key], rel=0.15)
    # What a first answer loads, and what the allocator keeps, differ by some ten million bytes from run to run.
    own = told.steady_bytes - machine.process_bytes
    assert own == pytest.approx(found["steady_bytes"] - machine.process_bytes, rel=0.15, abs=6e7)


def test_tables_agree_with_what_they_stand_for() -> None:
    assert {name: cost.planes(fmt) for name, fmt in FORMATS.items() if cost.planes(fmt)} == {
        name: recipe.planes for name, recipe in RECIPES.items()
    }
    assert {module.split(".")[2] for module, _ in lean.LAYERS} == cost.LEAN
    assert cost.KERNEL_ROWS == {"cpu": int4_cpu.ROW_MULTIPLE, "cuda": int4_cuda.TILE_ROWS}


FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "opt",
    "bloom", "falcon", "starcoder2", "stablelm", "olmo2", "granite", "cohere", "gpt_bigcode", "mpt", "glm4", "smollm3",
    "mixtral", "qwen3_moe", "qwen2_moe",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_packed_follows_from_names_and_shapes(tmp_path: Path, family: str) -> None:
    config = AutoConfig.for_model(family)
    for key in ("num_hidden_layers", "n_layer", "n_layers"):
        if key in config.to_dict():
            setattr(config, key, 1)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = read_shape(write_headers(tmp_path / "model", config.to_dict(), tensors_of(model)))
    found = sorted((matrix.rows, matrix.columns) for matrix in shape.matrices)
    if shape.tied:
        found = sorted([*found, (shape.tied.rows, shape.tied.columns)])
    names = LowBitQuantizer(LowBitConfig("sym_int4")).formats(model)
    # A gate of one row is nothing.
    packed = sorted(tuple(model.get_submodule(name).weight.shape) for name in names if "expert_gate" not in name)
    assert [size for size in found if size[0] > 1] == packed


def test_a_folder_of_mixed_formats(tmp_path: Path) -> None:
    matrices = {"sym_int8": (64, 128), "nf4": (128, 192), "sym_int4": (96, 64), "fp8_e4m3": (32, 100)}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"model.embed_tokens.weight": ("BF16", (100, 64))}
    for number, (name, size) in enumerate(matrices.items()):
        fmt = FORMATS[name]
        tensors[f"model.layers.0.m{number}.weight"] = ("U8", fmt.code_shape(*size))
        scale = "F32" if fmt.scale == "float32" else "F16"
        tensors[f"model.layers.0.m{number}.weight_scale"] = (scale, fmt.scale_shape(*size))
    packing = {"quant_method": "nibble", "low_bit": "sym_int4", "overrides": {"m0": "sym_int8"}}
    folder = write_headers(tmp_path / "m", {"model_type": "llama", "quantization_config": packing}, tensors)
    shape = read_shape(folder)
    assert {matrix.form: (matrix.rows, matrix.columns) for matrix in shape.matrices} == matrices
    assert shape.dense_bytes == 2 * 100 * 64


def test_sources_are_told_as_what_they_become(tmp_path: Path, stories: Path) -> None:
    plain = estimates(stories, MACHINE, formats=["nf4"])
    assert estimates(write_gguf(stories, tmp_path / "a.gguf", "Q8_0").parent, MACHINE, formats=["nf4"]) == plain
    shape = {"model.embed_tokens.weight": ("F16", (1000, 256)), "lm_head.weight": ("F16", (1000, 256))}
    for method, words in {"awq": (256, 704 // 8), "gptq": (256 // 8, 704)}.items():
        config = {"model_type": "llama", "quantization_config": {"quant_method": method, "bits": 4}}
        extra = {
            "model.layers.0.mlp.up_proj.qweight": ("I32", words),
            "model.layers.0.mlp.up_proj.qzeros": ("I32", (8, 88)),
        }
        found = read_shape(write_headers(tmp_path / method, config, {**shape, **extra}))
        assert {(matrix.rows, matrix.columns) for matrix in found.matrices} == {(704, 256), (1000, 256)}


def test_speed_follows_from_the_machine(tmp_path: Path) -> None:
    qwen2 = write_config(tmp_path / "2", Qwen2Config(**CHAT, tie_word_embeddings=True))
    qwen3 = write_config(tmp_path / "3", Qwen3Config(**CHAT, tie_word_embeddings=True))

    def speed(folder: Path, name: str, machine: probe.Machine = MACHINE) -> float:
        return estimates(folder, machine, formats=[name])[0].tokens_per_s

    weights = 3 * (256 * 64 * 8 + 256 * 64 * 4 + 3 * 256 * 704) + 1000 * 256
    biases = 3 * (64 * 8 + 2 * 256) + 256
    cache = 128 * 3 * 2 * 2 * 2 * 64
    seconds = weights / 1e10 + biases / 1e10 + 3 * 1e-4 + 1e-4 + cache / 2e10
    assert speed(qwen2, "sym_int4") == pytest.approx(cost.KEPT / seconds)
    assert speed(qwen2, "sym_int4") > speed(qwen3, "sym_int4") > speed(qwen3, "bf16") > speed(qwen3, "fp8")
    slower = replace(MACHINE, rates=RATES | {"sym_int4": 1e9})
    assert speed(qwen2, "sym_int4", slower) < speed(qwen2, "sym_int4")
    assert speed(qwen2, "asym_int4", slower) == speed(qwen2, "asym_int4")
    assert speed(qwen2, "sym_int4", replace(MACHINE, kernels=())) < speed(qwen2, "sym_int4")
    assert speed(qwen2, "sym_int4", probe.unmeasured()) == 0
    gpu = replace(MACHINE, device="xpu", device_bytes=2**30)
    assert speed(qwen2, "sym_int4", gpu) == 0
    told = estimates(qwen2, gpu, formats=["sym_int8"], context=0)[0]
    assert told.steady_bytes == told.disk_bytes
    assert estimates(qwen2, gpu.on("cpu"), formats=["sym_int8"]) == estimates(qwen2, MACHINE, formats=["sym_int8"])


def test_sliding_windows_forget(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "linear_attention"]
    config = {"model_type": "x", **CHAT, "layer_types": kinds, "sliding_window": 100}
    shape = read_shape(write_headers(tmp_path, config, {"model.embed_tokens.weight": ("BF16", (1000, 256))}))
    assert shape.cache_bytes(1000) == (100 + 1000) * 2 * 2 * 2 * 64
    assert shape.cache_bytes(10) == 2 * 10 * 2 * 2 * 2 * 64


@pytest.mark.parametrize(("limit", "used", "fits"), [(10**12, 0, None), (3 * 10**8, 10**8, False), ("max", 0, None)])
def test_what_fits_is_within_the_control_group(
    tmp_path: Path, guide_model: Path, monkeypatch: pytest.MonkeyPatch, limit: object, used: int, fits: bool | None
) -> None:
    free = MACHINE.free_bytes
    (tmp_path / "max").write_text(f"{limit}\n")
    (tmp_path / "current").write_text(f"{used}\n")
    monkeypatch.setattr(devices, "CGROUP_FILES", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    rows = estimates(guide_model, MACHINE)
    expected = min(free, limit - used) if isinstance(limit, int) else free
    assert MACHINE.free_bytes == pytest.approx(expected, rel=0.2)
    assert [row.fits for row in rows] == [row.peak_bytes <= MACHINE.free_bytes for row in rows]
    assert fits is None or not any(row.fits for row in rows)


KEYS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "intermediate_size", "layer_types", "sliding_window", "text_config", "quantization_config",
    "num_local_experts", "num_experts_per_tok",
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from((*KEYS, "quant_method", "low_bit")), inner)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["model.embed_tokens.weight", "lm_head.weight", "a.weight", "a.weight_scale", "a.qweight", "b.experts.0.w.weight",
     "weight", "norm.weight", "", ".", "x"]
)  # fmt: skip
TENSOR = st.tuples(
    st.sampled_from(["F32", "BF16", "F16", "U8", "I32"]), st.lists(st.integers(0, 70), max_size=4).map(tuple)
)
LOW_BIT = st.fixed_dictionaries(
    {"quantization_config": st.fixed_dictionaries(
        {"quant_method": st.sampled_from(["nibble", "awq", "gptq", "other"])}, optional={"low_bit": JSON, "bits": JSON}
    )}
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.dictionaries(st.sampled_from(KEYS), JSON), packing=LOW_BIT | st.just({}),
    tensors=st.dictionaries(NAMES, TENSOR, max_size=6), context=st.integers(0, 10**6),
)  # fmt: skip
def test_odd_folders_get_an_estimate_or_a_sentence(
    tmp_path: Path, config: dict[str, Any], packing: dict[str, Any], tensors: Any, context: int
) -> None:
    folder = write_headers(tmp_path, config | packing, tensors)
    try:
        rows = estimates(folder, MACHINE, context=context)
    except NibbleError as error:
        assert str(error)
        return
    for row in rows:
        assert 0 < row.steady_bytes <= row.peak_bytes
        assert row.disk_bytes >= 0
        assert 0 <= row.tokens_per_s < 1e5


def test_figures_of_another_machine_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nibble.probe.machine import keep

    assert probe.known(tmp_path) is None
    keep(MACHINE, tmp_path)
    assert probe.known(tmp_path) == MACHINE
    assert not list(tmp_path.glob(".*"))
    monkeypatch.setattr(devices, "usable_cores", lambda: 77)
    assert probe.known(tmp_path) is None


@given(content=st.one_of(st.binary(max_size=30), JSON.map(lambda value: json.dumps(value).encode())))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_broken_file_of_figures_is_no_figures(tmp_path: Path, content: bytes) -> None:
    (tmp_path / probe.FILE).write_bytes(content)
    assert probe.known(tmp_path) is None


@pytest.mark.parametrize("change", [{"bandwidth": -1}, {"rates": {"nf4": "fast"}}, {"cores": None}, {"layer_s": [1]}])
def test_figures_that_are_none_are_no_figures(tmp_path: Path, change: dict[str, Any]) -> None:
    from nibble.probe.machine import keep

    keep(MACHINE, tmp_path)
    content = json.loads((tmp_path / probe.FILE).read_text())
    (tmp_path / probe.FILE).write_text(json.dumps(content | change))
    assert probe.known(tmp_path) is None


def test_the_console_tells_estimates(home: Path, guide_model: Path) -> None:
    from nibble.probe.machine import keep

    keep(MACHINE, home)

    def nibble(*words: str) -> str:
        run = subprocess.run([sys.executable, "-m", "nibble", *words], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout

    rows = {row["format"]: row for row in json.loads(nibble("models", "guide", "--json"))}
    assert rows.keys() == FORMATS.keys()
    assert rows["sym_int4"]["disk_bytes"] < rows["bf16"]["disk_bytes"]
    assert "at its peak" in nibble("models", "guide")
    listed = {card["name"]: card for card in json.loads(nibble("models", "--json"))}
    assert listed["guide"]["estimate"] == rows["sym_int4"] | {"fits": listed["guide"]["estimate"]["fits"]}
    assert needed_bytes(guide_model, "sym_int4", home) == rows["sym_int4"]["peak_bytes"]
