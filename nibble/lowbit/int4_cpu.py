"""torch's int4 kernel for CPUs, `aten::_weight_int4pack_mm_for_cpu`, and dense products from its layout.

Promises to read the layout off the kernel's own packing, so that any CPU's order of rows is understood. The kernel
reads weights nearly as fast as memory gives them. Knows nothing of layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from nibble.lowbit.blocks import CHUNK, QuantizedTensor, row_chunks
from nibble.lowbit.recipes import RECIPES, Int4Weight, from_codes, to_planes, to_terms

ROW_MULTIPLE = 16
"""The kernel takes weights whose number of rows is a multiple of this."""

FEW_ROWS = {1: 80, 2: 40}
"""Planes -> input rows up to which the int4 kernel wins over unpacking to bfloat16 and a dense product. Measured on an
8960 x 1536 matrix and 2 cores with AVX512: the kernel takes 0.16 ms a row and plane, a dense product 0.07 ms a row,
unpacking 8 ms."""

MANY = 2 * CHUNK
"""Weights unpacked at once for a dense product."""


class CpuInt4Weight(Int4Weight):
    """`codes`: uint8 [out, planes * padded in / 2]; of a block of rows, column by column, a byte for two rows."""

    @classmethod
    def takes(cls, out_features: int, width: int) -> bool:
        return out_features % ROW_MULTIPLE == 0 and width % 2 == 0

    @classmethod
    def pack(cls, weight: QuantizedTensor) -> CpuInt4Weight:
        planes, width = RECIPES[weight.format.name].planes, weight.format.padded(weight.in_features)
        out_features = weight.shape[0]
        codes = torch.empty(out_features, planes * width // 2, dtype=torch.uint8)
        terms = torch.empty(planes * width // weight.format.block, out_features, 2, dtype=torch.bfloat16)
        # Small pieces: the kernel's packing takes int32.
        for part in row_chunks(out_features, planes * width, multiple=block_rows(), size=CHUNK // 2):
            values = to_planes(weight, part)
            codes[part] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1).view(-1, codes.shape[1])
            terms[:, part] = to_terms(weight, part)
        return cls(weight.format, codes, terms, weight.in_features)

    @property
    def few_rows(self) -> int:
        return FEW_ROWS[self.recipe.planes]

    def few(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, self.format.block, self.terms.contiguous())

    def many(self, rows: torch.Tensor) -> torch.Tensor:
        out = rows.new_empty(len(rows), self.out_features)
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
        for part in row_chunks(whole, self.padded, multiple=block, size=MANY):
            yield part, block
        if whole < len(self.codes):
            yield slice(whole, len(self.codes)), len(self.codes) - whole

    def _nibbles(self, part: slice, tile: int) -> torch.Tensor:
        """Codes of some rows, transposed: uint8 (one plane) or int8 (two) [padded in, rows in the kernel's order]."""
        width = self.padded
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
        scale, zero = self.affine(part)
        order = row_order(tile)
        if order is not None:
            scale, zero = (term.unflatten(1, (-1, tile))[..., order].flatten(1) for term in (scale, zero))
        dense = self._nibbles(part, tile).bfloat16().unflatten(0, (-1, self.format.block))
        scale, zero = scale.bfloat16().unsqueeze(1), zero.bfloat16().unsqueeze(1)
        return torch.addcmul(zero, dense, scale, out=dense).flatten(0, 1)

    def canonical(self) -> torch.Tensor:
        out = torch.empty(self.format.code_shape(self.out_features, self.in_features), dtype=torch.uint8)
        for part, tile in self._tiles():
            codes, order = self._nibbles(part, tile).view(torch.uint8), row_order(tile)
            if order is not None:
                codes = codes.unflatten(1, (-1, tile))[:, :, order.argsort()].flatten(1)
            out[part] = from_codes(codes.T, self.format)
        return out


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
