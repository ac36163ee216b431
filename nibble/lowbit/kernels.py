"""Fast products with packed weights on a CPU, through torch's own int4 kernel.

Promises that a kernel is used only after it agreed, once in this process, with the portable path for that format, and
that a weight taken into the kernel's layout can be taken back bit for bit. Knows nothing of layers and models.

`aten::_weight_int4pack_mm_for_cpu` multiplies bfloat16 rows with 4-bit codes u that are worth (u - 8) * scale + zero, a
bfloat16 scale and zero for each row and group. It reads the weights nearly as fast as memory gives them. The 4-bit
integer formats are of that form. All others but float8 are int8 codes times a scale (codebooks nearly so), and an int8
code is two nibbles, 16 * high + low: they are laid out as two such matrices side by side, and multiplied by each input
row written twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import pad

from nibble.lowbit.blocks import CHUNK, CODEBOOKS, QuantizedTensor, pack_bits, quantize, row_chunks, unpack_bits
from nibble.lowbit.formats import FORMATS, Format

log = logging.getLogger(__name__)

ROW_MULTIPLE = 16
"""The kernel takes weights whose number of rows is a multiple of this."""

FEW_ROWS = {1: 80, 2: 40}
"""Planes -> input rows up to which the int4 kernel wins over unpacking to bfloat16 and a dense product. Measured on an
8960 x 1536 matrix and 2 cores with AVX512: the kernel takes 0.16 ms a row and plane, a dense product 0.07 ms a row,
unpacking 8 ms."""

MANY = 2 * CHUNK
"""Weights unpacked at once for a dense product."""

TOLERANCE = 0.02
"""Largest relative difference (of norms) from the portable path that is still rounding: bfloat16 gives 0.3 to 0.6 %,
codebooks as int8 0.5 % more; a wrong layout gives more than 100 %."""


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
class Int4Weight:
    """A weight in the layout of torch's int4 kernel for CPUs."""

    format: Format
    codes: torch.Tensor
    """uint8 [out, planes * padded in / 2], in the kernel's order."""
    terms: torch.Tensor
    """bfloat16 [planes * groups, out, 2]: scale and zero."""
    in_features: int

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.format.name]

    def matmul(self, rows: torch.Tensor) -> torch.Tensor:
        """bfloat16 rows [n, in] times the transposed weight: bfloat16 [n, out]. Makes no graph."""
        missing = self.format.padded(self.in_features) - self.in_features
        if missing:
            rows = pad(rows, (0, missing))
        if len(rows) > FEW_ROWS[self.recipe.planes]:
            return self._matmul_many(rows)
        if self.recipe.planes == 2:
            rows = torch.cat((rows, rows), dim=1)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), self.codes, self.format.block, self.terms)

    def _matmul_many(self, rows: torch.Tensor) -> torch.Tensor:
        """Unpack to bfloat16 a few blocks at a time, in the kernel's own order, and multiply densely."""
        out = rows.new_empty(len(rows), len(self.codes))
        for part, tile in self._tiles():
            dense, order = self._dense(part, tile), row_order(tile)
            if order is None:
                torch.mm(rows, dense, out=out[:, part])
            else:
                product = torch.mm(rows, dense).unflatten(1, (-1, tile))
                out[:, part] = product[:, :, order.argsort()].flatten(1)
        return out

    def _tiles(self) -> Iterator[tuple[slice, int]]:
        """Slices of rows that hold whole blocks of the kernel, and the rows of a block; the last one may be smaller."""
        block = block_rows()
        whole = len(self.codes) // block * block
        for part in row_chunks(whole, self.format.padded(self.in_features), block, MANY):
            yield part, block
        if whole < len(self.codes):
            yield slice(whole, len(self.codes)), len(self.codes) - whole

    def _nibbles(self, part: slice, tile: int) -> torch.Tensor:
        """Codes of some rows, transposed: uint8 (one plane) or int8 (two) [padded in, rows in the kernel's order]."""
        width = self.format.padded(self.in_features)
        packed = self.codes[part].view(-1, self.recipe.planes, width, tile // 2).transpose(0, 2)
        codes = torch.empty(width, packed.shape[2], 2, tile // 2, dtype=torch.uint8)
        low, high = codes.unbind(2)
        if self.recipe.planes == 1:
            torch.bitwise_and(packed[:, 0], 15, out=low)
            torch.bitwise_right_shift(packed[:, 0], 4, out=high)
            return codes.flatten(1)
        sixteens, ones = packed.unbind(1)
        torch.bitwise_left_shift(sixteens, 4, out=low).bitwise_or_(ones & 15)
        torch.bitwise_and(sixteens, 0xF0, out=high).bitwise_or_(ones >> 4)
        # The high nibble was stored with 8 added.
        return codes.bitwise_xor_(128).view(torch.int8).flatten(1)

    def _dense(self, part: slice, tile: int) -> torch.Tensor:
        """bfloat16 [padded in, rows in the kernel's order]: the values that the kernel multiplies with."""
        groups = self.format.padded(self.in_features) // self.format.block
        scale, zero = self.terms[-groups:, part].float().unbind(-1)
        zero = zero - 8 * scale
        if self.recipe.planes == 2:
            zero = zero + self.terms[:groups, part, 1].float()
        order = row_order(tile)
        if order is not None:
            scale, zero = (term.unflatten(1, (-1, tile))[..., order].flatten(1) for term in (scale, zero))
        dense = self._nibbles(part, tile).bfloat16().unflatten(0, (groups, -1))
        scale, zero = scale.bfloat16().unsqueeze(1), zero.bfloat16().unsqueeze(1)
        return torch.addcmul(zero, dense, scale, out=dense).flatten(0, 1)

    def canonical(self) -> torch.Tensor:
        """The codes as `QuantizedTensor` holds them: uint8 [out, blocks, bytes of a block]."""
        fmt = self.format
        out = torch.empty(fmt.code_shape(len(self.codes), self.in_features), dtype=torch.uint8)
        # From the last code down, so that the first of two that mean the same wins, as `quantize` has it.
        back = torch.zeros(256, dtype=torch.uint8)
        for code in reversed(range(len(self.recipe.codes))):
            back[self.recipe.codes[code]] = code
        for part, tile in self._tiles():
            codes, order = self._nibbles(part, tile).view(torch.uint8), row_order(tile)
            if order is not None:
                codes = codes.unflatten(1, (-1, tile))[:, :, order.argsort()].flatten(1)
            rows = back.index_select(0, codes.T.to(torch.int32).flatten()).view(part.stop - part.start, -1, fmt.block)
            out[part] = pack_bits(rows, fmt.bits)
        return out


def accepts(weight: QuantizedTensor, dtype: torch.dtype) -> bool:
    """Whether the int4 kernel can serve this weight for inputs of `dtype`, and does so rightly on this machine."""
    return (
        weight.codes.device.type == "cpu"
        and dtype == torch.bfloat16
        and weight.format.name in RECIPES
        and weight.shape[0] % ROW_MULTIPLE == 0
        and agrees(weight.format.name)
    )


def convert(weight: QuantizedTensor) -> Int4Weight:
    """A weight that `accepts` took, in the kernel's layout; a new copy, made a few rows at a time."""
    fmt, recipe = weight.format, RECIPES[weight.format.name]
    out_features, width = weight.shape[0], fmt.padded(weight.in_features)
    table = torch.tensor(recipe.codes, dtype=torch.int32)
    codes = torch.empty(out_features, recipe.planes * width // 2, dtype=torch.uint8)
    terms = torch.empty(recipe.planes * width // fmt.block, out_features, 2, dtype=torch.bfloat16)
    # Small pieces: the kernel's packing takes int32.
    for part in row_chunks(out_features, recipe.planes * width, block_rows(), CHUNK // 2):
        values = table[unpack_bits(weight.codes[part], fmt.bits).flatten(1).to(torch.int32)]
        if recipe.planes == 2:
            values = torch.cat(((values >> 4) + 8, values & 15), dim=1)
        codes[part] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1).view(-1, codes.shape[1])
        terms[:, part] = _terms(weight, recipe, part)
    return Int4Weight(fmt, codes, terms, weight.in_features)


def _terms(weight: QuantizedTensor, recipe: Recipe, part: slice) -> torch.Tensor:
    """Scale and zero of some rows, [planes * groups, rows, 2].

    A code c is worth (c + offset) * step * scale, or c * scale + minimum; the kernel takes 8 off each nibble.
    """
    scales = weight.scales[part].float()
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


@lru_cache(maxsize=1)
def block_rows() -> int:
    """Rows that the kernel's layout interleaves on this CPU (64 with AVX512), read off packed row numbers."""
    low, high = _packed_row_numbers(256)
    for rows in (16, 32, 64, 128, 256):
        if torch.cat((low[:rows], high[:rows])).max() < rows:
            return rows
    raise AssertionError("256 rows hold only row numbers below 256")


@lru_cache(maxsize=16)
def row_order(rows: int) -> torch.Tensor | None:
    """Row numbers of one block in the order low nibbles, then high nibbles; None where that is 0, 1, 2, ..."""
    low, high = _packed_row_numbers(rows)
    order = torch.cat((low[: rows // 2], high[: rows // 2]))
    return None if torch.equal(order, torch.arange(rows)) else order


def _packed_row_numbers(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each byte of a packed [rows, 2] matrix, the rows whose codes are its low and its high nibble."""
    numbers = torch.arange(rows, dtype=torch.int32).unsqueeze(1).expand(-1, 2)
    digits = [
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(digit.contiguous(), 1).flatten().long()
        for digit in (numbers & 15, numbers >> 4)
    ]
    return tuple((digits[0] >> shift & 15) + 16 * (digits[1] >> shift & 15) for shift in (0, 4))


@lru_cache(maxsize=len(FORMATS))
def agrees(name: str) -> bool:
    """Whether the kernel gives what the portable path gives, tried once on a small random weight; a no is logged."""
    random = torch.Generator().manual_seed(0)
    rows = 2 * block_rows() + 3 * ROW_MULTIPLE
    weight = quantize(torch.randn(rows, 4 * FORMATS[name].block, generator=random), name)
    try:
        fast = convert(weight)
        worst = 0.0
        for count in (1, 3, 2 * max(FEW_ROWS.values())):
            inputs = torch.randn(count, weight.in_features, generator=random).bfloat16()
            expected = inputs.float() @ weight.dequantize().T
            worst = max(worst, float((fast.matmul(inputs).float() - expected).norm() / expected.norm()))
        same = torch.equal(fast.canonical(), weight.codes)
    except RuntimeError as error:
        log.warning("The int4 kernel does not run on this CPU; %s takes the portable path: %s", name, error)
        return False
    if worst <= TOLERANCE and same:
        return True
    log.warning("The int4 kernel is off by %.1f %% for %s on this CPU: the portable path is used.", 100 * worst, name)
    return False
