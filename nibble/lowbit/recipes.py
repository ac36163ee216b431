"""How each format becomes one or two planes of the 4-bit codes that torch's int4 kernels multiply with.

Promises one description for every device: the kernels take bfloat16 rows and 4-bit codes u that are worth
(u - 8) * scale + zero, a bfloat16 scale and zero for each row and group. The 4-bit integer formats are of that form.
All others but float8 are int8 codes times a scale (codebooks nearly so), and an int8 code is two nibbles,
16 * high + low: they are laid out as two such matrices side by side, and multiplied by each input row written twice.
Knows nothing of how a device orders the codes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from nibble.lowbit.blocks import CODEBOOKS, QuantizedTensor, pack_bits, unpack_bits
from nibble.lowbit.formats import Format


@dataclass(frozen=True)
class Recipe:
    """How a format becomes one or two planes of 4-bit codes."""

    codes: tuple[int, ...]
    """Code of the format -> 4-bit code (one plane), or int8 code (two planes)."""
    planes: int
    step: float
    """Scale of the 4-bit or int8 codes, as a multiple of the format's scale."""
    offset: float
    """What is added to the codes before that, where the format has no minimum of its own."""


def _int8_of(codebook: tuple[float, ...], top: float) -> Recipe:
    return Recipe(tuple(round(value * top) for value in codebook), 2, 1 / top, 0.0)


RECIPES: dict[str, Recipe] = {
    "sym_int4": Recipe(tuple(range(16)), 1, 1.0, -8.0),
    "asym_int4": Recipe(tuple(range(16)), 1, 1.0, 0.0),
    "sym_int5": Recipe(tuple(range(32)), 2, 1.0, -16.0),
    "asym_int5": Recipe(tuple(range(32)), 2, 1.0, 0.0),
    "sym_int8": Recipe((*range(128), *range(-128, 0)), 2, 1.0, 0.0),
    # The multiples below 127 for which rounding the table to integers changes normally distributed weights least: by
    # 0.47 % (nf4) and 0.33 % (fp4, where only the entries +-1/192 move) of their norm.
    "nf4": _int8_of(CODEBOOKS["nf4"], 124.114),
    "fp4": _int8_of(CODEBOOKS["fp4"], 120.0),
}


@dataclass(frozen=True)
class Int4Weight(ABC):
    """A weight in the layout of an int4 kernel of torch; a subclass for each kind of device."""

    format: Format
    codes: torch.Tensor
    """4-bit codes in the kernel's order."""
    terms: torch.Tensor
    """bfloat16 [planes * groups, out, 2]: scale and zero."""
    in_features: int

    @classmethod
    @abstractmethod
    def takes(cls, out_features: int, width: int) -> bool:
        """Whether the kernel takes a matrix of 4-bit codes of this shape; `width` is of all planes, padded."""

    @classmethod
    @abstractmethod
    def pack(cls, weight: QuantizedTensor) -> Int4Weight:
        """Take a weight into the kernel's layout: a new copy, made a few rows at a time."""

    @abstractmethod
    def canonical(self) -> torch.Tensor:
        """The codes as `QuantizedTensor` holds them: uint8 [out, blocks, bytes of a block]."""

    @abstractmethod
    def few(self, rows: torch.Tensor) -> torch.Tensor:
        """The kernel's product of bfloat16 rows [n, planes * padded in]: bfloat16 [n, out]."""

    @abstractmethod
    def many(self, rows: torch.Tensor) -> torch.Tensor:
        """The same product of bfloat16 rows [n, padded in], by unpacking the weight: faster for many rows."""

    @property
    @abstractmethod
    def few_rows(self) -> int:
        """Rows up to which the kernel is the faster."""

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.format.name]

    @property
    def out_features(self) -> int:
        return self.terms.shape[1]

    @property
    def padded(self) -> int:
        """Width of one plane."""
        return self.format.padded(self.in_features)

    def matmul(self, rows: torch.Tensor) -> torch.Tensor:
        """bfloat16 rows [n, in] times the transposed weight: bfloat16 [n, out]. Makes no graph."""
        missing = self.padded - self.in_features
        if missing:
            rows = pad(rows, (0, missing))
        if len(rows) > self.few_rows:
            return self.many(rows)
        if self.recipe.planes == 2:
            rows = torch.cat((rows, rows), dim=1)
        return self.few(rows.contiguous())

    def affine(self, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of some rows' whole codes, 4-bit or int8: float32 [groups, rows] each; code * scale + zero."""
        groups = self.padded // self.format.block
        scale, zero = self.terms[-groups:, part].float().unbind(-1)
        zero = zero - 8 * scale
        return scale, zero if self.recipe.planes == 1 else zero + self.terms[:groups, part, 1].float()


def to_planes(weight: QuantizedTensor, part: slice) -> torch.Tensor:
    """4-bit codes of some rows: int32 [rows, planes * padded in], the plane of high nibbles first."""
    recipe = RECIPES[weight.format.name]
    table = torch.tensor(recipe.codes, dtype=torch.int32, device=weight.codes.device)
    values = table[unpack_bits(weight.codes[part], weight.format.bits).flatten(1).to(torch.int32)]
    return values if recipe.planes == 1 else torch.cat(((values >> 4) + 8, values & 15), dim=1)


def from_codes(values: torch.Tensor, fmt: Format) -> torch.Tensor:
    """4-bit (one plane) or int8 (two) codes [rows, padded in], as uint8, to `QuantizedTensor`'s packed codes."""
    codes = RECIPES[fmt.name].codes
    # From the last code down, so that the first of two that mean the same wins, as `quantize` has it.
    back = [0] * 256
    for code in reversed(range(len(codes))):
        back[codes[code] % 256] = code
    table = torch.tensor(back, dtype=torch.uint8, device=values.device)
    rows = table.index_select(0, values.to(torch.int32).flatten())
    return pack_bits(rows.view(len(values), -1, fmt.block), fmt.bits)


def to_terms(weight: QuantizedTensor, part: slice) -> torch.Tensor:
    """Scale and zero of some rows, [planes * groups, rows, 2].

    A code c is worth (c + offset) * step * scale, or c * scale + minimum; the kernel takes 8 off each nibble.
    """
    recipe, scales = RECIPES[weight.format.name], weight.scales[part].float()
    if weight.format.kind == "asymmetric":
        scale, zero = scales.unbind(-1)
    else:
        scale, zero = scales * recipe.step, scales * (recipe.step * recipe.offset)
    zero = zero + 8 * scale
    planes = [torch.stack((scale, zero), dim=-1)]
    if recipe.planes == 2:
        # Where the zero is a multiple of the scale, the high nibbles carry it: the low ones then add up to little, and
        # both sums are rounded less.
        share = torch.zeros_like(zero) if weight.format.kind == "asymmetric" else zero
        planes = [torch.stack((16 * scale, share), dim=-1), torch.stack((scale, zero - share), dim=-1)]
    return torch.cat(planes, dim=1).transpose(0, 1)
