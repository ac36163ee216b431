"""Packing tensor by tensor writes what loading in low bit and saving would, for every format and family."""

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nibble import publish
from nibble.errors import FormatError, ModelError
from nibble.lowbit import FORMATS, LowBitLinear, quantize
from nibble.lowbit.quantizer import LowBitConfig
from nibble.packing import Packing, pack, plan, writing
from nibble.shards import Writer
from nibble.sources import Stored, open_source
from nibble.sources.safetensors import Safetensors
from nibble.transformers import AutoModelForCausalLM
from tests.support.downloads import Told

PACKED = [name for name, row in FORMATS.items() if row.quantized]

SMALL = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}

FAMILIES: dict[str, dict] = {
    "qwen2": {**GROUPED, "tie_word_embeddings": True},
    "qwen3": {**GROUPED, "head_dim": 16},
    "mistral": GROUPED,
    "gemma": {**GROUPED, "head_dim": 16},
    "gemma2": {**GROUPED, "head_dim": 16},
    "phi3": GROUPED,
    "gpt_neox": SMALL,
    "opt": {**SMALL, "ffn_dim": 80, "word_embed_proj_dim": 48},
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "qwen2_moe": {**GROUPED, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
}
"""Name -> what is small about it. Mixtral and Qwen2-MoE merge their experts on loading, Phi-3 has them merged."""


def random_model(folder: Path, family: str, **more: object) -> Path:
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family] | more)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("tied"), "qwen2")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def greedy(model: torch.nn.Module, length: int = 24) -> list[int]:
    ids = torch.tensor([[1, 5, 9, 2, 7]])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, pad_token_id=0
    )
    return out[0].tolist()


def saved(source: Path, folder: Path, packing: Packing) -> Path:
    """The folder that loading in low bit and saving writes."""
    AutoModelForCausalLM.from_pretrained(
        source, load_in_low_bit=packing.low_bit, modules_to_not_convert=packing.skip, overrides=packing.overrides
    ).save_low_bit(folder)
    return folder


def assert_alike(one: Path, other: Path) -> None:
    """The same tensors under the same names, byte for byte, and the same files beside them."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value.contiguous().view(torch.uint8), theirs[name].contiguous().view(torch.uint8)), name
    assert json.loads((one / "config.json").read_text()) == json.loads((other / "config.json").read_text())
    ours, theirs = ({**facts, "files": sorted(facts["files"])} for facts in map(publish.read_manifest, (one, other)))
    assert ours == theirs


@pytest.mark.parametrize("model", [pytest.param("guide_model", marks=pytest.mark.full), "stories"])
def test_every_format_at_once(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Each folder is what a save in that format would be, and each tensor was read once for all of them."""
    folder, read = request.getfixturevalue(model), []

    class Counting(Safetensors):
        @property
        def tensors(self) -> Mapping[str, Stored]:
            def counted(name: str, stored: Stored) -> Callable[[], torch.Tensor]:
                return lambda: read.append(name) or stored.read()

            return {
                name: Stored(one.shape, one.nbytes, one.low_bit, counted(name, one))
                for name, one in super().tensors.items()
            }

    told = Told()
    wanted = {tmp_path / name: Packing(name) for name in PACKED}
    results = pack(Counting(folder), wanted, told)
    assert [result.folder for result in results] == list(wanted)
    assert len(read) == len(set(read))
    assert told.steps[-1][:2] == (len(read), len(read))
    for result in results:
        publish.verify(result.folder, contents=True)
        tensors = weights(result.folder)
        assert result.nbytes == sum(tensor.nbytes for tensor in tensors.values())
        reference = AutoModelForCausalLM.from_pretrained(folder, load_in_low_bit=result.format)
        ours = AutoModelForCausalLM.load_low_bit(result.folder)
        state = reference.state_dict()
        assert state.keys() == ours.state_dict().keys()
        assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    assert greedy(ours) == greedy(reference)


@pytest.mark.parametrize("name", PACKED)
def test_the_same_folder_as_a_save(stories: Path, tmp_path: Path, name: str) -> None:
    pack(open_source(stories), {tmp_path / "ours": Packing(name)}, Told())
    assert_alike(tmp_path / "ours", saved(stories, tmp_path / "theirs", Packing(name)))


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    folder = random_model(tmp_path / "source", family)
    packing = Packing("sym_int4")
    [result] = pack(open_source(folder), {tmp_path / "ours": packing}, told := Told())
    assert not told.notes
    assert_alike(result.folder, saved(folder, tmp_path / "theirs", packing))
    assert greedy(AutoModelForCausalLM.load_low_bit(result.folder)) == greedy(
        AutoModelForCausalLM.from_pretrained(folder, load_in_low_bit="sym_int4")
    )


def test_a_family_whose_layers_are_made_of_other_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "hrm_text", GROUPED)
    folder = random_model(tmp_path / "source", "hrm_text")
    [result] = pack(open_source(folder), {tmp_path / "ours": Packing("sym_int4")}, told := Told())
    assert "loaded whole" in told.notes[0]
    assert_alike(result.folder, saved(folder, tmp_path / "theirs", Packing("sym_int4")))


