"""torch's int4 kernel for CUDA devices, `aten::_weight_int4pack_mm`.

Promises to read the layout off the kernel's own packing. Knows nothing of layers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn.functional import linear

from nibble.lowbit.blocks import QuantizedTensor, row_chunks
from nibble.lowbit.recipes import RECIPES, Int4Weight, from_codes, to_planes, to_terms

TILE_ROWS = 8
COLUMN_TILES = (8, 4, 2)
"""Tiles of 16 columns that the kernel takes at once, best first; one must divide the width."""

FEW_ROWS = 16
"""Input rows up to which the kernel is used: it multiplies 16 rows in the time of one."""

MANY = 2**25
"""Weights packed or unpacked at once."""


class CudaInt4Weight(Int4Weight):
    """`codes`: int32 [out / 8, width / (16 * tiles), 32, tiles / 2], as the kernel packs them."""

    @classmethod
    def takes(cls, out_features: int, width: int) -> bool:
        return out_features % TILE_ROWS == 0 and width % (16 * COLUMN_TILES[-1]) == 0

    @classmethod
    def pack(cls, weight: QuantizedTensor) -> CudaInt4Weight:
        planes, width = RECIPES[weight.format.name].planes, weight.format.padded(weight.in_features)
        codes, terms = [], []
        for part in row_chunks(weight.shape[0], planes * width, multiple=TILE_ROWS, size=MANY):
            codes.append(_pack(to_planes(weight, part), _column_tiles(planes * width)))
            terms.append(to_terms(weight, part).bfloat16())
        return cls(weight.format, torch.cat(codes), torch.cat(terms, dim=1), weight.in_features)

    @property
    def few_rows(self) -> int:
        return FEW_ROWS

    def few(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm(rows, self.codes, self.format.block, self.terms)

    def many(self, rows: torch.Tensor) -> torch.Tensor:
        out = rows.new_empty(len(rows), self.out_features)
        for part in row_chunks(self.out_features, self.padded, multiple=TILE_ROWS, size=MANY):
            scale, zero = (term.T.unsqueeze(-1).to(rows.dtype) for term in self.affine(part))
            dense = self._values(part).to(rows.dtype).unflatten(1, (-1, self.format.block))
            out[:, part] = linear(rows, torch.addcmul(zero, dense, scale, out=dense).flatten(1))
        return out

    def canonical(self) -> torch.Tensor:
        parts = row_chunks(self.out_features, self.padded, multiple=TILE_ROWS, size=MANY)
        return torch.cat([from_codes(self._values(part).view(torch.uint8), self.format) for part in parts])

    def _values(self, part: slice) -> torch.Tensor:
        """Codes of some rows: uint8 (one plane) or int8 (two) [rows, padded in]."""
        tiles = _column_tiles(self.recipe.planes * self.padded)
        packed = self.codes[part.start // TILE_ROWS : part.stop // TILE_ROWS].flatten(2).view(torch.uint8)
        nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(2)
        nibbles = nibbles.index_select(2, _places(tiles, packed.device))
        # [rows / 8, columns / tile, 8 * tile] -> [rows, columns]
        values = nibbles.unflatten(2, (TILE_ROWS, -1)).transpose(1, 2).flatten(2).flatten(0, 1)
        if self.recipe.planes == 1:
            return values
        high, low = values.chunk(2, dim=1)
        # The high nibble was stored with 8 added.
        return (((high << 4) | low) ^ 128).view(torch.int8)


def _column_tiles(width: int) -> int:
    return next(tiles for tiles in COLUMN_TILES if width % (16 * tiles) == 0)


def _pack(values: torch.Tensor, tiles: int) -> torch.Tensor:
    """4-bit codes [rows, width] in the kernel's layout; it takes two neighbours a byte, the earlier one high."""
    pairs = (values[:, 0::2] << 4) | values[:, 1::2]
    return torch.ops.aten._convert_weight_to_int4pack(pairs.to(torch.uint8), tiles)


@lru_cache(maxsize=8)
def _places(tiles: int, device: torch.device) -> torch.Tensor:
    """For each code of a tile [8, 16 * tiles], row by row, its place among the tile's nibbles, low ones first."""
    numbers = torch.arange(TILE_ROWS * 16 * tiles, dtype=torch.int32, device=device).view(TILE_ROWS, -1)
    found = torch.zeros(numbers.numel(), dtype=torch.int64, device=device)
    for shift in (0, 4, 8):
        packed = _pack(numbers >> shift & 15, tiles).flatten().view(torch.uint8)
        found += torch.stack((packed & 15, packed >> 4), dim=-1).flatten().long() << shift
    return found.argsort()
