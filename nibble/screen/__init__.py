"""What may be loaded: a folder is refused, in one sentence, before anything in it is loaded or run.

    check           what may be loaded
    check_source    what may be read to make a low-bit model of it: GGUF, AWQ, GPTQ and BigDL-LLM's folders too
    check_adapter   what may be put on a model

Promises that nothing of the folder is executed, rendered, unpickled or opened unless it is an ordinary file of sensible
size, and that no library is imported for it. A template that is harmless by its text may still take for ever: that is
tried by `nibble.prompts.trial`, in a process of its own. Imports neither torch nor transformers. Knows nothing of where
models are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nibble.checkpoint import (
    TOKENIZER_FILES,
    check_size,
    convert_hint,
    gguf_alone,
    is_gguf,
    read_config,
    read_header,
    read_json,
    weight_files,
)
from nibble.errors import ModelError, SourceError
from nibble.screen.entries import check_entries
from nibble.screen.keys import check_keys, check_sizes
from nibble.screen.templates import check_template, templates

__all__ = ["check", "check_adapter", "check_code", "check_source", "packing", "quant_method", "templates"]

OLDER_FAMILIES = {
    "qwen": "Qwen (the first)", "chatglm": "ChatGLM", "baichuan": "Baichuan", "internlm": "InternLM",
    "internlm2": "InternLM2",
}  # fmt: skip
"""`model_type` of families that live in Python code of their own, for transformers 4 -> what people call them."""

OLDER_ENGINE = "`make bigdl`, then engine: bigdl in config.yaml"

BIGDL_KEY = "bigdl_transformers_low_bit"
OURS = "nibble"
"""`quant_method` of the folders that are loaded as they are."""

CONVERTED = {"gptq": "GPTQ", "awq": "AWQ"}
"""`quant_method` of the checkpoints that low-bit models are made of -> what people call them."""

EARLIER = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where the method's own program put its settings before config.json held them -> the method."""

MAX_VOCABULARY_BYTES = 96 * 2**20
SETTINGS_FILES = ("*config.json", "special_tokens_map.json", "chat_template.json")
"""The files whose keys a library takes as arguments."""


def check(folder: Path, *, trust_remote_code: bool = False, tokenizer: bool = True, weights: bool = True) -> None:
    """Refuse a folder that cannot or must not be loaded, before anything in it is loaded.

    Args:
        folder: a Hugging Face model folder.
        trust_remote_code: whether the folder's own Python code may run.
        tokenizer: whether a tokenizer must be there too.
        weights: whether the weights must be there too; a download looks at the rest before it fetches them.

    Raises:
        SourceError: nothing is wrong with it, but it can only be converted.
        ModelError: the first thing found wrong.
    """
    check_source(folder, trusted=trust_remote_code, weights=weights)
    config = read_config(folder)
    if is_gguf(folder):
        raise gguf_alone(folder)
    if BIGDL_KEY in config:
        raise SourceError(
            f"{folder.name} was saved by BigDL-LLM or IPEX-LLM, whose weight files are pickles.",
            f"{convert_hint(folder)} Or run it in its own library: {OLDER_ENGINE}.",
        )
    family = str(config.get("model_type"))
    if config.get("auto_map") and family in OLDER_FAMILIES:
        raise ModelError(
            f"{folder.name} is {OLDER_FAMILIES[family]}, whose own Python code needs transformers 4; here is 5.",
            f"It runs in BigDL-LLM's environment: {OLDER_ENGINE}.",
        )
    if tokenizer and not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        raise ModelError(
            f"{folder.name} has no tokenizer.",
            "Copy tokenizer.json and tokenizer_config.json of the same model into the folder.",
        )
    method = quant_method(folder, config)
    if method in CONVERTED:
        raise SourceError(
            f"{folder.name} is a {CONVERTED[method]} checkpoint, which is not loaded as it is.", convert_hint(folder)
        )


def check_source(folder: Path, *, trusted: bool = False, weights: bool = True) -> None:
    """Refuse a folder from which nothing must be read, not even to make another model of it.

    Args:
        folder: a Hugging Face folder in full precision, low bit, AWQ or GPTQ; one with a GGUF file; one of BigDL-LLM.
        trusted: whether the folder's own Python code may run.
        weights: whether the weights must be there.

    Raises:
        ModelError: the first thing found wrong.
    """
    if not folder.is_dir():
        raise ModelError(
            f"There is no folder {folder}.", "Name a folder that holds config.json and safetensors weights."
        )
    gguf = is_gguf(folder)
    if (folder / "config.json").exists() or not gguf:
        config = read_config(folder)
        check_code(folder, config, trusted=trusted)
        _check_quantization(folder, config)
        if (folder / "adapter_config.json").exists():
            raise ModelError(
                f"{folder.name} holds an adapter beside the model, which transformers would put on it unasked.",
                "Move adapter_config.json and the adapter's weights to a folder of their own, under home/adapters.",
            )
        if weights and not gguf and BIGDL_KEY not in config:
            tensors = sum(len(read_header(file)) for file in weight_files(folder))
            check_sizes(folder, config, tensors)
    else:
        check_code(folder, {}, trusted=trusted)
    _check_vocabulary(folder)


