"""The models on disk: where a name leads, what a folder holds, and whether it can be loaded at all.

Promises that a folder is judged from its JSON files and safetensors headers alone, before anything is loaded or run,
and that what is wrong with it is one sentence. Imports neither torch nor transformers. Knows nothing of engines.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nibble.errors import ModelError, NibbleError

GUIDE = "guide"
GUIDE_FOLDER = Path(__file__).parents[1] / "guide" / "model"

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""A model's name: a folder directly under home/models."""

MAX_JSON_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 100_000_000
"""The limit that the safetensors library itself sets on a header."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.mdl")
DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
"""safetensors dtype -> bytes; every other one (I8, U8, BOOL, F8_*) takes one."""

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "seq_length", "max_sequence_length", "n_ctx")


OLDER_FAMILIES = {
    "qwen": "Qwen (the first)", "chatglm": "ChatGLM", "baichuan": "Baichuan", "internlm": "InternLM",
    "internlm2": "InternLM2",
}  # fmt: skip
"""`model_type` of families that live in Python code of their own, for transformers 4 -> what people call them."""

OLDER_ENGINE = "`make bigdl`, then engine: bigdl in config.yaml"


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model from its folder alone."""

    name: str
    folder: Path
    family: str
    """`model_type` of config.json."""
    format: str
    """Low-bit format of the stored weights, or the dtype's name where they are in full precision."""
    parameters: int
    size_bytes: int
    """Of the weight files."""
    context: int
    """Tokens the model can see at once; 0 where config.json does not say."""
    problem: str = ""
    """Why it cannot be loaded; empty when nothing is wrong."""


Judge = Callable[[Path, str], "ModelCard"]
"""A folder and its name -> its card; raises where the folder cannot or must not be loaded."""


def models(home: Path, judge: Judge | None = None) -> list[ModelCard]:
    """The guide and every folder in home/models, by name; a broken one carries its problem instead of raising.

    Args:
        home: Nibble's home folder.
        judge: None is `check`, then `inspect`.
    """
    root = home / "models"
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    named = [(GUIDE, GUIDE_FOLDER)] + [(path.name, path) for path in folders if NAME.fullmatch(path.name)]
    return [_card_or_problem(name, folder, judge or _judge) for name, folder in named if folder.is_dir()]


def _judge(folder: Path, name: str) -> ModelCard:
    check(folder)
    return inspect(folder, name)


def _card_or_problem(name: str, folder: Path, judge: Judge) -> ModelCard:
    try:
        return judge(folder, name)
    except NibbleError as error:
        return ModelCard(name, folder, "", "", 0, 0, 0, problem=str(error))


