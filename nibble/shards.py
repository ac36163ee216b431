"""Tensors into safetensors files as they come: a shard at a time, with the index that transformers reads.

Promises that no more than one shard is held in memory. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

SHARD_BYTES = 2 * 2**30
"""Size at which a file is full."""


@dataclass
class Writer:
    """Writes tensors into the shards of one model."""

    folder: Path
    shard_bytes: int = SHARD_BYTES
    total: int = 0
    """Bytes taken so far."""
    shards: list[list[str]] = field(default_factory=list)
    """Names of the tensors in each file that is written."""

    def __post_init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}
        self._bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; writes a file where a shard is full.

        Raises:
            OSError: writing failed.
        """
        if self._held and self._bytes + tensor.nbytes > self.shard_bytes:
            self._write()
        self._held[name] = tensor.contiguous()
        self._bytes += tensor.nbytes
        self.total += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, and the index where there is more than one shard.

        Raises:
            OSError: writing failed.
        """
        self._write()
        if len(self.shards) == 1:
            (self.folder / _shard(0)).rename(self.folder / "model.safetensors")
            return
        index = {name: _shard(number) for number, names in enumerate(self.shards) for name in names}
        text = json.dumps({"metadata": {"total_size": self.total}, "weight_map": index}, indent=2)
        (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _write(self) -> None:
        if self._held:
            _save(self._held, self.folder / _shard(len(self.shards)))
            self.shards.append(list(self._held))
            self._held, self._bytes = {}, 0


def _shard(number: int) -> str:
    return f"model-{number + 1:05}.safetensors"


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library is written in Rust, and wraps what the system says into words of its own.
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(file)) from None
