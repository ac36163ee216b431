"""Weights to packed codes and back, in plain PyTorch, on any device.

Promises that dequantized values equal those of ggml (the `gguf` package) and bitsandbytes bit for bit on whole blocks,
and that any width is taken: the last block is filled up by repeating the row's last weight, which changes neither the
largest nor the smallest of the block. Knows nothing of layers, models and fast kernels.

Layout of the codes: [out, blocks, bytes of a block], uint8. 4 bits: two neighbours a byte, the earlier one low. 5 bits:
the low four bits so, then the fifth bits, eight a byte, the earliest lowest. 8 bits: a byte each (int8, or float8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from nibble.errors import ModelError
from nibble.lowbit.formats import Format, resolve

CHUNK = 2**21
"""Weights packed at once: large enough to fill the cores, small enough that temporaries stay in the caches."""

DECODED = 2**19
"""Of a larger matrix, what is unpacked at once on a CPU: what lies between codes and values stays in a core's cache."""

# https://github.com/bitsandbytes-foundation/bitsandbytes, functional.get_4bit_type.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = tuple(sign * value / 12 + 0.0 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
CODEBOOKS: dict[str, tuple[float, ...]] = {"nf4": NF4, "fp4": FP4}

FLOAT8: dict[str, torch.dtype] = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
PLAIN: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight matrix [out, in] in packed form."""

    format: Format
    codes: torch.Tensor
    """uint8 [out, blocks, bytes of a block]."""
    scales: torch.Tensor
    """float16 or float32 [out, blocks], or [out, blocks, 2] with (scale, minimum)."""
    in_features: int
    """Width without padding."""

    @property
    def shape(self) -> torch.Size:
        """(out, in) of the weight."""
        return torch.Size((self.codes.shape[0], self.in_features))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [out, in]; exact in float32, otherwise rounded once or twice to `dtype`."""
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        small = out.numel() <= CHUNK or out.device.type != "cpu"
        size = chunk_for(out.device) if small else DECODED
        for rows in row_chunks(self.shape[0], self.shape[1], size=size):
            decode(self.format, self.codes[rows], self.scales[rows], out[rows])
        return out

    def rows(self, part: slice) -> QuantizedTensor:
        """Some rows of the weight, sharing memory."""
        return QuantizedTensor(self.format, self.codes[part], self.scales[part], self.in_features)


def quantize(weight: torch.Tensor, name: str) -> QuantizedTensor:
    """Quantize a weight [out, in] of any floating dtype, row by row, to the nearest codes.

    Raises:
        FormatError: no such format.
        ModelError: not a matrix of floating-point numbers, or a number that is not finite (or too large for the scale).
    """
    fmt = resolve(name)
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ModelError(
            f"A weight of shape {tuple(weight.shape)} and dtype {weight.dtype} cannot be quantized.",
            "It must be a matrix of floating-point numbers.",
        )
    weight = weight.detach()
    codes = torch.empty(fmt.code_shape(*weight.shape), dtype=torch.uint8, device=weight.device)
    scale_dtype = getattr(torch, fmt.scale or "float32")
    scales = torch.empty(fmt.scale_shape(*weight.shape), dtype=scale_dtype, device=weight.device)
    for rows in row_chunks(weight.shape[0], weight.shape[1], size=chunk_for(weight.device)):
        codes[rows], scales[rows] = encode(fmt, weight[rows])
    if not torch.isfinite(scales).all():
        raise ModelError(
            f"The weight holds numbers that {fmt.name} cannot store: NaN, infinite, or too large.",
            "Check the model's files, or use a format with a float32 scale such as nf4.",
        )
    return QuantizedTensor(fmt, codes, scales, weight.shape[1])


def chunk_for(device: torch.device) -> int:
    """Weights to handle at once on a device: one with its own memory has no cache to stay in, and dear launches."""
    return CHUNK if device.type == "cpu" else 16 * CHUNK


