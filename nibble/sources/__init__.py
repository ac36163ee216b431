"""Checkpoints of every kind, seen alike: the tensors of a Hugging Face model, by name, read one at a time.

Promises that a folder is screened before anything in it is opened. Imports torch only when a source is opened.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from nibble import screen
from nibble.checkpoint import convert_hint, is_gguf, read_config
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
    if folder.suffix == ".gguf" and folder.is_file():
        return _module("gguf").open(folder)  # type: ignore[no-any-return]
    screen.check_source(folder, trusted=trusted)
    if is_gguf(folder):
        return _module("gguf").open(_gguf_file(folder))  # type: ignore[no-any-return]
    config = read_config(folder)
    method = screen.quant_method(folder, config)
    if method == screen.OURS:
        raise ModelError(
            f"{folder.name} is a low-bit model already, and quantizing it again would lose twice.",
            "Quantize the full-precision model that it was made from.",
        )
    if method not in PACKERS or screen.BIGDL_KEY in config:
        raise ModelError(
            f"{folder.name} is stored in a form whose tensors are not read one by one here.", convert_hint(folder)
        )
    return _module(PACKERS[method]).open(folder)  # type: ignore[no-any-return]


def _gguf_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ModelError(f"{folder.name} holds several GGUF files: {names}.", "Name one of the files.")
    return files[0]


def _module(name: str) -> Any:
    return importlib.import_module(f"nibble.sources.{name}")
