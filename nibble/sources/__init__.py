"""Checkpoints of every kind, seen alike: the tensors of a Hugging Face model, by name, read one at a time.

Promises that a folder is screened before anything in it is opened. Imports torch only when a source is opened.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from nibble import screen
from nibble.checkpoint import read_config
from nibble.errors import ModelError
from nibble.sources.base import Source, Stored

__all__ = ["Source", "Stored", "open_source"]

PACKERS = {"": "safetensors", "awq": "awq", "gptq": "gptq"}
"""`quant_method` of config.json -> module of this package that reads such folders."""


def open_source(folder: Path, *, trusted: bool = False) -> Source:
    """The checkpoint in a folder, or in a GGUF file.

    Args:
        folder: a Hugging Face folder in full precision, AWQ or GPTQ; a .gguf file, or a folder that holds one.
        trusted: whether the folder's own Python code may run.

    Raises:
        ModelError: nothing that can be read, or that must not be.
    """
    if folder.is_dir():
        screen.check_source(folder, trusted=trusted)
    file = _gguf_file(folder)
    if file is not None:
        return _module("gguf").open(file)  # type: ignore[no-any-return]
    method = str((read_config(folder).get("quantization_config") or {}).get("quant_method") or "")
    if method == "nibble":
        raise ModelError(
            f"{folder.name} is a low-bit model already, and quantizing it again would lose twice.",
            "Quantize the full-precision model that it was made from.",
        )
    if method not in PACKERS:
        raise ModelError(
            f"{folder.name} is stored in a form that is not read here ({method}).",
            "Take its full-precision, GGUF, AWQ or GPTQ version.",
        )
    return _module(PACKERS[method]).open(folder)  # type: ignore[no-any-return]


def _gguf_file(path: Path) -> Path | None:
    if path.is_file() and path.suffix == ".gguf":
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ModelError(f"{path.name} holds several GGUF files: {names}.", "Name one of the files.")
    return files[0] if files else None


def _module(name: str) -> Any:
    return importlib.import_module(f"nibble.sources.{name}")
