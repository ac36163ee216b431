"""Weights as BigDL-LLM and IPEX-LLM store them, into ours.

A packed weight there is a flat buffer: row after row, in blocks of 64 weights, each block its scale and then its codes,
as in ggml but for the size of the block. Read off the library's own output (ipex-llm 2.2.0).

Promises the same codes, and the same values bit for bit, but for two formats: a scale of `sym_int8` is float32 there
and is rounded to float16, and `fp8_e4m3`, which has a scale for each block there, is quantized anew with one a row.
Knows nothing of folders and models.

    sym_int4    float16 scale                        32 bytes: weight i low, weight i + 32 high
    asym_int4   float16 scale, float16 minimum       the same
    sym_int5    float16 scale                        8 bytes of fifth bits, the earliest lowest; then as sym_int4
    asym_int5   float16 scale, float16 minimum       the same
    sym_int8    float32 scale                        64 bytes
    nf4         float16 scale                        32 bytes: weight i high, weight i + 32 low
    fp4         float16 scale (a sixth of the max.)  as sym_int4; an E2M1 number each, kept as sym_int5
    fp8_e5m2    float32 one                          64 bytes
    fp8_e4m3    float32 scale, 256 for 1             64 bytes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nibble.errors import ModelError
from nibble.lowbit.blocks import QuantizedTensor, quantize
from nibble.lowbit.formats import FORMATS
from nibble.lowbit.ggml import Blocks, halves, number, packed

BLOCK = 64
"""Weights that share a scale there, in every format."""

ROUNDED = frozenset({"sym_int8", "fp8_e4m3"})
"""Formats of ours in which what comes from there is not the same bit for bit."""

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Code of fp4 -> twice the number it stands for. All of these are codes of `sym_int5` too."""


@dataclass(frozen=True)
class Layout:
    """How one format is stored there."""

    nbytes: int
    """Of a block."""
    unpack: Callable[[torch.Tensor, int], QuantizedTensor]
    """Blocks [out, blocks, nbytes] and the number of weights in a row -> the same in our form."""


def unpack(buffer: torch.Tensor, name: str, in_features: int) -> QuantizedTensor:
    """A packed weight of the library in our form.

    Args:
        buffer: the flat buffer of the state dict, uint8 (nf4: bfloat16, to be read as bytes).
        name: the library's name of the format; plain `fp8` is told apart by the scales.
        in_features: weights in a row, a multiple of 64.

    Raises:
        ModelError: the format is none of ours, or the buffer's length does not fit.
    """
    layout = layout_of(name)
    data = buffer.detach().contiguous().view(torch.uint8).view(-1)
    row = in_features // BLOCK * layout.nbytes
    if in_features % BLOCK or not row or data.numel() % row:
        raise ModelError(
            f"A packed weight of {data.numel():,} bytes does not hold rows of {in_features:,} weights in {name}.",
            "The folder may be damaged: copy it again.",
        )
    return layout.unpack(data.view(-1, in_features // BLOCK, layout.nbytes), in_features)


def layout_of(name: str) -> Layout:
    """The layout of a format of the library.

    Raises:
        ModelError: none that we have; the hint says what to do.
    """
    if name not in LAYOUTS:
        raise ModelError(
            f"A BigDL-LLM folder in {name} cannot be converted.",
            f"These can: {', '.join(LAYOUTS)}. Convert the original model instead.",
        )
    return LAYOUTS[name]


def out_features(nbytes: int, name: str, in_features: int) -> int:
    """Rows that a buffer of so many bytes holds."""
    return nbytes // (in_features // BLOCK * layout_of(name).nbytes)


def _nf4(blocks: torch.Tensor, in_features: int) -> QuantizedTensor:
    low, high = halves(blocks[..., 2:]).chunk(2, dim=-1)
    return packed("nf4", torch.cat((high, low), dim=-1), number(blocks, 0, torch.float16), in_features)


def _fp4(blocks: torch.Tensor, in_features: int) -> QuantizedTensor:
    # bitsandbytes' fp4, which is ours, lacks the number 0.5 of E2M1.
    table = torch.tensor([16 + twice for twice in E2M1], dtype=torch.uint8, device=blocks.device)
    codes = table[halves(blocks[..., 2:]).int()]
    return packed("sym_int5", codes, number(blocks, 0, torch.float16) / 2, in_features)


def _fp8_e4m3(blocks: torch.Tensor, in_features: int) -> QuantizedTensor:
    codes = blocks[..., 4:].contiguous().view(torch.float8_e4m3fn).float()
    return quantize((codes * (number(blocks, 0, torch.float32) / 256).unsqueeze(-1)).flatten(1), "fp8_e4m3")


def _fp8_e5m2(blocks: torch.Tensor, in_features: int) -> QuantizedTensor:
    ones = torch.ones(len(blocks), 1, device=blocks.device)
    return QuantizedTensor(FORMATS["fp8_e5m2"], blocks[..., 4:].flatten(1).unsqueeze(1).contiguous(), ones, in_features)


def _fp8(blocks: torch.Tensor, in_features: int) -> QuantizedTensor:
    """What `fp8` meant: e5m2, which has no scale, in ipex-llm; e4m3 in bigdl-llm 2.4."""
    plain = bool((number(blocks, 0, torch.float32) == 1).all())
    return (_fp8_e5m2 if plain else _fp8_e4m3)(blocks, in_features)


def _integers(name: str, scale: torch.dtype = torch.float16) -> Layout:
    blocks = Blocks(name, BLOCK, scale)
    return Layout(blocks.nbytes, blocks.unpack)


LAYOUTS: dict[str, Layout] = {
    "sym_int4": _integers("sym_int4"),
    "asym_int4": _integers("asym_int4"),
    "sym_int5": _integers("sym_int5"),
    "asym_int5": _integers("asym_int5"),
    "sym_int8": _integers("sym_int8", torch.float32),
    "nf4": Layout(34, _nf4),
    "fp4": Layout(34, _fp4),
    "fp8_e5m2": Layout(68, _fp8_e5m2),
    "fp8_e4m3": Layout(68, _fp8_e4m3),
    "fp8": Layout(68, _fp8),
}
"""The library's name of a format -> how it is stored there."""
