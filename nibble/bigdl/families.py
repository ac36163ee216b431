"""What BigDL-LLM and IPEX-LLM merge and pad in a model before they save it, undone weight by weight.

Promises weights of the names and shapes that transformers 5 gives them, or a sentence. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nibble.bigdl.blocks import BLOCK, layout_of, unpack
from nibble.errors import ModelError
from nibble.lowbit.blocks import QuantizedTensor

Weight = torch.Tensor | QuantizedTensor

MERGED_QKV = "self_attn.qkv_proj"
QKV = ("q_proj", "k_proj", "v_proj")
SPLIT_MLP = ("mlp.gate_proj", "mlp.up_proj")
"""Which the library makes of `mlp.gate_up_proj`."""

FORGOTTEN = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "attn.bias", "attn.masked_bias")
"""Ends of names that older transformers saved and that are computed from config.json."""

RESCALED = ("rwkv",)
"""Families whose very weights the library changes."""


@dataclass
class Plan:
    """What the weights of a model are called in transformers 5, and their shapes."""

    family: str
    low_bit: str
    shapes: dict[str, torch.Size]
    """Every parameter and saved buffer."""
    linear: frozenset[str]
    """Names of linear layers."""

    def __post_init__(self) -> None:
        self._waiting: dict[str, Weight] = {}

    def restore(self, name: str, value: torch.Tensor) -> Iterator[tuple[str, Weight]]:
        """The weights, by their names in transformers 5, that a tensor of the library's state dict completes.

        Args:
            name: its name there.
            value: a dense tensor, or a flat buffer of packed weights.

        Raises:
            ModelError: transformers 5 has no such weight, or its shape does not fit.
        """
        path, _, kind = name.rpartition(".")
        if name.endswith(FORGOTTEN) and name not in self.shapes:
            return
        if path.endswith(MERGED_QKV) and path not in self.linear:
            base = path.removesuffix("qkv_proj")
            names = [f"{base}{part}.{kind}" for part in QKV]
            yield from zip(names, _split_rows(self._weight(names, value), self._rows(names)), strict=True)
        elif path.endswith(SPLIT_MLP) and path not in self.linear:
            yield from self._join(path, kind, value)
        else:
            yield name, self._fitted(name, self._weight([name], value))

    def complete(self, found: set[str]) -> None:
        """Refuse where not every weight was found.

        Raises:
            ModelError: the first that is missing.
        """
        missing = sorted(self.shapes.keys() - found)
        if missing:
            raise ModelError(
                f"The folder lacks {len(missing)} of the model's weights, {missing[0]} first.",
                "Copy the whole folder again.",
            )

    def _join(self, path: str, kind: str, value: torch.Tensor) -> Iterator[tuple[str, Weight]]:
        base = path.rpartition(".")[0]
        whole = f"{base}.gate_up_proj.{kind}"
        if whole not in self.shapes:
            raise self._unknown(f"{path}.{kind}")
        columns = self.shapes[whole][1] if kind == "weight" else 0
        self._waiting[f"{path}.{kind}"] = unpack(value, self.low_bit, columns) if value.ndim == 1 and columns else value
        parts = [f"{base}.{part}.{kind}" for part in ("gate_proj", "up_proj")]
        if all(part in self._waiting for part in parts):
            yield whole, self._fitted(whole, _join_rows([self._waiting.pop(part) for part in parts]))

    def _weight(self, names: Sequence[str], value: torch.Tensor) -> Weight:
        """A tensor that holds the weights of these names, one below the other; unpacked where it is a buffer."""
        for name in names:
            if name not in self.shapes:
                raise self._unknown(name)
        rows, *columns = self.shapes[names[0]]
        if value.ndim != 1 or not columns:
            return value
        if names[0].endswith("mlp.down_proj.weight"):
            # Its rows may be longer: Qwen2's MLP is padded with zeros to a multiple of 256.
            blocks = value.view(torch.uint8).numel() // (rows * layout_of(self.low_bit).nbytes)
            columns = [blocks * BLOCK]
        return unpack(value, self.low_bit, columns[0])

    def _rows(self, names: Sequence[str]) -> list[int]:
        return [self.shapes[name][0] for name in names]

    def _fitted(self, name: str, weight: Weight) -> Weight:
        """The weight without the zeros that it was padded with."""
        shape = self.shapes[name]
        if len(weight.shape) == len(shape) == 2 and ".mlp." in name and tuple(weight.shape) != tuple(shape):
            weight = _cut(weight, *shape)
        if tuple(weight.shape) != tuple(shape):
            raise ModelError(
                f"{name} has the shape {tuple(weight.shape)} in the folder, and {tuple(shape)} in transformers 5.",
                "The folder may be of another kind of model: convert the original instead.",
            )
        return weight

    def _unknown(self, name: str) -> ModelError:
        return ModelError(
            f"The folder holds {name}, which {self.family} has not in transformers 5.",
            "Convert the original model instead, or run this one with engine: bigdl in config.yaml.",
        )


def plan_of(config: Any, low_bit: str) -> Plan:
    """The plan for a model.

    Args:
        config: transformers' own of the model.
        low_bit: the library's name of the format.

    Raises:
        ModelError: a family that cannot be converted.
    """
    from transformers import AutoModelForCausalLM

    if config.model_type in RESCALED:
        raise ModelError(
            f"BigDL-LLM changes the weights of {config.model_type} itself when it saves them.",
            "Convert the original model instead.",
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = frozenset(name for name, module in model.named_modules() if type(module) is nn.Linear)
    return Plan(config.model_type, low_bit, {name: value.shape for name, value in model.state_dict().items()}, linear)


def _slice(weight: QuantizedTensor, rows: slice) -> QuantizedTensor:
    return QuantizedTensor(
        weight.format, weight.codes[rows].contiguous(), weight.scales[rows].contiguous(), weight.in_features
    )


def _split_rows(weight: Weight, sizes: Sequence[int]) -> list[Weight]:
    if weight.shape[0] != sum(sizes):
        raise ModelError(
            f"A merged weight has {weight.shape[0]:,} rows, and the model {sum(sizes):,}.",
            "The folder may be of another kind of model: convert the original instead.",
        )
    if isinstance(weight, torch.Tensor):
        return [part.contiguous() for part in weight.split(list(sizes))]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [_slice(weight, slice(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


def _join_rows(parts: Sequence[Weight]) -> Weight:
    dense = [part for part in parts if isinstance(part, torch.Tensor)]
    if dense:
        return torch.cat(dense)
    packed = [part for part in parts if isinstance(part, QuantizedTensor)]
    return QuantizedTensor(
        packed[0].format, torch.cat([part.codes for part in packed]), torch.cat([part.scales for part in packed]),
        packed[0].in_features,
    )  # fmt: skip


def _cut(weight: Weight, rows: int, columns: int) -> Weight:
    """The first rows and columns."""
    if isinstance(weight, torch.Tensor):
        return weight[:rows, :columns].contiguous()
    fmt, weight = weight.format, _slice(weight, slice(rows))
    if columns >= weight.in_features:
        return weight
    if not fmt.block:
        codes = weight.codes[..., : columns * fmt.bits // 8].contiguous()
        return QuantizedTensor(fmt, codes, weight.scales, columns)
    blocks = fmt.padded(columns) // fmt.block
    return QuantizedTensor(fmt, weight.codes[:, :blocks].contiguous(), weight.scales[:, :blocks].contiguous(), columns)
