"""AWQ and GPTQ checkpoints of a dense model, packed by the published formulas, one number at a time."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nibble.sources.base import Stored

Settings = dict[str, object]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Recipe:
    """How a matrix is to be quantized."""

    bits: int = 4
    group: int = 128
    sym: bool = False
    act_order: bool = False
    version: int = 1
    """Of GPTQ's layout."""


@dataclass(frozen=True)
class Grouped:
    """A matrix in whole numbers."""

    codes: torch.Tensor
    """int64 [out, in]."""
    zeros: torch.Tensor
    """int64 [out, groups]."""
    scales: torch.Tensor
    """float16 [out, groups]."""
    index: torch.Tensor
    """int64 [in], the group of each column."""

    def dense(self) -> torch.Tensor:
        """(code - zero) * scale, in float64 and then float32."""
        scales, zeros = self.scales.double()[:, self.index], self.zeros[:, self.index]
        return ((self.codes - zeros) * scales).float()

    def bound(self) -> torch.Tensor:
        """By how much a weight may move where its minimum is rounded to float16: half a unit in the last place."""
        minimum = (self.zeros * self.scales.double())[:, self.index]
        # The last term is float32's own rounding of the result.
        return minimum * 2.0**-11 + 2.0**-25 + 16 * self.scales.double()[:, self.index] * 2.0**-23


def grouped(weight: torch.Tensor, recipe: Recipe) -> Grouped:
    """Round a weight [out, in] to the nearest codes, group by group."""
    width, top = weight.shape[1], 2**recipe.bits - 1
    size = recipe.group if recipe.group > 0 else width
    index = torch.arange(width) // size
    if recipe.act_order:
        index = index[torch.randperm(width, generator=torch.Generator().manual_seed(1))]
    columns = [weight[:, index == number].float() for number in range(int(index.max()) + 1)]
    low = torch.stack([part.amin(1).clamp(max=0) for part in columns], dim=1)
    high = torch.stack([part.amax(1).clamp(min=0) for part in columns], dim=1)
    if recipe.sym:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / top).clamp(min=1e-4).half()
    zeros = torch.full(scales.shape, 2 ** (recipe.bits - 1)) if recipe.sym else (-low / scales.float()).round().long()
    # GPTQ stores one less.
    zeros = zeros.clamp(1, top).long()
    codes = ((weight.float() / scales.float()[:, index]).round().long() + zeros[:, index]).clamp(0, top)
    return Grouped(codes, zeros, scales, index)


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [n, rows] into int32 words [n * bits / 32, rows], by writing out all bits, the lowest first."""
    lines = []
    for column in codes.T.tolist():
        stream = "".join(format(code, f"0{bits}b")[::-1] for code in column)
        numbers = [int(stream[at : at + 32][::-1], 2) for at in range(0, len(stream), 32)]
        lines.append([number - 2**32 if number >= 2**31 else number for number in numbers])
    return torch.tensor(lines, dtype=torch.int32).T.contiguous()


def awq_tensors(matrix: Grouped) -> dict[str, torch.Tensor]:
    """As AutoAWQ's WQLinear_GEMM has them."""

    def shuffled(codes: torch.Tensor) -> torch.Tensor:
        order = [8 * (place // 8) + AWQ_ORDER[place % 8] for place in range(len(codes))]
        return words(codes[order], 4).T.contiguous()

    return {"qweight": shuffled(matrix.codes), "qzeros": shuffled(matrix.zeros), "scales": matrix.scales.T.contiguous()}


def gptq_tensors(matrix: Grouped, recipe: Recipe) -> dict[str, torch.Tensor]:
    """As AutoGPTQ's QuantLinear has them."""
    less = 1 if recipe.version == 1 else 0
    return {
        "qweight": words(matrix.codes.T, recipe.bits),
        "qzeros": words(matrix.zeros - less, recipe.bits).T.contiguous(),
        "scales": matrix.scales.T.contiguous(),
        "g_idx": matrix.index.int(),
    }


def stored(tensors: dict[str, torch.Tensor]) -> dict[str, Stored]:
    """Tensors as a source has them."""
    return {
        name: Stored(tuple(value.shape), value.nbytes, "", partial(_same, value)) for name, value in tensors.items()
    }


def _same(value: torch.Tensor) -> torch.Tensor:
    return value


def write_packed(
    folder: Path, out: Path, pack: Callable[[torch.Tensor], tuple[Grouped, dict[str, torch.Tensor]]], settings: Settings
) -> dict[str, Grouped]:
    """A checkpoint of the model in a folder, its layers' matrices packed; returns them by the names of the weights."""
    out.mkdir()
    for file in folder.iterdir():
        shutil.copyfile(file, out / file.name)
    tensors, matrices = {}, {}
    for name, values in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight") and values.shape[0] % 8 == values.shape[1] % 32 == 0:
            matrices[name], parts = pack(values)
            tensors |= {f"{name[:-7]}.{part}": tensor for part, tensor in parts.items()}
        else:
            tensors[name] = values.half()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return matrices
