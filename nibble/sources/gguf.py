"""A GGUF file, as the Hugging Face model that it was made from.

Promises that tensors in Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 arrive in our forms bit for bit, and every other type in the
values that the `gguf` package gives it: F16 and BF16 as they are, k-quants and the like in float32. An embedding table
is dense here, whatever the file has; where it also is the output head and has one of our forms, the head stands beside
it in that form, for a table is looked up and a head is multiplied with.

A tensor is read, not mapped: a file that is cut while it is open is then a sentence, and not the end of the process.
Knows nothing of where results go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType as Type

from nibble.errors import ModelError
from nibble.lowbit.blocks import QuantizedTensor
from nibble.lowbit.ggml import Blocks
from nibble.sources import gguf_tokenizer
from nibble.sources.base import Stored
from nibble.sources.gguf_families import (
    EMBEDDING,
    HEAD,
    ROPE_FACTORS,
    WHOLE,
    Family,
    config_of,
    family_of,
    heads_of,
    names_of,
)
from nibble.sources.gguf_header import Header, TensorInfo, broken, read_header

OURS = {
    Type.Q4_0: "sym_int4", Type.Q4_1: "asym_int4", Type.Q5_0: "sym_int5", Type.Q5_1: "asym_int5", Type.Q8_0: "sym_int8",
}  # fmt: skip
"""Type of ggml -> the format of ours that is the same."""

GGML_BLOCK = 32
"""Weights of a block in all of these."""

PLAIN = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}


@dataclass(frozen=True)
class Gguf:
    """As `nibble.sources.base.Source`."""

    header: Header
    family: Family
    names: dict[str, str]
    """Tensor of the file -> its name in the model."""
    config: dict[str, Any]

    kind = "gguf"

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.header.path.stem

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """Name in the model -> the tensor, in the file's order."""
        found = {self.names[name]: self._stored(name) for name in self.names}
        if HEAD not in self.names and not self.config["tie_word_embeddings"]:
            table = self.header.tensors[EMBEDDING]
            # Its bytes were counted as the embedding's.
            found[WHOLE[HEAD]] = Stored(table.shape, 0, OURS[table.type], partial(self._read, EMBEDDING, True))
        return found

    @cached_property
    def dense(self) -> frozenset[str]:
        """Linear layers in F32, F16 or BF16, where others are packed."""
        linear = {name: info for name, info in self.header.tensors.items() if len(info.shape) > 1 and name != EMBEDDING}
        plain = {self.names[name] for name, info in linear.items() if info.type in PLAIN and name in self.names}
        return frozenset(plain if len(plain) < len(linear) else ())

    def copy_files(self, folder: Path) -> None:
        """As `nibble.sources.base.Source`."""
        gguf_tokenizer.write(self.header, folder)

    def _stored(self, name: str) -> Stored:
        info = self.header.tensors[name]
        packed = info.type in OURS and len(info.shape) == 2 and name != EMBEDDING
        return Stored(info.shape, info.nbytes, OURS[info.type] if packed else "", partial(self._read, name, packed))

    def _read(self, name: str, packed: bool) -> torch.Tensor | QuantizedTensor:
        """A tensor of the file, its rows in the model's order."""
        tensor = (_packed if packed else _dense)(self.header.path, self.header.tensors[name])
        heads = heads_of(name, self.config) if self.family.permuted else 0
        if not heads:
            return tensor
        order = torch.arange(tensor.shape[0]).view(heads, -1, 2).transpose(1, 2).flatten()
        if isinstance(tensor, QuantizedTensor):
            return replace(tensor, codes=tensor.codes[order], scales=tensor.scales[order])
        return tensor[order]


def open(path: Path) -> Gguf:  # noqa: A001 - each module of this package has it under this name
    """The model in a GGUF file; only its header is read, and the few numbers that its configuration needs.

    Raises:
        ModelError: broken, in pieces, or of a kind or type that is not read.
    """
    header = read_header(path)
    family = family_of(header)
    names = names_of(header, family)
    for kind in {header.tensors[name].type for name in names}:
        _refuse_unreadable(header, kind)
    factors = header.tensors.get(ROPE_FACTORS)
    if factors and (factors.type != Type.F32 or factors.nbytes > 2**16):
        raise broken(path, f"{ROPE_FACTORS} makes no sense")
    # Tokenizers are built when they are written: here it is only seen that this one can be.
    gguf_tokenizer.check(header)
    config = config_of(header, family, _dense(path, factors).flatten().tolist() if factors else ())
    for name in names if family.permuted else ():
        heads = heads_of(name, config)
        if heads and header.tensors[name].shape[0] % (2 * heads):
            raise broken(path, f"{name} has the shape {header.tensors[name].shape}, and there are {heads} heads")
    if header.tensors[EMBEDDING].type in OURS:
        config["tie_word_embeddings"] = False
    return Gguf(header, family, names, config)


def _bytes(path: Path, info: TensorInfo) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A tensor as it lies in the file."""
    data = np.fromfile(path, np.uint8, info.nbytes, offset=info.offset)
    if len(data) < info.nbytes:
        raise broken(path, "it was cut while it was read")
    return data


def _packed(path: Path, info: TensorInfo) -> QuantizedTensor:
    blocks, width = Blocks(OURS[info.type], GGML_BLOCK), info.shape[-1]
    data = torch.from_numpy(_bytes(path, info))
    return blocks.unpack(data.view(-1, width // GGML_BLOCK, blocks.nbytes), width)


def _dense(path: Path, info: TensorInfo) -> torch.Tensor:
    if info.type in PLAIN:
        return torch.from_numpy(_bytes(path, info)).view(PLAIN[info.type]).view(info.shape)
    if info.type in OURS:
        return _packed(path, info).dequantize().view(info.shape)
    return torch.from_numpy(quants.dequantize(_bytes(path, info).reshape(*info.shape[:-1], -1), info.type))


def _refuse_unreadable(header: Header, kind: Type) -> None:
    if kind in PLAIN or kind in OURS:
        return
    block, nbytes = quants.GGML_QUANT_SIZES[kind]
    try:
        quants.dequantize(np.zeros((1, nbytes), np.uint8), kind)
    except NotImplementedError:
        raise ModelError(
            f"{header.path.name} is stored in {kind.name}, which is not read here.",
            "Get the model in Q4_0, Q8_0, Q4_K_M or another usual type.",
        ) from None
