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
    manifests = [publish.read_manifest(folder) for folder in (one, other)]
    assert [{**manifest, "files": sorted(manifest["files"])} for manifest in manifests][0] == {
        **manifests[1], "files": sorted(manifests[1]["files"])
    }  # fmt: skip


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
