"""A Hugging Face folder in full precision: its safetensors files, tensor by tensor.

Promises that a file is never read whole. Knows nothing of who reads.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nibble.checkpoint import read_config, read_header, weight_files
from nibble.library import GUIDE, GUIDE_FOLDER
from nibble.sources.base import Stored

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "sentencepiece*.model", "*.tiktoken", "chat_template*", "*processor_config.json", "normalizer.json", "LICENSE*",
)  # fmt: skip
"""Files that are saved with a model just as they came."""


class Safetensors:
    """As `nibble.sources.base.Source`."""

    kind = "safetensors"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = GUIDE if folder == GUIDE_FOLDER else folder.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return {key: value for key, value in read_config(self.folder).items() if key != "quantization_config"}

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """Name -> the tensor; a name that several files hold is the last one's, as transformers takes it."""
        found = {}
        for file in weight_files(self.folder):
            for name, entry in read_header(file).items():
                start, end = entry["data_offsets"]
                found[name] = Stored(tuple(entry["shape"]), end - start, "", reader(file, name))
        return found

    @property
    def dense(self) -> frozenset[str]:
        """None: nothing is packed."""
        return frozenset()

    def copy_files(self, folder: Path) -> None:
        """As `nibble.sources.base.Source`."""
        copy_files(self.folder, folder)


def open(folder: Path) -> Safetensors:  # noqa: A001 - each module of this package has it under this name
    """The checkpoint in a folder; headers are read when they are asked for."""
    return Safetensors(folder)


def reader(file: Path, name: str) -> Callable[[], torch.Tensor]:
    """What reads one tensor of a safetensors file; the file is mapped, not read, and closed again."""
    return partial(_read, file, name)


def _read(file: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)  # type: ignore[no-any-return]


def copy_files(source: Path, folder: Path) -> None:
    """Copy the tokenizer, its chat template and the generation config from one folder into another."""
    for pattern in (*TOKENIZER_FILES, "generation_config.json"):
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
