"""GPTQ checkpoints in AutoGPTQ's and GPTQModel's layouts: the same codes where ours can say them, else exact values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.errors import ModelError
from nibble.lowbit.blocks import QuantizedTensor, unpack_bits
from nibble.lowbit.linear import LowBitLinear
from nibble.sources import open_source
from nibble.sources.gptq import Gptq
from nibble.tasks import quantize
from nibble.transformers import AutoModelForCausalLM as LowBit
from tests.support.packers import Grouped, Recipe, gptq_tensors, grouped, stored, write_packed
from tests.support.reports import SILENT

FORMATS = {1: "gptq", 2: "gptq_v2"}


def said(recipe: Recipe) -> dict[str, Any]:
    """What a checkpoint's config.json says."""
    return {
        "quant_method": "gptq", "bits": recipe.bits, "group_size": recipe.group, "sym": recipe.sym,
        "desc_act": recipe.act_order, "checkpoint_format": FORMATS[recipe.version],
    }  # fmt: skip


RECIPES = st.builds(
    Recipe, bits=st.sampled_from((2, 3, 4, 8)), group=st.sampled_from((16, 32, 64, -1)), sym=st.booleans(),
    act_order=st.booleans(), version=st.sampled_from((1, 2)),
)  # fmt: skip


@given(recipe=RECIPES, out=st.integers(1, 2), blocks=st.integers(1, 6), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_every_layout_is_read(recipe: Recipe, out: int, blocks: int, seed: int) -> None:
    width = blocks * 32
    weight = torch.randn(out * 32, width, generator=torch.Generator().manual_seed(seed)) * 0.1
    matrix = grouped(weight, recipe)
    ours = Gptq("layer", stored(gptq_tensors(matrix, recipe)), said(recipe))
    ours.check()
    read, expected = ours.read(), matrix.dense()
    in_order = torch.equal(matrix.index, matrix.index.sort().values)
    whole = in_order and recipe.group != 16 and width % max(recipe.group, 1) == 0
    form = {(4, True): "sym_int4", (4, False): "asym_int4", (8, True): "sym_int8"}.get((recipe.bits, recipe.sym), "")
    assert ours.low_bit == (form if whole else "")
    if not ours.low_bit:
        assert torch.equal(read, expected)  # type: ignore[arg-type]
        return
    assert isinstance(read, QuantizedTensor)
    if ours.low_bit != "asym_int4":
        assert torch.equal(read.dequantize(), expected)
        return
    assert torch.equal(unpack_bits(read.codes, 4).flatten(1).long(), matrix.codes)
    assert ((read.dequantize().double() - expected.double()).abs() <= matrix.bound()).all()


def test_zeros_decide_and_not_what_the_config_says() -> None:
    recipe = Recipe(group=32, sym=False)
    matrix = grouped(torch.randn(32, 64) * 0.1, recipe)
    ours = Gptq("layer", stored(gptq_tensors(matrix, recipe)), said(recipe) | {"sym": True})
    assert ours.low_bit == "asym_int4"


def test_a_layer_may_have_bits_and_groups_of_its_own() -> None:
    """GPTQModel's `dynamic`: the shapes tell."""
    recipe = Recipe(bits=8, group=64, sym=True)
    matrix = grouped(torch.randn(32, 128) * 0.1, recipe)
    ours = Gptq("layer", stored(gptq_tensors(matrix, recipe)), said(Recipe(bits=4, group=32, sym=True)))
    ours.check()
    assert ours.low_bit == "sym_int8"
    assert torch.equal(ours.read().dequantize(), matrix.dense())  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("earlier", [False, True])
def test_a_checkpoint_keeps_its_codes(stories: Path, tmp_path: Path, earlier: bool) -> None:
    folder, recipe = tmp_path / "stories-gptq", Recipe(group=32, sym=True)
    matrices = write(stories, folder, recipe)
    if earlier:
        config = json.loads((folder / "config.json").read_text())
        (folder / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
        (folder / "config.json").write_text(json.dumps(config))
    spec = {"model": str(folder), "home": str(tmp_path), "paths": True, "evaluate": False}
    [made] = quantize.run(spec, SILENT)["models"]
    assert made["format"] == "sym_int4"
    model = LowBit.from_pretrained(made["folder"])
    packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowBitLinear)}
    assert packed.keys() == {name.removesuffix(".weight") for name in matrices}
    for name, layer in packed.items():
        assert torch.equal(layer.dequantize(torch.float32), matrices[f"{name}.weight"].dense()), name


def write(stories: Path, folder: Path, recipe: Recipe) -> dict[str, Grouped]:
    def pack(weight: torch.Tensor) -> tuple[Grouped, dict[str, torch.Tensor]]:
        matrix = grouped(weight, recipe)
        return matrix, gptq_tensors(matrix, recipe)

    return write_packed(stories, folder, pack, said(recipe))


def test_columns_out_of_order_are_rounded_anew(stories: Path, tmp_path: Path) -> None:
    matrices = write(stories, tmp_path / "stories-gptq", Recipe(group=32, act_order=True))
    spec = {
        "model": str(tmp_path / "stories-gptq"), "home": str(tmp_path), "paths": True, "evaluate": False,
        "low_bit": ["sym_int8"],
    }  # fmt: skip
    [made] = quantize.run(spec, SILENT)["models"]
    model = LowBit.from_pretrained(made["folder"])
    for name, matrix in matrices.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        wanted = matrix.dense()
        off = (layer.dequantize(torch.float32) - wanted).norm() / wanted.norm()
        assert 0 < off < 0.01, name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checkpoint_format": "marlin"}, "layout 'marlin'"),
        ({"checkpoint_format": "gptq_p", "bits": 3}, "layout 'gptq_p'"),
    ],
)
def test_what_is_not_read_is_named(stories: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    write(stories, tmp_path / "bad", Recipe(group=32))
    config = json.loads((tmp_path / "bad" / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words):
        open_source(tmp_path / "bad")


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("scales", torch.ones(2, 5).half(), "do not fit"),
        ("qzeros", torch.zeros(3, 4, dtype=torch.int32), "do not fit"),
        ("g_idx", torch.full((64,), 7, dtype=torch.int32), "groups that there are not"),
        ("g_idx", torch.zeros(60, dtype=torch.int32), "bits"),
        ("scales", torch.full((2, 32), float("inf")), "scales beyond float16"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(part: str, value: torch.Tensor, words: str) -> None:
    recipe = Recipe(group=32)
    tensors = gptq_tensors(grouped(torch.randn(32, 64) * 0.1, recipe), recipe) | {part: value}
    ours = Gptq("layer", stored(tensors), said(recipe))
    with pytest.raises(ModelError, match=words):
        ours.check()
        ours.read()