def test_names_that_only_the_body_of_a_model_has(tmp_path: Path) -> None:
    """A checkpoint saved from the model without its head: `layers.0…` for `model.layers.0…`."""
    folder = random_model(tmp_path / "source", "qwen2")
    tensors = {name.removeprefix("model."): value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    [result] = pack(open_source(folder), {tmp_path / "ours": Packing("sym_int8")}, Told())
    assert greedy(AutoModelForCausalLM.load_low_bit(result.folder)) == greedy(
        AutoModelForCausalLM.from_pretrained(folder, load_in_low_bit="sym_int8")
    )


@pytest.mark.parametrize("skip", [(), ("lm_head",)])
@pytest.mark.parametrize("same", [True, False])
def test_a_head_of_its_own_though_the_configuration_ties_it(
    same: bool, skip: tuple[str, ...], tied: Path, tmp_path: Path
) -> None:
    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() * (1 if same else 2)

    folder = spoiled(tied, tmp_path / "own", add_head)
    packing = Packing("sym_int4", skip)
    [result] = pack(open_source(folder), {tmp_path / "ours": packing}, Told())
    assert_alike(result.folder, saved(folder, tmp_path / "theirs", packing))
    head = AutoModelForCausalLM.load_low_bit(result.folder).lm_head
    wanted = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head.weight, wanted.bfloat16() if skip else quantize(wanted, "sym_int4").codes)


PARTS = st.sampled_from(["lm_head", "layers.0", "layers.1.mlp", "q_proj", "down_proj", "self_attn", "nothing.here"])
MIXED = st.builds(
    Packing,
    st.sampled_from(["sym_int4", "nf4", "asym_int5"]),
    st.lists(PARTS, max_size=2).map(tuple),
    st.dictionaries(PARTS, st.sampled_from(["sym_int8", "fp8_e4m3", "bf16", "sym_int4"]), max_size=3),
)


@settings(max_examples=8, deadline=None)
@given(MIXED)
def test_mixed_bits(tied: Path, tmp_path_factory: pytest.TempPathFactory, packing: Packing) -> None:
    place = tmp_path_factory.mktemp("mixed")
    config = LowBitConfig(packing.low_bit, list(packing.skip), dict(packing.overrides))
    [result] = pack(open_source(tied), {place / "ours": packing}, Told())
    assert_alike(result.folder, saved(tied, place / "theirs", packing))
    again = AutoModelForCausalLM.load_low_bit(result.folder)
    for name, module in again.named_modules():
        if isinstance(module, LowBitLinear):
            assert module.format == config.format_of(name)
        elif isinstance(module, torch.nn.Linear):
            assert config.format_of(name) is None


