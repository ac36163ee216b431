"""A model folder's files, read without loading them: config.json, which files hold the weights, and their headers.

Promises that what is wrong with a file is one sentence, that a header which is accepted fits its file byte by byte, and
that nothing but an ordinary file of a sensible size is opened. Imports neither torch nor transformers. Knows nothing of
where models are kept and of what may be trusted.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

from nibble.errors import ModelError, SourceError

MAX_JSON_BYTES = 16 * 2**20
LARGER_JSON = {"model.safetensors.index.json": 32 * 2**20, "tokenizer.json": 96 * 2**20, "vocab.json": 96 * 2**20}
"""Files that may be larger than the others, of models with many experts or tokens."""

MAX_HEADER_BYTES = 16 * 2**20
"""A header of 100,000 tensors has 11 MB; the safetensors library itself takes up to 100 MB."""

MAX_BRACKETS = 500_000
"""Opening brackets in a file: each makes an object of sixty bytes, and a header has three for a tensor."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"[^/\\\0]+\.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.mdl")
DTYPE_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16, "I16": 16,
    "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""dtype of a safetensors header -> bits of one number."""

MAX_SIDES = 16
"""Dimensions of a tensor; models have five at most."""

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "seq_length", "max_sequence_length", "n_ctx")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        SourceError: there is a GGUF file instead.
        ModelError: missing, or not a JSON object.
    """
    if not (folder / "config.json").exists():
        if is_gguf(folder):
            raise gguf_alone(folder)
        raise ModelError(f"{folder.name} has no config.json.", "Name a Hugging Face model folder.")
    return read_json(folder / "config.json")


def is_gguf(folder: Path) -> bool:
    """Whether a folder's weights are a GGUF file alone; config.json often lies beside it."""
    return any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors"))


def convert_hint(folder: Path) -> str:
    """What to do with a folder that can only be converted."""
    return f"Make a low-bit model of it: Shrink on the Models tab, or `nibble quantize {folder.name}`."