def find(name: str, home: Path, *, paths: bool = False) -> Path:
    """The folder that a model's name leads to.

    Args:
        name: `guide`, a name in home/models or, where `paths`, any folder. Endpoints and the page pass names only.
        home: Nibble's home folder.
        paths: whether a path is accepted.

    Raises:
        ModelError: nothing of that name; the hint lists the names that there are.
    """
    if name == GUIDE:
        return GUIDE_FOLDER
    if NAME.fullmatch(name) and (home / "models" / name).is_dir():
        return home / "models" / name
    if paths and Path(name).expanduser().is_dir():
        return Path(name).expanduser().resolve()
    known = ", ".join(card.name for card in models(home)) or "none yet"
    what = "model or folder" if paths else "model"
    raise ModelError(
        f"There is no {what} {name!r}.", f"Models here: {known}. Put a model's folder into {home / 'models'}."
    )


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
        _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {},
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


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        ModelError: missing, or not a JSON object.
    """
    if not (folder / "config.json").exists():
        if next(folder.glob("*.gguf"), None):
            raise ModelError(
                f"{folder.name} holds a GGUF file, which this version does not read.",
                "Get the same model in Hugging Face form (config.json and safetensors).",
            )
        raise ModelError(f"{folder.name} has no config.json.", "Name a Hugging Face model folder.")
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path.name} in {path.parent.name} is too large to be true.", "Download that file again.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.", "Check the file and its permissions.") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path.name} in {path.parent.name} is not valid JSON.", "Download that file again.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} in {path.parent.name} is not a JSON object.", "Download that file again.")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights: those that the index names, or all there are.

    Raises:
        ModelError: none, pickles only, or an index that names a file which is missing or outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if files:
            return files
        pickle = next((path.name for pattern in PICKLES for path in folder.glob(pattern)), None)
        if pickle:
            raise ModelError(
                f"{folder.name} holds its weights only as a pickle ({pickle}), which can run code when it is opened.",
                "Get the model's safetensors version, or convert it on a machine that you can afford to lose.",
            )
        raise ModelError(f"{folder.name} holds no weights (*.safetensors).", "Download the model again.")
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index.name} in {folder.name} names no weights.", "Download that file again.")
    files = [folder / name for name in sorted(set(names.values()))]
    for file in files:
        if file.parent != folder or file.name in (".", ".."):
            raise ModelError(
                f"{index.name} in {folder.name} names a file outside the folder.", "Do not use this model."
            )
        if not file.exists():
            raise ModelError(f"{folder.name} lacks the shard {file.name}.", "Download that file again.")
    return files


def read_header(file: Path) -> dict[str, Any]:
    """Names, dtypes, shapes and offsets of a safetensors file, checked against its length.

    The format: 8 bytes little-endian length of the header, the header in JSON, then the tensors
    (https://github.com/huggingface/safetensors#format).

    Raises:
        ModelError: cut short, too long or malformed.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size):
            raise _broken(file, "its header is cut short or malformed")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError):
            raise _broken(file, "its header is not valid JSON") from None
    if not isinstance(header, dict):
        raise _broken(file, "its header is not a JSON object")
    header.pop("__metadata__", None)
    try:
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        matches = 8 + length + end == size
    except (TypeError, KeyError, IndexError):
        raise _broken(file, "its header is malformed") from None
    if not matches:
        raise _broken(file, f"it has {size:,} bytes and needs {8 + length + end:,}")
    return header


def _broken(file: Path, why: str) -> ModelError:
    return ModelError(f"{file.name} in {file.parent.name} is broken: {why}.", "Download that file again.")


def inspect(folder: Path, name: str = "") -> ModelCard:
    """What a folder holds, read from config.json and the safetensors headers.

    Raises:
        ModelError: as `check`.
    """
    config = read_config(folder)
    files = weight_files(folder)
    tensors = {key: tensor for file in files for key, tensor in read_header(file).items()}
    quantization = config.get("quantization_config") or {}
    text = config.get("text_config") or config
    manifest = _read_json(folder / "nibble.json") if (folder / "nibble.json").exists() else {}
    return ModelCard(
        name=name or folder.name,
        folder=folder,
        family=str(config.get("model_type", "")),
        format=str(quantization.get("low_bit") or quantization.get("quant_method") or _dtype_name(tensors)),
        parameters=int(manifest.get("parameters") or sum(_elements(tensor["shape"]) for tensor in tensors.values())),
        size_bytes=sum(file.stat().st_size for file in files),
        context=next((int(text[key]) for key in CONTEXT_KEYS if isinstance(text.get(key), int)), 0),
    )


def _elements(shape: list[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _dtype_name(tensors: dict[str, Any]) -> str:
    """The dtype that most of the bytes are in, by torch's name."""
    names = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
    totals: dict[str, int] = {}
    for tensor in tensors.values():
        kind = tensor["dtype"]
        totals[kind] = totals.get(kind, 0) + _elements(tensor["shape"]) * DTYPE_BYTES.get(kind, 1)
    top = max(totals, key=lambda kind: totals[kind], default="")
    return names.get(top, top.lower())
