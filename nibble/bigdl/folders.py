"""Folders that BigDL-LLM or IPEX-LLM saved, and folders that their library can load: judged before anything is loaded.

Promises a sentence for whatever stands in the way. Uses the standard library alone, so that any interpreter can run it.
Knows nothing of torch and of engines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nibble.checkpoint import CONTEXT_KEYS, TOKENIZER_FILES, read_config, weight_files
from nibble.errors import ModelError
from nibble.library import ModelCard, inspect
from nibble.screen import check_code

LOW_BIT_KEY = "bigdl_transformers_low_bit"
"""Key of config.json that marks a folder saved by the library, with the format as its value."""

WEIGHTS = "pytorch_model*.bin"
"""The library's weight files: pickles, whatever was asked for."""

ITS_QUANTIZATIONS = ("", "gptq", "awq")
"""Values of `quant_method` in a config.json that the library reads."""

OWN_ENGINE = "Load it with Nibble's own engine: engine: nibble in config.yaml."


def saved_format(config: dict[str, Any]) -> str:
    """The library's name of the format in which it saved the folder; empty where it did not."""
    return str(config.get(LOW_BIT_KEY) or "")


def saved_weights(folder: Path) -> list[Path]:
    """The weight files of a folder that the library saved.

    Raises:
        ModelError: there are none.
    """
    files = sorted(folder.glob(WEIGHTS))
    if not files:
        raise ModelError(f"{folder.name} has no weights ({WEIGHTS}).", "Copy the whole folder again.")
    return files


def check(folder: Path, *, trusted: bool = False) -> None:
    """Refuse a folder that the library cannot or must not load.

    Args:
        folder: a Hugging Face folder in full precision, GPTQ or AWQ, or one that the library saved.
        trusted: whether Python code in the folder may run.

    Raises:
        ModelError: the first thing found wrong.
    """
    config = read_config(folder)
    check_code(folder, config, trusted=trusted)
    if saved_format(config):
        saved_weights(folder)
    else:
        weight_files(folder)
        method = str((config.get("quantization_config") or {}).get("quant_method", ""))
        if method not in ITS_QUANTIZATIONS:
            raise ModelError(f"{folder.name} is stored in a form that BigDL-LLM does not read ({method}).", OWN_ENGINE)
    if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        raise ModelError(
            f"{folder.name} has no tokenizer.",
            "BigDL-LLM's save_low_bit does not save it: copy the tokenizer's files of the original model beside it.",
        )


def card(folder: Path, name: str = "") -> ModelCard:
    """What is known of a folder that the library can load; how many parameters a saved one has is not.

    Raises:
        ModelError: config.json or the weights cannot be read.
    """
    config = read_config(folder)
    if not saved_format(config):
        return inspect(folder, name)
    return ModelCard(
        name=name or folder.name,
        folder=folder,
        family=str(config.get("model_type", "")),
        format=saved_format(config),
        parameters=0,
        size_bytes=sum(file.stat().st_size for file in saved_weights(folder)),
        context=next((int(config[key]) for key in CONTEXT_KEYS if isinstance(config.get(key), int)), 0),
    )