def gguf_alone(folder: Path) -> SourceError:
    """What is said to whoever wants to load a GGUF file."""
    return SourceError(f"{folder.name} holds a GGUF file, which is not loaded as it is.", convert_hint(folder))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: not an ordinary file, unreadable, too large, or not a JSON object.
    """
    where = f"{path.name} in {path.parent.name}"
    try:
        check_size(path, LARGER_JSON.get(path.name, MAX_JSON_BYTES))
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.", "Check the file and its permissions.") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{where} is not valid JSON.", "Download that file again.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{where} is not a JSON object.", "Download that file again.")
    return value


def parse_json(text: bytes, **options: Any) -> Any:
    """What a JSON text says, as `json.loads` with these options.

    Raises:
        ValueError: not JSON in UTF-8, or one that would fill the memory.
        RecursionError: nested too deeply.
    """
    if text.count(b"[") + text.count(b"{") > MAX_BRACKETS:
        raise ValueError("far too many brackets")
    return json.loads(text.decode("utf-8"), **options)


def check_size(path: Path, limit: int) -> None:
    """Refuse what would block or fill the memory when it is read.

    Raises:
        ModelError: not an ordinary file, or larger than `limit` bytes.
        OSError: it cannot be looked at.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise ModelError(f"{path.name} in {path.parent.name} is not an ordinary file.", "Download that file again.")
    if size > limit:
        raise ModelError(
            f"{path.name} in {path.parent.name} is too large to be true ({size:,} bytes).", "Download that file again."
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights: those that transformers would read, by the names it looks for.

    Raises:
        ModelError: none, pickles only, or an index that names a file which is missing or outside the folder.
    """
    # Where both are there transformers takes the single file; an index that lies is refused all the same.
    shards = _shards(folder) if (folder / INDEX).exists() else []
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if shards:
        return shards
    pickle = next((path.name for pattern in PICKLES for path in folder.glob(pattern)), None)
    other = next((path.name for path in folder.glob("*.safetensors")), None)
    if pickle:
        raise ModelError(
            f"{folder.name} holds its weights only as a pickle ({pickle}), which can run code when it is opened.",
            "Get the model's safetensors version, or convert it on a machine that you can afford to lose.",
        )
    if other:
        raise ModelError(
            f"{folder.name} has neither {WEIGHTS} nor {INDEX}, only {other}.", "Download the missing file of the model."
        )
    raise ModelError(f"{folder.name} holds no weights (*.safetensors).", "Download the model again.")


def _shards(folder: Path) -> list[Path]:
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{INDEX} in {folder.name} names no weights.", "Download that file again.")
    for name in sorted(set(names.values())):
        if "/" in name or "\\" in name:
            raise ModelError(f"{INDEX} in {folder.name} names a file outside the folder.", "Do not use this model.")
        if not SHARD.fullmatch(name):
            raise ModelError(
                f"{INDEX} in {folder.name} names a shard that is not safetensors: {name[:80]!r}.",
                "Get the model's safetensors version.",
            )
        if not _exists(folder / name):
            raise ModelError(f"{folder.name} lacks the shard {name[:80]}.", "Download that file again.")
    return [folder / name for name in sorted(set(names.values()))]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name longer than the file system takes
        return False


def read_header(file: Path) -> dict[str, Any]:
    """Names, dtypes, shapes and offsets of a safetensors file, checked against each other and its length.

    The format: 8 bytes little-endian length of the header, the header in JSON, then the tensors, one after the other
    without gaps (https://github.com/huggingface/safetensors#format).

    Raises:
        ModelError: cut short, too long or malformed.
    """
    if not file.is_file():
        raise _broken(file, "it is not an ordinary file")
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise _broken(file, "its header is cut short, malformed or too long")
            header = parse_json(stream.read(length), object_pairs_hook=_no_repeats)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}.", "Check the file and its permissions.") from None
    except _RepeatedName as error:
        raise _broken(file, f"its header names {error} twice") from None
    except (ValueError, RecursionError):
        raise _broken(file, "its header is not valid JSON") from None
    if not isinstance(header, dict):
        raise _broken(file, "its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise _broken(file, "its metadata is malformed")
    end = _check_tensors(file, header)
    if 8 + length + end != size:
        raise _broken(file, f"it has {size:,} bytes and needs {8 + length + end:,}")
    return header


class _RepeatedName(ValueError):
    """A JSON object that has a key twice: two readers may see two different things in it."""


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _RepeatedName(repr(twice[:80]))
    return found


def _check_tensors(file: Path, header: dict[str, Any]) -> int:
    """Where the last tensor ends; they lie one after the other, each as long as its shape and dtype say."""
    spans = []
    for name, tensor in header.items():
        problem = _problem(tensor)
        if problem:
            raise _broken(file, f"{problem} of {name[:80]!r} cannot be right")
        spans.append((*tensor["data_offsets"], name))
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            raise _broken(file, f"{name[:80]!r} {'overlaps another tensor' if begin < end else 'lies behind a gap'}")
        end = stop
    return end


def _problem(tensor: Any) -> str:
    """Which part of a tensor's entry in a header is malformed; empty where none is."""
    if not isinstance(tensor, dict) or tensor.keys() != {"dtype", "shape", "data_offsets"}:
        return "the entry"
    dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return "the dtype"
    if not _whole_numbers(shape) or len(shape) > MAX_SIDES:
        return "the shape"
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "the place"
    return "" if elements(shape) * DTYPE_BITS[dtype] == (offsets[1] - offsets[0]) * 8 else "the length"


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


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
        totals[kind] = totals.get(kind, 0) + elements(tensor["shape"]) * DTYPE_BITS[kind]
    top = max(totals, key=lambda kind: totals[kind], default="")
    return names.get(top, top.lower())
