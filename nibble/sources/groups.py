"""Checkpoints whose weights are integers in groups, with a scale and a zero point each: what AWQ and GPTQ share.

A weight is (code - zero) * scale. Promises that codes stay as they are wherever ours can say the same. 4 bits in groups
of whole blocks become `asym_int4`, whose minimum is -zero * scale rounded to float16, so that no weight moves by more
than 2^-11 of that; where every zero is 8, `sym_int4` exactly, and 8 bits with every zero 128 `sym_int8` exactly. All
else (2 and 3 bits, columns out of order, groups of other widths) is dense in float32, exact, and is rounded anew by
whoever packs it. Apart from headers, only zero points and the order of columns are read before a tensor is asked for.
Knows nothing of how integers lie in the files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nibble.errors import ModelError
from nibble.lowbit.blocks import QuantizedTensor
from nibble.lowbit.formats import FORMATS
from nibble.lowbit.ggml import packed, single_bits
from nibble.sources.base import Stored
from nibble.sources.safetensors import Safetensors
from nibble.sources.safetensors import open as open_safetensors

BLOCK = 32
"""Of our integer formats."""

PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Matrix(ABC):
    """One packed weight of a checkpoint; a subclass for each layout."""

    path: str
    """Of the layer."""
    parts: Mapping[str, Stored]
    """Name of PARTS -> the tensor; g_idx may be missing."""
    settings: Mapping[str, Any]
    """What the checkpoint says about all its weights."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """[out, in]."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Of a code."""

    @abstractmethod
    def codes(self) -> torch.Tensor:
        """uint8 [out, in]."""

    @abstractmethod
    def zeros(self) -> torch.Tensor:
        """uint8 [out, groups]."""

    @property
    def symmetric(self) -> bool:
        """Whether the checkpoint says that every zero is in the middle."""
        return False

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        size = int(self.settings.get("group_size") or -1)
        return size if size > 0 else self.shape[1]

    @property
    def groups(self) -> int:
        return -(-self.shape[1] // self.group)

    def part(self, name: str) -> torch.Tensor:
        """One of the tensors of the files."""
        tensor = self.parts[name].read()
        assert isinstance(tensor, torch.Tensor)
        return tensor

    @cached_property
    def order(self) -> torch.Tensor | None:
        """Column -> its group, where columns are out of order (act-order)."""
        if "g_idx" not in self.parts:
            return None
        index = self.part("g_idx").long()
        if torch.equal(index, torch.arange(self.shape[1]) // self.group):
            return None
        if index.numel() != self.shape[1] or index.min() < 0 or index.max() >= self.groups:
            raise malformed(self.path, "g_idx names groups that there are not")
        return index

    @cached_property
    def low_bit(self) -> str:
        """The format of ours that it has; empty where there is none."""
        if self.group % BLOCK or self.shape[1] % self.group or self.bits not in (4, 8) or self.order is not None:
            return ""
        if self.symmetric and bool((self.zeros() == 2 ** (self.bits - 1)).all()):
            return f"sym_int{self.bits}"
        return "asym_int4" if self.bits == 4 else ""

    def check(self) -> None:
        """Refuse tensors whose shapes do not belong together.

        Raises:
            ModelError: they do not.
        """
        out = self.shape[0]
        zeros = (self.groups, out * self.bits // 32)
        if self.parts["scales"].shape != (self.groups, out) or self.parts["qzeros"].shape != zeros:
            raise malformed(self.path, "its scales and zero points do not fit its codes")

    def stored(self) -> Stored:
        """As a source has it."""
        return Stored(self.shape, sum(part.nbytes for part in self.parts.values()), self.low_bit, self.read)

    def read(self) -> torch.Tensor | QuantizedTensor:
        """The weight, in the form that `low_bit` says.

        Raises:
            ModelError: a scale that float16 cannot hold.
        """
        scales = self.part("scales").float().T
        if not self.low_bit:
            zeros = self.zeros()
            order = torch.arange(self.shape[1]) // self.group if self.order is None else self.order
            return (self.codes().float() - zeros[:, order].float()).mul_(scales[:, order])
        codes = self.codes()
        if self.low_bit == "sym_int8":
            # 128 below: our codes are signed bytes.
            codes = codes ^ 128
        if FORMATS[self.low_bit].kind == "asymmetric":
            scales = torch.stack((scales, -self.zeros().float() * scales), dim=-1)
        scales = scales.half()
        if not torch.isfinite(scales).all():
            raise malformed(self.path, "it has scales beyond float16")
        # A group is one block of the files; ours are smaller and share its scale.
        return packed(self.low_bit, codes.view(self.shape[0], self.groups, -1), scales, self.shape[1])


@dataclass(frozen=True)
class Checkpoint:
    """As `nibble.sources.base.Source`."""

    files: Safetensors
    kind: str
    matrices: Mapping[str, Matrix] = field(repr=False)
    """Path of a layer -> its packed weight."""

    @property
    def name(self) -> str:
        """The folder's."""
        return self.files.name

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.files.config

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """Name in the model -> the tensor."""
        found = {}
        for name, stored in self.files.tensors.items():
            path, _, part = name.rpartition(".")
            if path not in self.matrices or part not in PARTS:
                found[name] = stored
            elif part == "qweight":
                found[f"{path}.weight"] = self.matrices[path].stored()
        return found

    @cached_property
    def dense(self) -> frozenset[str]:
        """Matrices in full precision that are no embedding."""
        tables = ("embed", "wte")
        return frozenset(
            name
            for name, stored in self.files.tensors.items()
            if name.endswith(".weight") and len(stored.shape) == 2 and not any(word in name for word in tables)
        )

    def copy_files(self, folder: Path) -> None:
        """As `nibble.sources.base.Source`."""
        self.files.copy_files(folder)


def open_checkpoint(folder: Path, layout: type[Matrix], kind: str, settings: Mapping[str, Any]) -> Checkpoint:
    """A folder whose packed weights have a layout.

    Raises:
        ModelError: tensors are missing, or do not belong together.
    """
    files = open_safetensors(folder)
    matrices: dict[str, Matrix] = {}
    for path in (name.removesuffix(".qweight") for name in files.tensors if name.endswith(".qweight")):
        parts = {part: files.tensors[f"{path}.{part}"] for part in PARTS if f"{path}.{part}" in files.tensors}
        lacking = next((part for part in PARTS[:3] if part not in parts or len(parts[part].shape) != 2), None)
        if lacking:
            raise malformed(path, f"it lacks {lacking}")
        matrices[path] = layout(path, parts, settings)
        matrices[path].check()
    if not matrices:
        raise ModelError(
            f"{files.name} says that it is {kind.upper()}, and holds no packed weight.", "Download it again."
        )
    return Checkpoint(files, kind, matrices)


def malformed(path: str, why: str) -> ModelError:
    """The refusal of a layer that contradicts itself."""
    return ModelError(f"{path} is broken: {why}.", "Download the model again.")


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of int32 words [..., n], the earliest in the lowest bits: uint8 [..., n * 32 / bits]."""
    data = words.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        places = torch.arange(0, 8, bits, dtype=torch.uint8)
        return ((data.unsqueeze(-1) >> places) & (2**bits - 1)).flatten(-2)
    # Three bits: a code may lie across two words.
    powers = 2 ** torch.arange(bits, dtype=torch.uint8)
    return (single_bits(data).unflatten(-1, (-1, bits)) * powers).sum(-1, dtype=torch.uint8)
