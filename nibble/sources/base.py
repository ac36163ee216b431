"""The contract of a source: a checkpoint of any kind, as the tensors of a Hugging Face model, read one at a time.

Promises that opening a source reads headers only, and that a tensor which has one of our forms already arrives in it,
bit for bit. Knows nothing of what is made of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from nibble.lowbit.blocks import QuantizedTensor


@dataclass(frozen=True)
class Stored:
    """One tensor of a source, not read yet."""

    shape: tuple[int, ...]
    """Of the dense tensor, [out, in] for a linear layer."""
    nbytes: int
    """As it lies in the source's files."""
    low_bit: str
    """Name of the format of ours that it has exactly; empty where it is dense or has none of them."""
    read: Callable[[], torch.Tensor | QuantizedTensor]
    """The tensor: a `QuantizedTensor` where `low_bit` is set, else dense, in the dtype that loses nothing."""


class Source(Protocol):
    """A checkpoint that a low-bit model can be made from."""

    @property
    def name(self) -> str:
        """What to call it in a sentence."""

    @property
    def kind(self) -> str:
        """safetensors, gguf, awq or gptq."""

    @property
    def config(self) -> dict[str, Any]:
        """config.json for transformers 5, without `quantization_config`."""

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Name in the model's state dict (as in a Hugging Face checkpoint) -> the tensor, in the files' order."""

    @property
    def dense(self) -> frozenset[str]:
        """Names of linear layers' weights that the source left in full precision though it packs others."""

    def copy_files(self, folder: Path) -> None:
        """Write the tokenizer, its chat template and the generation config into a folder."""