def check_code(folder: Path, config: dict[str, Any], *, trusted: bool) -> None:
    """Refuse a folder whose files would make a library run code or leave the folder, unless its maker is trusted.

    Args:
        folder: of a model or an adapter.
        config: its config.json; empty where it has none.
        trusted: whether Python files and `auto_map` may stand in it. Nothing else is let through by trust.

    Raises:
        ModelError: what would run, or where it leads.
    """
    code = check_entries(folder)
    contents = {path.name: read_json(path) for pattern in SETTINGS_FILES for path in sorted(folder.glob(pattern))}
    contents["config.json"] = config
    wanted = next((found for name in sorted(contents) if (found := check_keys(folder, name, contents[name]))), "")
    for name, text in templates(folder, contents).items():
        if problem := check_template(text):
            raise ModelError(
                f"The chat template in {name} of {folder.name} {problem}.", "Get the model from its maker."
            )
    if trusted or not (wanted or code):
        return
    older = str(config.get("model_type")) in OLDER_FAMILIES
    raise ModelError(
        f"{folder.name} wants to run Python code of its own ({wanted or code}), which is not allowed.",
        f"If you trust its maker, write trust_remote_code: [{folder.name}] into config.yaml"
        + (
            f", and run it in BigDL-LLM's environment, for its code needs transformers 4: {OLDER_ENGINE}."
            if older
            else " (in Python: trust_remote_code=True); else take a version for transformers 5 without code."
        ),
    )


def check_adapter(folder: Path) -> dict[str, Any]:
    """Refuse an adapter that must not be put on a model; what its adapter_config.json says.

    Raises:
        ModelError: the first thing found wrong.
    """
    if not (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder.name} has no adapter_config.json.", "Name a folder that PEFT has saved.")
    check_code(folder, {}, trusted=False)
    config = read_json(folder / "adapter_config.json")
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        raise ModelError(
            f"{folder.name} has no adapter_model.safetensors.", "Save the adapter anew with PEFT 0.7 or later."
        )
    read_header(weights)
    return config


def quant_method(folder: Path, config: dict[str, Any]) -> str:
    """By what a folder says that it is quantized; empty where it is not.

    Raises:
        ModelError: it says so in a form that two readers may understand differently.
    """
    said = config.get("quantization_config")
    if said is None:
        return str(packing(folder, config).get("quant_method", ""))
    method = said.get("quant_method") if isinstance(said, dict) else None
    if not isinstance(method, str) or not method:
        raise ModelError(
            f"quantization_config in config.json of {folder.name} does not say by what it is quantized.",
            "Take the model's full-precision version.",
        )
    # transformers believes these before `quant_method`.
    if method != "bitsandbytes" and any(said.get(key) for key in ("load_in_4bit", "load_in_8bit")):
        raise ModelError(
            f"quantization_config in config.json of {folder.name} contradicts itself.", "Get the model from its maker."
        )
    return method


def packing(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """How a folder's weights are packed, and by what (`quant_method`): as config.json says it, or an earlier file.

    Raises:
        ModelError: the earlier file cannot be read.
    """
    said = config.get("quantization_config")
    if said is not None:
        return dict(said) if isinstance(said, dict) else {}
    for file, method in EARLIER.items():
        if (folder / file).is_file():
            return {**read_json(folder / file), "quant_method": method}
    return {}


def _check_quantization(folder: Path, config: dict[str, Any]) -> None:
    method = quant_method(folder, config)
    if method and method != OURS and method not in CONVERTED:
        raise ModelError(
            f"{folder.name} is quantized with {method[:40]} already, which nothing here reads.",
            "Take its full-precision, GGUF, AWQ or GPTQ version.",
        )


def _check_vocabulary(folder: Path) -> None:
    """The large files of a tokenizer are not parsed here, which takes longer than a look at a folder may."""
    for pattern in (*TOKENIZER_FILES, "merges.txt", "tekken.json"):
        for path in folder.glob(pattern):
            check_size(path, MAX_VOCABULARY_BYTES)
    path = folder / "tokenizer.json"
    if path.exists():
        with path.open("rb") as stream:
            head = stream.read(64).lstrip()
            stream.seek(max(0, path.stat().st_size - 64))
            tail = stream.read().rstrip()
        if not (head.startswith(b"{") and tail.endswith(b"}")):
            raise ModelError(f"tokenizer.json in {folder.name} is not a JSON object.", "Download that file again.")
