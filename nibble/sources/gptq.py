"""GPTQ checkpoints as AutoGPTQ and GPTQModel write them: 2, 3, 4 or 8 bits, columns in order or not.

qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales [groups, out], g_idx int32 [in],
the group of each column. Codes follow each other from the lowest bits up, across words where 3 bits want it. The zero
points are stored one less than they are (checkpoint_format `gptq`), or as they are (`gptq_v2`): see
https://github.com/ModelCloud/GPTQModel, gptqmodel/utils/model_dequant.py; AutoGPTQ's qlinear_cuda.py packs the same.
What becomes of the weights: see `nibble.sources.groups`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from nibble.checkpoint import read_config
from nibble.errors import ModelError
from nibble.screen import packing
from nibble.sources.groups import Checkpoint, Matrix, malformed, open_checkpoint, unpack_words

BITS = (2, 3, 4, 8)

LESS_ONE = {"gptq": 1, "gptq_v2": 0}
"""checkpoint_format -> by how much the stored zero points are too small."""


class Gptq(Matrix):
    """One weight in this layout."""

    @property
    def shape(self) -> tuple[int, int]:
        """As `Matrix`."""
        words, out = self.parts["qweight"].shape
        return out, words * 32 // self.bits

    @property
    def bits(self) -> int:
        """As `Matrix`; where a checkpoint mixes bits, g_idx tells how many columns share the words."""
        words = self.parts["qweight"].shape[0]
        columns = self.parts["g_idx"].shape[0] if "g_idx" in self.parts else 0
        bits = words * 32 // columns if columns else int(self.settings.get("bits") or 0)
        if bits not in BITS or (columns and words * 32 != columns * bits):
            raise malformed(self.path, f"it has {bits} bits")
        return bits

    @property
    def symmetric(self) -> bool:
        """As `Matrix`."""
        return bool(self.settings.get("sym", True))

    @property
    def group(self) -> int:
        """As `Matrix`; where a checkpoint mixes groups, the scales tell."""
        size, rows = super().group, self.parts["scales"].shape[0]
        fits = -(-self.shape[1] // size) == rows
        return size if fits or not rows or self.shape[1] % rows else self.shape[1] // rows

    def codes(self) -> torch.Tensor:
        """As `Matrix`."""
        return unpack_words(self.part("qweight").T, self.bits)

    def zeros(self) -> torch.Tensor:
        """As `Matrix`."""
        less = LESS_ONE[str(self.settings.get("checkpoint_format") or "gptq")]
        zeros = unpack_words(self.part("qzeros"), self.bits).T
        return ((zeros + less) & (2**self.bits - 1)).contiguous()


def open(folder: Path) -> Checkpoint:  # noqa: A001 - each module of this package has it under this name
    """The checkpoint in a folder.

    Raises:
        ModelError: another layout, or broken.
    """
    settings = packing(folder, read_config(folder))
    form = str(settings.get("checkpoint_format") or "gptq")
    if form not in LESS_ONE:
        raise ModelError(
            f"{folder.name} is GPTQ in the layout {form[:20]!r}; {' and '.join(LESS_ONE)} are read here.",
            "Take its version in one of these, or the full-precision model.",
        )
    return open_checkpoint(folder, Gptq, "gptq", settings)
