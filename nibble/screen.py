"""What may be loaded: a folder is refused, in one sentence, before anything in it is loaded or run.

Imports neither torch nor transformers. Knows nothing of where models are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nibble.checkpoint import TOKENIZER_FILES, read_config, read_header, read_json, weight_files
from nibble.errors import ModelError

OLDER_FAMILIES = {
    "qwen": "Qwen (the first)", "chatglm": "ChatGLM", "baichuan": "Baichuan", "internlm": "InternLM",
    "internlm2": "InternLM2",
}  # fmt: skip
"""`model_type` of families that live in Python code of their own, for transformers 4 -> what people call them."""

OLDER_ENGINE = "`make bigdl`, then engine: bigdl in config.yaml"


def check(folder: Path, *, trust_remote_code: bool = False, tokenizer: bool = True, weights: bool = True) -> None:
    """Refuse a folder that cannot or must not be loaded, before anything in it is loaded.

    Args:
        folder: a Hugging Face model folder.
        trust_remote_code: whether the folder's own Python code may run.
        tokenizer: whether a tokenizer must be there too.
        weights: whether the weights must be there too; a download looks at the rest before it fetches them.

    Raises:
        ModelError: the first thing found wrong.
    """
    if not folder.is_dir():
        raise ModelError(
            f"There is no folder {folder}.", "Name a folder that holds config.json and safetensors weights."
        )
    config = read_config(folder)
    check_code(folder, config, trusted=trust_remote_code)
    if "bigdl_transformers_low_bit" in config:
        raise ModelError(
            f"{folder.name} was saved by BigDL-LLM or IPEX-LLM, whose weight files are pickles.",
            f"Convert it: python -m nibble.bigdl.convert {folder} OUT; or run it in its own library: {OLDER_ENGINE}.",
        )
    family = str(config.get("model_type"))
    if "auto_map" in config and family in OLDER_FAMILIES:
        raise ModelError(
            f"{folder.name} is {OLDER_FAMILIES[family]}, whose own Python code needs transformers 4; here is 5.",
            f"It runs in BigDL-LLM's environment: {OLDER_ENGINE}.",
        )
    if weights:
        for file in weight_files(folder):
            read_header(file)
    if tokenizer and not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        raise ModelError(
            f"{folder.name} has no tokenizer.",
            "Copy tokenizer.json and tokenizer_config.json of the same model into the folder.",
        )


def check_code(folder: Path, config: dict[str, Any], *, trusted: bool) -> None:
    """Refuse a folder whose config would make a library run code, unless its maker is trusted.

    Raises:
        ModelError: what would run.
    """
    hidden = [key for key in config if key.startswith("_attn_implementation") or key == "trust_remote_code"]
    if hidden:
        raise ModelError(
            f"config.json of {folder.name} sets {hidden[0]}, which can make transformers run foreign code.",
            "Remove that line, or get the model from its maker.",
        )
    if trusted:
        return
    files = (
        config,
        read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {},
    )
    if any("auto_map" in content for content in files):
        older = str(config.get("model_type")) in OLDER_FAMILIES
        raise ModelError(
            f"{folder.name} wants to run Python code of its own (auto_map), which is not allowed.",
            f"If you trust its maker, write trust_remote_code: [{folder.name}] into config.yaml"
            + (
                f", and run it in BigDL-LLM's environment, for its code needs transformers 4: {OLDER_ENGINE}."
                if older
                else " (in Python: trust_remote_code=True); else take a version for transformers 5 without auto_map."
            ),
        )
