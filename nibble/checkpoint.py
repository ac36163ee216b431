"""A model folder's files, read without loading them: config.json, which files hold the weights, and their headers.

Promises that what is wrong with a file is one sentence. Imports neither torch nor transformers. Knows nothing of where
models are kept and of what may be trusted.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from nibble.errors import ModelError

MAX_JSON_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 100_000_000
"""The limit that the safetensors library itself sets on a header."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.mdl")
DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
"""safetensors dtype -> bytes; every other one (I8, U8, BOOL, F8_*) takes one."""

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "seq_length", "max_sequence_length", "n_ctx")


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
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: unreadable, too large, or not a JSON object.
    """
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
    names = read_json(index).get("weight_map")
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


def elements(shape: list[int]) -> int:
    """How many numbers a tensor of this shape holds."""
    count = 1
    for side in shape:
        count *= side
    return count


def dtype_name(tensors: dict[str, Any]) -> str:
    """The dtype that most of the bytes are in, by torch's name."""
    names = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
    totals: dict[str, int] = {}
    for tensor in tensors.values():
        kind = tensor["dtype"]
        totals[kind] = totals.get(kind, 0) + elements(tensor["shape"]) * DTYPE_BYTES.get(kind, 1)
    top = max(totals, key=lambda kind: totals[kind], default="")
    return names.get(top, top.lower())