def row_chunks(out_features: int, in_features: int, *, multiple: int = 1, size: int = CHUNK) -> Iterator[slice]:
    """Slices of rows that hold about `size` weights each; every start is a multiple of `multiple`."""
    step = max(multiple, size // max(in_features, 1) // multiple * multiple)
    for start in range(0, out_features, step):
        yield slice(start, min(start + step, out_features))


def encode(fmt: Format, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes and scales of a few rows [rows, in]; all at once, in float32."""
    if fmt.kind == "none":
        plain = weight.to(PLAIN[fmt.name])
        return plain.view(torch.uint8).unsqueeze(1), torch.ones(fmt.scale_shape(*weight.shape), device=weight.device)
    weight = weight.float()
    missing = fmt.padded(weight.shape[1]) - weight.shape[1]
    if missing:
        weight = torch.cat((weight, weight[:, -1:].expand(-1, missing)), dim=1)
    blocks = weight.view(len(weight), -1, fmt.block or weight.shape[1])
    codes, scales = ENCODERS[fmt.kind](fmt, blocks)
    return pack_bits(codes, fmt.bits), scales


def decode(fmt: Format, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Write the values of packed rows to `out` [rows, in]; in float32 by the references' operations, in their order."""
    if fmt.kind == "none":
        out.copy_(codes.flatten(1).view(PLAIN[fmt.name]))
        return
    # Scales of small weights, those of float8 first, fall below float16's normal numbers. And for scale and minimum in
    # bfloat16 a CPU takes three times as long as for both in float32 and a cast.
    slow = fmt.kind == "asymmetric" and out.device.type == "cpu"
    dtype = torch.float32 if out.dtype == torch.float16 or slow else out.dtype
    scales = scales.to(dtype)
    values = _values(fmt, codes, dtype)
    whole = out.dtype == dtype and out.shape[1] == values.shape[1] * values.shape[2]
    place = out.view(values.shape) if whole else values
    if fmt.kind != "asymmetric":
        torch.mul(values, scales.unsqueeze(-1), out=place)
    else:
        scale, minimum = scales.unsqueeze(-2).unbind(-1)
        if dtype == torch.float32:
            torch.add(values.mul_(scale), minimum, out=place)
        else:
            torch.addcmul(minimum, values, scale, out=place)
    if not whole:
        out.copy_(place.flatten(1)[:, : out.shape[1]])


# --- weights to integer codes -----------------------------------------------------------------------------------------


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)


def _encode_symmetric(fmt: Format, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ggml's quantize_row_q4_0 and q5_0 (the largest magnitude becomes the lowest code) and q8_0 (it becomes +-127)."""
    if fmt.bits == 8:
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        scaled = blocks * _inverse(scale)
        # roundf: halves away from zero, where torch.round would take the even neighbour.
        size = scaled.abs()
        whole = size.floor()
        codes = scaled.sign() * (whole + (2 * (size - whole)).floor())
        return codes.to(torch.int8).view(torch.uint8), scale.squeeze(-1).half()
    half = 2 ** (fmt.bits - 1)
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = extreme / -half
    codes = (blocks * _inverse(scale) + (half + 0.5)).trunc_().clamp_(0, 2 * half - 1)
    return codes.to(torch.uint8), scale.squeeze(-1).half()


def _encode_asymmetric(fmt: Format, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ggml's quantize_row_q4_1, q5_1: the smallest weight becomes code 0, the largest the highest code."""
    minimum, maximum = blocks.aminmax(dim=-1, keepdim=True)
    top = 2**fmt.bits - 1
    scale = (maximum - minimum) / top
    codes = ((blocks - minimum) * _inverse(scale) + 0.5).trunc_().clamp_(0, top)
    return codes.to(torch.uint8), torch.cat((scale, minimum), dim=-1).half()


def _encode_codebook(fmt: Format, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' quantize_4bit: the nearest entry of the table to weight / largest magnitude of the block."""
    # fp4 has two zeros: only the first is ever written.
    entries = {value: code for code, value in reversed([*enumerate(CODEBOOKS[fmt.name])])}
    table = torch.tensor(sorted(entries), device=blocks.device)
    order = torch.tensor([entries[value] for value in sorted(entries)], dtype=torch.uint8, device=blocks.device)
    midpoints = (table[:-1] + table[1:]) / 2
    largest = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / largest.clamp(min=1e-38)).unsqueeze(-1)).clamp_(-1, 1)
    return order[torch.bucketize(scaled, midpoints, out_int32=True)], largest


def _encode_float8(fmt: Format, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """torchao's rowwise scaling: the row's largest magnitude becomes the format's largest number."""
    kind = FLOAT8[fmt.name]
    top = torch.finfo(kind).max
    scale = blocks.abs().amax(-1) / top
    codes = (blocks * _inverse(scale).unsqueeze(-1)).clamp_(-top, top).to(kind)
    return codes.view(torch.uint8), scale


ENCODERS: dict[str, Callable[[Format, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "symmetric": _encode_symmetric,
    "asymmetric": _encode_asymmetric,
    "codebook": _encode_codebook,
    "float8": _encode_float8,
}


# --- integer codes to packed bytes and back ---------------------------------------------------------------------------


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., block] below 2**bits, uint8, to bytes [..., block * bits / 8]."""
    if bits == 8:
        return codes
    low = codes & 15
    nibbles = low[..., 0::2] | (low[..., 1::2] << 4)
    if bits == 4:
        return nibbles
    weights = torch.tensor([1 << place for place in range(8)], dtype=torch.uint8, device=codes.device)
    fifth = ((codes >> 4).unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
    return torch.cat((nibbles, fifth), dim=-1)


def unpack_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_bits`."""
    if bits == 8:
        return packed
    if bits == 4:
        return _look_up("codes", packed, torch.uint8)
    low, fifth = packed.tensor_split((packed.shape[-1] * 4 // 5,), dim=-1)
    return _look_up("codes", low, torch.uint8) | _look_up("bits", fifth, torch.uint8)


# The byte of a float8 number, widened to int16, shifted and masked, is the bfloat16 of the number times a power of two:
# both have a sign, an exponent and a mantissa in this order. torch's own conversion takes ten times as long on a CPU.
_FLOAT8_BITS = {"fp8_e4m3": (4, 0x87F0 - 2**16, 2.0**120), "fp8_e5m2": (5, 0x8FE0 - 2**16, 2.0**112)}
"""Format -> left shift, mask, factor (2 to the difference of the exponents' biases)."""


def _values(fmt: Format, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes as numbers of `dtype`, before the scale: [rows, blocks, block]."""
    if fmt.kind == "float8":
        shift, mask, factor = _FLOAT8_BITS[fmt.name]
        wide = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(shift).bitwise_and_(mask)
        return wide.view(torch.bfloat16).mul_(factor).to(dtype)
    if fmt.bits == 4:
        return _look_up(fmt.name, codes, dtype)
    if fmt.bits == 8:
        return codes.view(torch.int8).to(dtype)
    values = unpack_bits(codes, fmt.bits).to(dtype)
    return values.sub_(16) if fmt.kind == "symmetric" else values


_TABLES: dict[str, tuple[int, Callable[[int], float]]] = {
    "codes": (4, float),
    "bits": (1, lambda code: 16.0 * code),
    "sym_int4": (4, lambda code: code - 8.0),
    "asym_int4": (4, float),
    "nf4": (4, NF4.__getitem__),
    "fp4": (4, FP4.__getitem__),
}
"""What a table yields -> bits of a code, and its value."""


@lru_cache(maxsize=64)
def _table(name: str, dtype: torch.dtype, device: torch.device, index_bits: int) -> torch.Tensor:
    """Every value of `index_bits` bits -> the values of the codes in it, as one integer that holds them all."""
    bits, value = _TABLES[name]
    numbers = torch.arange(2**index_bits, device=device)
    codes = torch.stack([(numbers >> place) & (2**bits - 1) for place in range(0, index_bits, bits)], dim=-1)
    values = torch.tensor([value(code) for code in range(2**bits)], device=device)[codes].to(dtype)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values[0].nbytes]
    return values.contiguous().view(whole).view(-1)


def _look_up(name: str, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Replace each code in packed bytes [..., n] by its value: [..., n * codes in a byte].

    One look-up yields up to eight bytes of result, which on a CPU is many times faster than shifting and masking.
    """
    codes_a_byte = 8 // _TABLES[name][0]
    wide = dtype.itemsize * codes_a_byte <= 4 and packed.device.type == "cpu"
    index = packed.contiguous().view(torch.uint16) if wide else packed
    table = _table(name, dtype, packed.device, 16 if wide else 8)
    values = table.index_select(0, index.to(torch.int32).view(-1)).view(dtype)
    return values.view(*packed.shape[:-1], packed.shape[-1] * codes_a_byte)
