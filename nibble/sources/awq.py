"""AWQ checkpoints as AutoAWQ writes them for its GEMM kernels: 4 bits, a zero point for each group.

qweight int32 [in, out / 8], qzeros int32 [in / group, out / 8], scales [in / group, out]. In each word the columns 0,
2, 4, 6, 1, 3, 5, 7 stand from the lowest bits up: https://github.com/casper-hansen/AutoAWQ, awq/utils/packing_utils.py.
What becomes of the weights: see `nibble.sources.groups`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from nibble.checkpoint import read_config
from nibble.errors import ModelError
from nibble.screen import packing
from nibble.sources.groups import Checkpoint, Matrix, open_checkpoint, unpack_words

PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Column of eight -> its place in the word."""


class Gemm(Matrix):
    """One weight in this layout."""

    @property
    def shape(self) -> tuple[int, int]:
        """As `Matrix`."""
        rows, words = self.parts["qweight"].shape
        return words * 8, rows

    bits = 4

    @property
    def symmetric(self) -> bool:
        """As `Matrix`."""
        return self.settings.get("zero_point") is False

    def codes(self) -> torch.Tensor:
        """As `Matrix`."""
        return _columns(self.part("qweight"))

    def zeros(self) -> torch.Tensor:
        """As `Matrix`."""
        return _columns(self.part("qzeros"))


def open(folder: Path) -> Checkpoint:  # noqa: A001 - each module of this package has it under this name
    """The checkpoint in a folder.

    Raises:
        ModelError: another layout than GEMM's, or broken.
    """
    settings = packing(folder, read_config(folder))
    version = str(settings.get("version") or "gemm").lower()
    bits = settings.get("bits", settings.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise ModelError(
            f"{folder.name} is AWQ in the layout {version[:20]!r} with {bits} bits; only gemm with 4 is read here.",
            "Take its version for GEMM, or the full-precision model.",
        )
    settings.setdefault("group_size", settings.get("q_group_size"))
    return open_checkpoint(folder, Gemm, "awq", settings)


def _columns(words: torch.Tensor) -> torch.Tensor:
    """Codes [out, n] of words [n, out / 8]."""
    return unpack_words(words, 4).unflatten(-1, (-1, 8))[..., PLACES].flatten(-2).T.contiguous()