@given(MIXED, st.sampled_from(["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]))
def test_the_last_override_counts_and_a_skipped_module_stays(packing: Packing, module: str) -> None:
    config = LowBitConfig(packing.low_bit, list(packing.skip), dict(packing.overrides))

    def held(pattern: str) -> bool:
        parts, wanted = module.split("."), pattern.split(".")
        return any(parts[start : start + len(wanted)] == wanted for start in range(len(parts)))

    names = [name for pattern, name in packing.overrides.items() if held(pattern)] or [packing.low_bit]
    expected = None if any(map(held, packing.skip)) or names[-1] == "bf16" else names[-1]
    found = config.format_of(module)
    assert (found.name if found else None) == expected
    assert LowBitConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_overrides_that_are_none() -> None:
    with pytest.raises(FormatError, match="sym_int3"):
        LowBitConfig("sym_int4", overrides={"lm_head": "sym_int3"})
    with pytest.raises(FormatError, match="table"):
        LowBitConfig("sym_int4", overrides=["lm_head"])


class Already(Safetensors):
    """A source that has packed tensors: every linear weight in a form of ours, some in another, one dense."""

    kind = "gguf"

    def __init__(self, folder: Path, forms: Mapping[str, str]) -> None:
        super().__init__(folder)
        self.forms = forms

    def form(self, name: str) -> str:
        return next((form for part, form in self.forms.items() if f"{part}.weight" in name), "")

    @property
    def tensors(self) -> Mapping[str, Stored]:
        found = {}
        for name, one in super().tensors.items():
            form = self.form(name)
            read = (lambda one=one, form=form: quantize(one.read(), form)) if form else one.read
            found[name] = Stored(one.shape, one.nbytes, form, read)
        return found

    @property
    def dense(self) -> frozenset[str]:
        return frozenset(name for name in super().tensors if name.endswith("o_proj.weight"))


def test_what_a_source_has_already_is_kept(tied: Path, tmp_path: Path) -> None:
    """As a GGUF file of mixed bits: every weight keeps its form and its codes; the tied head has the embedding's."""
    forms = {"down_proj": "sym_int8", "1.self_attn.q_proj": "nf4", "proj": "sym_int4", "embed_tokens": "asym_int5"}
    source = Already(tied, {"o_proj": "", **forms})
    [result] = pack(source, {tmp_path / "ours": Packing("")}, Told())
    model = AutoModelForCausalLM.load_low_bit(result.folder)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowBitLinear)}
    assert result.format == "sym_int4"
    assert result.kept == len(layers) == 2 * 6 + 1
    for name, layer in layers.items():
        tensor = "model.embed_tokens.weight" if name == "lm_head" else f"{name}.weight"
        expected = source.tensors[tensor].read()
        assert layer.format == expected.format
        assert torch.equal(layer.weight, expected.codes) and torch.equal(layer.weight_scale, expected.scales)
    assert type(model.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    embedding = source.tensors["model.embed_tokens.weight"].read().dequantize().bfloat16()
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert publish.read_manifest(result.folder)["converted_from"] == "gguf"
    overrides = dict(json.loads((result.folder / "config.json").read_text())["quantization_config"]["overrides"])
    assert overrides["down_proj"] == "sym_int8" and overrides["o_proj"] == "bf16" and "v_proj" not in overrides


def test_another_form_is_made_of_the_values(tied: Path, tmp_path: Path) -> None:
    source = Already(tied, {"proj": "sym_int4"})
    pack(source, {tmp_path / "ours": Packing("sym_int8")}, Told())
    model = AutoModelForCausalLM.load_low_bit(tmp_path / "ours")
    name = "model.layers.0.mlp.up_proj"
    expected = quantize(source.tensors[f"{name}.weight"].read().dequantize(), "sym_int8")
    assert torch.equal(model.get_submodule(name).weight, expected.codes)


def spoiled(tied: Path, folder: Path, spoil: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(tied, folder)
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


SPOILS = {
    "lack 1 of the model's weights, model.norm.weight": lambda tensors: tensors.pop("model.norm.weight"),
    "lack 1 of the model's weights, model.layers.1.mlp.up_proj": lambda all_: all_.pop(
        "model.layers.1.mlp.up_proj.weight"
    ),
    "has the shape": lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}),
    "up_proj.weight of broken cannot be packed. .* NaN": lambda tensors: tensors[
        "model.layers.0.mlp.up_proj.weight"
    ].fill_(float("nan")),
}


@pytest.mark.parametrize("words", SPOILS)
def test_a_source_that_is_wrong_leaves_nothing(words: str, tied: Path, tmp_path: Path) -> None:
    folder = spoiled(tied, tmp_path / "broken", SPOILS[words])
    with pytest.raises(ModelError, match=words):
        pack(open_source(folder), {tmp_path / "a": Packing("nf4"), tmp_path / "b": Packing("sym_int4")}, Told())
    assert not {"a", "b"} & {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob(".*.tmp-*"))


def test_a_family_that_is_unknown(tied: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tied, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for family, words in (("alien", "does not know"), ("bert", "continues a text"), ("", "unnamed")):
        (folder / "config.json").write_text(json.dumps({**config, "model_type": family, "num_attention_heads": "x"}))
        with pytest.raises(ModelError, match=words):
            plan(open_source(folder), Packing("nf4"))


def test_a_low_bit_folder_is_not_quantized_again(tied: Path, tmp_path: Path) -> None:
    pack(open_source(tied), {tmp_path / "low": Packing("nf4")}, Told())
    with pytest.raises(ModelError, match="low-bit model already"):
        open_source(tmp_path / "low")


def test_the_disk_is_asked_first(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {tmp_path / "a": Packing("nf4"), tmp_path / "b": Packing("sym_int8")}
    need = sum(plan(open_source(tied), packing).nbytes for packing in wanted.values())
    usage = type("Usage", (), {"free": need - 1})
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ModelError, match=r"needs 0\.1 MB in .*, 0\.1 MB are free"):
        pack(open_source(tied), wanted, Told())
    usage.free = need
    pack(open_source(tied), wanted, Told())


def test_a_disk_that_becomes_full_leaves_the_old_model(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(open_source(tied), {tmp_path / "m": Packing("sym_int8")}, Told())
    real = Writer.finish

    def full(writer: Writer) -> None:
        real(writer)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Writer, "finish", full)
    with pytest.raises(OSError, match="No space"):
        pack(open_source(tied), {tmp_path / "m": Packing("nf4")}, Told())
    assert publish.read_manifest(tmp_path / "m")["format"] == "sym_int8"
    publish.verify(tmp_path / "m", contents=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m.lock", "m"]


def test_many_shards(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SHARD_BYTES", 10_000)
    [result] = pack(open_source(tied), {tmp_path / "m": Packing("sym_int4")}, Told())
    index = json.loads((result.folder / "model.safetensors.index.json").read_text())
    files = {path.name for path in result.folder.glob("*.safetensors")}
    assert len(files) > 3 and set(index["weight_map"].values()) == files
    assert index["metadata"]["total_size"] == result.nbytes
    assert greedy(AutoModelForCausalLM.load_low_bit(result.folder)) == greedy(
        AutoModelForCausalLM.from_pretrained(tied, load_in_4bit=True)
    )
