"""The front of a GGUF file: its metadata, and where each tensor lies.

Promises that nothing a file says is believed before it is known to fit into the file, so that a broken one is refused
at once and in one sentence. Imports no torch. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md;
`gguf.GGUFReader` took 10 s and 560 MB for the vocabulary of Qwen2.5, and loops for as long as a hostile count says.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from nibble.errors import ModelError

VERSIONS = (2, 3)
MAX_TENSORS = 100_000
MAX_PAIRS = 10_000
MAX_ITEMS = 2**21
"""Of all arrays of the metadata together; a vocabulary of 262,144 tokens has three lists, and half a million merges."""
MAX_HEADER_BYTES = 64 * 2**20
MAX_DIMENSIONS = 4
MAX_NAME = 64
"""Bytes of a tensor's name, as ggml has it."""
ALIGNMENT = 32

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a metadata value -> how `struct` reads it."""
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    """Slowest dimension first, as in torch."""
    offset: int
    """From the start of the file, in bytes."""
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its tensors."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    """In the file's order."""

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of the metadata.

        Raises:
            ModelError: it is of another kind, or missing while there is no default.
        """
        value = self.metadata.get(key, default)
        if value is None and key not in self.metadata:
            raise broken(self.path, f"it does not say {key}")
        if not isinstance(value, kind) and value is not default:
            raise broken(self.path, f"its {key} is of the wrong kind")
        return value


def read_header(path: Path) -> Header:
    """Read and check the front of a GGUF file.

    Raises:
        ModelError: no GGUF file, broken, of a version or byte order that is not read here, or one piece of several.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, data)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.", "Check the file and its permissions.") from None
    except (struct.error, UnicodeDecodeError, ValueError):
        # mmap raises ValueError for an empty file.
        raise broken(path, "its header is cut short, malformed or far too long") from None


def broken(path: Path, why: str) -> ModelError:
    """The refusal of a file that contradicts itself."""
    return ModelError(f"{path.name} is broken: {why}.", "Download that file again.")


def _read(path: Path, data: mmap.mmap) -> Header:
    if data[:4] != b"GGUF":
        raise ModelError(f"{path.name} is no GGUF file.", "Download it again, or name another file.")
    (version,) = struct.unpack_from("<I", data, 4)
    if version not in VERSIONS:
        if version & 0xFFFF == 0:
            raise ModelError(f"{path.name} is a big-endian GGUF file.", "Get its little-endian version.")
        raise ModelError(
            f"{path.name} is of GGUF version {version}; versions 2 and 3 are read here.",
            "Get a newer file of the model.",
        )
    tensor_count, pair_count = struct.unpack_from("<QQ", data, 8)
    if tensor_count > MAX_TENSORS or pair_count > MAX_PAIRS:
        raise broken(path, f"it counts {tensor_count:,} tensors and {pair_count:,} pairs of metadata")
    reader = _Reader(data, 24)
    metadata = {}
    for _ in range(pair_count):
        key = reader.string()
        metadata[key] = reader.value(reader.number("I"))
    pieces = metadata.get("split.count", 1)
    if isinstance(pieces, int) and pieces > 1:
        raise ModelError(f"{path.name} is one piece of {pieces}.", "Merge them first: gguf-split --merge FIRST OUT.")
    entries = [(reader.string(), *reader.tensor()) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise broken(path, "its alignment makes no sense")
    start = -(-reader.place // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in entries:
        if name in tensors or len(name) > MAX_NAME:
            raise broken(path, f"it holds {name[:MAX_NAME]} twice, or that is no name")
        tensors[name] = _placed(path, name, (kind, shape, start + offset), len(data))
    return Header(path, metadata, tensors)


def _placed(path: Path, name: str, entry: tuple[int, tuple[int, ...], int], size: int) -> TensorInfo:
    """One tensor's entry, checked against the size of the file."""
    number, shape, offset = entry
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise ModelError(
            f"{name} of {path.name} is of a type that is not known here ({number}).",
            "Get the model in Q4_0, Q8_0, Q4_K_M or another usual type.",
        ) from None
    block, nbytes = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block or not all(shape):
        raise broken(path, f"{name} has the shape {shape}, which {kind.name} cannot have")
    total = prod(shape) // block * nbytes
    if offset + total > size:
        raise broken(path, f"it has {size:,} bytes, and {name} ends at {offset + total:,}")
    return TensorInfo(kind, shape, offset, total)


class _Reader:
    """Reads one thing after the other; `struct.error` where the file ends before it."""

    def __init__(self, data: mmap.mmap, place: int) -> None:
        self.data = data
        self.place = place
        self.end = min(len(data), MAX_HEADER_BYTES)
        self.items = MAX_ITEMS

    def number(self, form: str) -> Any:
        (value,) = self.numbers(form, 1)
        return value

    def numbers(self, form: str, count: int) -> tuple[Any, ...]:
        length = struct.calcsize(f"<{form}") * count
        if length > self.end - self.place:
            raise struct.error
        values = struct.unpack_from(f"<{count}{form}", self.data, self.place)
        self.place += length
        return values

    def string(self) -> str:
        length = self.number("Q")
        end = self.place + length
        if end > self.end:
            raise struct.error
        text = self.data[self.place : end].decode("utf-8")
        self.place = end
        return text

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            if kind not in NUMBERS:
                raise struct.error
            return self.number(NUMBERS[kind])
        inner, count = self.number("I"), self.number("Q")
        self.items -= count
        # Arrays of arrays are allowed by the format and written by nobody.
        if self.items < 0 or (inner not in NUMBERS and inner != STRING):
            raise struct.error
        if inner in NUMBERS:
            return list(self.numbers(NUMBERS[inner], count))
        read: Callable[[], str] = self.string
        return [read() for _ in range(count)]

    def tensor(self) -> tuple[tuple[int, ...], int, int]:
        dimensions = self.number("I")
        if dimensions > MAX_DIMENSIONS:
            raise struct.error
        shape = tuple(reversed(self.numbers("Q", dimensions)))
        return shape, self.number("I"), self.number("Q")
