"""AWQ checkpoints in AutoAWQ's layout: the same codes, the same values within the rounding of a minimum."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from nibble.errors import ModelError, SourceError
from nibble.estimate import estimates
from nibble.lowbit.blocks import QuantizedTensor, unpack_bits
from nibble.lowbit.linear import LowBitLinear
from nibble.probe import unmeasured
from nibble.screen import check
from nibble.sources import open_source
from nibble.sources.awq import Gemm
from nibble.tasks import quantize
from nibble.transformers import AutoModelForCausalLM as LowBit
from tests.support.packers import Grouped, Recipe, awq_tensors, grouped, stored, write_packed
from tests.support.reports import SILENT

SETTINGS: dict[str, Any] = {
    "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": None,
}  # fmt: skip


def pack(weight: torch.Tensor) -> tuple[Grouped, dict[str, torch.Tensor]]:
    matrix = grouped(weight, Recipe(group=32))
    return matrix, awq_tensors(matrix)


@given(
    out=st.integers(1, 4), groups=st.integers(1, 3), size=st.sampled_from((32, 64, 128)), seed=st.integers(0, 2**31),
    sym=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_codes_stay_and_values_are_within_a_minimums_rounding(
    out: int, groups: int, size: int, seed: int, sym: bool
) -> None:
    weight = torch.randn(out * 8, groups * size, generator=torch.Generator().manual_seed(seed)) * 0.1
    matrix = grouped(weight, Recipe(group=size, sym=sym))
    ours = Gemm("layer", stored(awq_tensors(matrix)), {"group_size": size, "zero_point": not sym})
    ours.check()
    read = ours.read()
    assert isinstance(read, QuantizedTensor)
    assert read.format.name == ours.low_bit == ("sym_int4" if sym else "asym_int4")
    assert torch.equal(unpack_bits(read.codes, 4).flatten(1).long(), matrix.codes)
    assert torch.equal(read.scales.flatten(2)[..., 0] if not sym else read.scales, spread(matrix.scales, size))
    off = (read.dequantize().double() - matrix.dense().double()).abs()
    assert (off <= matrix.bound()).all() if not sym else not off.any()


def spread(scales: torch.Tensor, size: int) -> torch.Tensor:
    """Scales of groups, for blocks of 32."""
    return scales.repeat_interleave(size // 32, dim=1)


def test_a_group_of_sixteen_is_dense_and_exact() -> None:
    matrix = grouped(torch.randn(8, 64) * 0.1, Recipe(group=16))
    ours = Gemm("layer", stored(awq_tensors(matrix)), {"group_size": 16})
    assert ours.low_bit == ""
    assert torch.equal(ours.read(), matrix.dense())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checkpoint(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Grouped]]:
    folder = tmp_path_factory.mktemp("awq") / "stories-awq"
    return folder, write_packed(stories, folder, pack, SETTINGS)


def test_a_checkpoint_becomes_a_model_that_answers_alike(
    checkpoint: tuple[Path, dict[str, Grouped]], stories: Path, tmp_path: Path
) -> None:
    folder, matrices = checkpoint
    source = open_source(folder)
    assert (source.kind, source.name) == ("awq", "stories-awq")
    assert "quantization_config" not in source.config
    assert "model.layers.0.mlp.down_proj.weight" in source.dense
    assert not source.dense & matrices.keys()
    assert not [name for name in source.tensors if "qweight" in name or "scales" in name]
    spec = {"model": str(folder), "home": str(tmp_path), "paths": True, "evaluate": False}
    [made] = quantize.run(spec, SILENT)["models"]
    assert made["format"] == "asym_int4"
    model = LowBit.from_pretrained(made["folder"], dtype=torch.float32)
    assert {name for name, layer in model.named_modules() if isinstance(layer, LowBitLinear)} == {
        name.removesuffix(".weight") for name in matrices
    }
    dense = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    for name, matrix in matrices.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        off = (layer.dequantize(torch.float32).double() - matrix.dense().double()).abs()
        assert (off <= matrix.bound()).all(), name
        dense.get_submodule(name.removesuffix(".weight")).weight.data = matrix.dense()
    ids = torch.arange(3, 203).view(2, 100)
    with torch.inference_mode():
        ours, theirs = model(ids).logits.float(), dense(ids).logits
    # bfloat16, in which what is dense is kept, has 8 bits.
    assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()


def test_settings_may_stand_beside(checkpoint: tuple[Path, dict[str, Grouped]], tmp_path: Path) -> None:
    """As AutoAWQ's first versions had it."""
    folder, matrices = checkpoint
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    beside = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(beside))
    source = open_source(tmp_path)
    assert {source.tensors[name].low_bit for name in matrices} == {"asym_int4"}
    with pytest.raises(SourceError, match="AWQ checkpoint"):
        check(tmp_path)
    estimate = estimates(tmp_path, unmeasured(), formats=["asym_int4"])[0]
    assert estimate == estimates(folder, unmeasured(), formats=["asym_int4"])[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [({"version": "gemv"}, "layout 'gemv'"), ({"bits": 8}, "with 8 bits"), ({"group_size": 64}, "do not fit")],
)
def test_what_is_not_read_is_named(
    checkpoint: tuple[Path, dict[str, Grouped]], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    folder, _ = checkpoint
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words):
        dict(open_source(tmp_path).tensors)
