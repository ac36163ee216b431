"""The error of each packed layer: its weight beside the dense one in a checkpoint's files.

Promises that one dense weight at a time is in memory. Needs torch.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from nibble.checkpoint import read_header, weight_files
from nibble.lowbit.blocks import QuantizedTensor, row_chunks
from nibble.lowbit.linear import LowBitLinear

WORST = 10
"""How many layers a report names."""


class DenseWeights:
    """The dense weights of a checkpoint by the names of a model's layers."""

    def __init__(self, folder: Path) -> None:
        self._files = {name: file for file in weight_files(folder) for name in read_header(file)}

    def read(self, model: Any, layer: str) -> torch.Tensor | None:
        """The weight [out, in] of a layer; None where the files have it under another name, or not dense."""
        name = f"{layer}.weight"
        if name not in self._files and model.get_submodule(layer) is model.get_output_embeddings():
            embedding = model.get_input_embeddings()
            name = next((f"{path}.weight" for path, module in model.named_modules() if module is embedding), name)
        if name not in self._files:
            return None
        with safe_open(self._files[name], framework="pt") as file:
            weight: torch.Tensor = file.get_tensor(name)
        return weight if weight.is_floating_point() and weight.ndim == 2 else None


def errors(model: nn.Module, dense: DenseWeights) -> list[dict[str, Any]]:
    """`name`, `format` and `error` of each packed layer, the worst first; error = ||W - Ŵ|| / ||W|| (Frobenius).

    Layers whose dense weight is not in the files under the same name, or has another shape, are left out.
    """
    found = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LowBitLinear):
            continue
        weight = dense.read(model, name)
        if weight is None or weight.shape != (layer.out_features, layer.in_features):
            continue
        found.append({"name": name, "format": layer.format.name, "error": relative_error(weight, layer.quantized)})
    return sorted(found, key=lambda row: (-row["error"], row["name"]))


def relative_error(weight: torch.Tensor, packed: QuantizedTensor) -> float:
    """||W - Ŵ|| / ||W||, a few rows at a time; 0 for a weight of zeros."""
    error = size = 0.0
    for part in row_chunks(*packed.shape):
        dense = weight[part].to(packed.codes.device).float()
        values = packed.rows(part).dequantize()
        error += float((dense - values).square().sum())
        size += float(dense.square().sum())
    return math.sqrt(error / size) if size else 0.0
