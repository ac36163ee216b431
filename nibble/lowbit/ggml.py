"""Blocks as ggml packs them, into ours: the same codes in another order, the same values bit for bit.

A block stands alone: its scale, its minimum where the format has one, its codes. 4 bits: weight i is the low half of a
byte, weight i + block / 2 the high one. 5 bits: the fifth bits come first, the earliest lowest. 8 bits: a byte each.
GGUF files have blocks of 32 (https://github.com/ggml-org/ggml, block_q4_0 to block_q8_0 of ggml-common.h); BigDL-LLM's
library took the same form with blocks of 64. Knows nothing of files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nibble.lowbit.blocks import QuantizedTensor, pack_bits
from nibble.lowbit.formats import FORMATS, Format


@dataclass(frozen=True)
class Blocks:
    """How the blocks of one of our integer formats are stored there."""

    name: str
    """Of the format."""
    block: int
    """Weights of a block; a multiple of our format's, whose blocks then share a scale."""
    scale: torch.dtype = torch.float16

    @property
    def nbytes(self) -> int:
        """Of a block."""
        fmt = FORMATS[self.name]
        return self._start + self.block * fmt.bits // 8

    @property
    def _start(self) -> int:
        """Bytes before the codes."""
        return self.scale.itemsize * (2 if FORMATS[self.name].kind == "asymmetric" else 1)

    def unpack(self, data: torch.Tensor, in_features: int) -> QuantizedTensor:
        """Blocks [out, blocks, nbytes], uint8, in our form."""
        fmt = FORMATS[self.name]
        parts = self.block // fmt.block
        scales = number(data, 0, self.scale)
        if fmt.kind == "asymmetric":
            scales = torch.stack((scales, number(data, self.scale.itemsize, self.scale)), dim=-1)
        codes = data[..., self._start :]
        if fmt.bits == 8:
            codes = codes.unflatten(-1, (parts, fmt.block))
        else:
            fifth, low = codes.tensor_split((codes.shape[-1] - self.block // 2,), dim=-1)
            # The fifth bits are in our order already.
            pieces = [neighbours(low), fifth] if fmt.bits == 5 else [neighbours(low)]
            codes = torch.cat([piece.unflatten(-1, (parts, -1)) for piece in pieces], dim=-1)
        return _shared(fmt, codes.flatten(1, 2).contiguous(), scales, in_features)


def neighbours(data: torch.Tensor) -> torch.Tensor:
    """Bytes [..., n] that hold weights i and i + n, as bytes that hold two neighbours each, the earlier one low."""
    even, odd = data[..., 0::2], data[..., 1::2]
    return torch.cat(((even & 15) | (odd << 4), (even >> 4) | (odd & 0xF0)), dim=-1)


def number(blocks: torch.Tensor, start: int, dtype: torch.dtype) -> torch.Tensor:
    """The number that stands at byte `start` of each block: [out, blocks]."""
    return blocks[..., start : start + dtype.itemsize].contiguous().view(dtype).squeeze(-1)


def halves(data: torch.Tensor) -> torch.Tensor:
    """Codes [..., 2 n] of bytes [..., n]: the low halves, then the high ones."""
    return torch.cat((data & 15, data >> 4), dim=-1)


def single_bits(data: torch.Tensor) -> torch.Tensor:
    """Bits [..., 8 n] of bytes [..., n], the lowest first."""
    places = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data.unsqueeze(-1) >> places) & 1).flatten(-2)


def packed(name: str, codes: torch.Tensor, scales: torch.Tensor, in_features: int) -> QuantizedTensor:
    """Our form of codes [out, blocks, block], uint8, and scales [out, blocks, ...]; smaller blocks share a scale."""
    fmt = FORMATS[name]
    codes = codes.unflatten(-1, (-1, fmt.block)).flatten(1, 2)
    return _shared(fmt, pack_bits(codes, fmt.bits), scales, in_features)


def _shared(fmt: Format, codes: torch.Tensor, scales: torch.Tensor, in_features: int) -> QuantizedTensor:
    """Packed codes [out, blocks, bytes] with scales that several blocks share."""
    scales = scales.repeat_interleave(codes.shape[1] // scales.shape[1], dim=1).to(getattr(torch, fmt.scale))
    return QuantizedTensor(fmt, codes, scales.contiguous(), in_features)
