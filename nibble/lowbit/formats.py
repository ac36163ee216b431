"""The one table of low-bit formats: a name, and everything that follows from it.

Promises that every name a person may write is answered: with a row of the table, or with a sentence that says what to
write instead. Knows nothing of torch, so that the page and the console can ask it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from nibble.errors import FormatError

Kind = Literal["symmetric", "asymmetric", "codebook", "float8", "none"]


@dataclass(frozen=True)
class Format:
    """How one weight matrix is stored."""

    name: str
    bits: int
    """Bits of one code."""
    block: int
    """Neighbouring weights of a row that share a scale; 0 is the whole row."""
    kind: Kind
    """symmetric: code * scale; asymmetric: code * scale + minimum; codebook: table[code] * scale; float8: an 8-bit
    floating-point number * scale; none: not quantized."""
    scale: str = ""
    """torch dtype of a scale (and of a minimum)."""
    reference: str = ""
    """Whose values these are, bit for bit."""

    @property
    def quantized(self) -> bool:
        """Whether weights are packed at all: false for bf16 and fp16."""
        return self.kind != "none"

    def padded(self, in_features: int) -> int:
        """Width of a stored row, in weights: `in_features` rounded up to whole blocks."""
        return -(-in_features // self.block) * self.block if self.block else in_features

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of the scales: [out, blocks], or [out, blocks, 2] where a minimum follows each scale."""
        blocks = self.padded(in_features) // self.block if self.block else 1
        return (out_features, blocks, 2) if self.kind == "asymmetric" else (out_features, blocks)

    def code_shape(self, out_features: int, in_features: int) -> tuple[int, int, int]:
        """Shape of the packed codes in bytes: [out, blocks, bytes of a block].

        Three dimensions, so that a library without the plug-in finds the wrong shape and says so, instead of taking
        bytes [out, in] for numbers.
        """
        width = self.padded(in_features)
        blocks = width // self.block if self.block else 1
        return (out_features, blocks, width * self.bits // 8 // blocks)

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a stored matrix [out, in]: codes, scales and minima."""
        codes = out_features * self.padded(in_features) * self.bits // 8
        if not self.quantized:
            return codes
        numbers = 1
        for size in self.scale_shape(out_features, in_features):
            numbers *= size
        return codes + numbers * (4 if self.scale == "float32" else 2)

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight costs with its share of scale and minimum; a scale for a whole row is not counted."""
        if not self.block:
            return float(self.bits)
        return 8 * self.nbytes(1, self.block) / self.block


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("sym_int4", 4, 32, "symmetric", "float16", "ggml Q4_0"),
        Format("asym_int4", 4, 32, "asymmetric", "float16", "ggml Q4_1"),
        Format("sym_int5", 5, 32, "symmetric", "float16", "ggml Q5_0"),
        Format("asym_int5", 5, 32, "asymmetric", "float16", "ggml Q5_1"),
        Format("sym_int8", 8, 32, "symmetric", "float16", "ggml Q8_0"),
        Format("nf4", 4, 64, "codebook", "float32", "bitsandbytes nf4"),
        Format("fp4", 4, 64, "codebook", "float32", "bitsandbytes fp4"),
        Format("fp8_e4m3", 8, 0, "float8", "float32", "torch float8_e4m3fn"),
        Format("fp8_e5m2", 8, 0, "float8", "float32", "torch float8_e5m2"),
        Format("bf16", 16, 0, "none"),
        Format("fp16", 16, 0, "none"),
    )
}
"""Name -> row. The names and blocks are BigDL-LLM's, which are ggml's and bitsandbytes'."""

DEFAULT = "sym_int4"
"""What `load_in_4bit=True` means."""

ALIASES: dict[str, str] = {"fp8": "fp8_e5m2"}
"""Other names that mean exactly a row; ipex-llm's plain fp8 is e5m2."""

_GGUF = "It is a format of GGUF files, which `nibble quantize` reads; choose what to make of one: {names}."
_ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "gguf_q4k_s", "gguf_q4k_m"), _GGUF),
    **dict.fromkeys(("gguf_iq2_xxs", "gguf_iq2_xs", "gguf_iq1_s", "gguf_iq1_m"), _GGUF),
    "nf3": "The nearest here is nf4, one bit wider.",
    "fp6": "The nearest here is asym_int5, which also takes 6 bits a weight.",
    "fp6_k": "The nearest here is asym_int5, which also takes 6 bits a weight.",
    "mixed_fp4": "Choose fp4 or nf4 for all layers.",
    "mixed_4bit": "Choose sym_int4 or nf4 for all layers.",
    "mixed_fp8": "Choose fp8_e4m3 or fp8_e5m2 for all layers.",
    "asym_int4_rtn": "Use asym_int4, which rounds to nearest too.",
    "sym_int4_rtn": "Use sym_int4, which rounds to nearest too.",
    "sym_int8_rtn": "Use sym_int8, which rounds to nearest too.",
    "woq_int4": "Use sym_int4.",
    "q4_0": "Use sym_int4, which is the same.",
    "q4_1": "Use asym_int4, which is the same.",
    "q5_0": "Use sym_int5, which is the same.",
    "q5_1": "Use asym_int5, which is the same.",
    "q8_0": "Use sym_int8, which is the same.",
}
"""Names that ipex-llm, BigDL-LLM and ggml know and this table does not -> what to do."""


def resolve(name: str) -> Format:
    """The format of that name; upper and lower case are alike.

    Raises:
        FormatError: the name is not one of ours, with the list and the nearest match, or with what to use instead.
    """
    if not isinstance(name, str):
        raise FormatError(f"A low-bit format is a name, not {name!r}.", f"Choose one of: {', '.join(FORMATS)}.")
    key = name.strip().lower()
    key = ALIASES.get(key, key)
    if key in FORMATS:
        return FORMATS[key]
    names = ", ".join(FORMATS)
    if key in _ELSEWHERE:
        raise FormatError(f"The low-bit format {name} is not offered here.", _ELSEWHERE[key].format(names=names))
    near = difflib.get_close_matches(key, [*FORMATS, *ALIASES], n=1)
    guess = f"Did you mean {near[0]}? " if near else ""
    raise FormatError(f"There is no low-bit format {name!r}.", f"{guess}Choose one of: {names}.")
