"""What a model is made of, as far as memory and speed depend on it, read from its config.json and file headers.

Promises a shape or a ModelError, whatever stands in the files. Imports no torch and builds no model: which matrices
are packed follows from names and shapes, and families that keep theirs in other modules than `nn.Linear` are named in a
table. Knows nothing of machines and formats' speeds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nibble.checkpoint import DTYPE_BITS, is_gguf, read_config, read_header, weight_files
from nibble.errors import ModelError
from nibble.lowbit.formats import FORMATS, Format, resolve
from nibble.screen import OURS, packing

HEADS = {"lm_head", "embed_out", "output"}
"""Names of a model's output layer, which may be missing from the files: then it is the embedding's."""

LOOKED_UP = re.compile(r"(?:^|\.)(?:embed(?!_out)\w*|\w*embeddings?|wte|wpe|shared|token_embd)\.weight$")
"""Tables that are looked up and never packed."""

KEPT = re.compile(r"\.(?:gate|router)\.weight$|norm\w*\.weight$")
"""Matrices that choose among experts, and norms: small, and never packed."""

EXPERT = re.compile(r"\.experts\.")
"""Parts of a mixture; transformers joins them into tensors of three dimensions, which stay dense."""

NOT_LINEAR = {"gpt2", "openai-gpt", "falcon"}
"""Families whose layers are no `nn.Linear`, so that the output layer alone is packed."""

MOST_LAYERS = 10_000
LARGEST = 2**40
"""Numbers in a config.json beyond this are not believed."""


class Matrix(NamedTuple):
    """A matrix that is packed when a model is loaded in low bit."""

    rows: int
    """Outputs."""
    columns: int
    """Inputs."""
    form: str = ""
    """The format that it is stored in; empty where it is dense."""


@dataclass(frozen=True)
class Shape:
    """What a model is made of; its numbers are counts of weights unless they say otherwise."""

    family: str
    matrices: tuple[Matrix, ...]
    """Without the output layer, where that is tied to the embedding."""
    tied: Matrix | None
    """The output layer that has the embedding's weights: read with each token, and packed beside the embedding."""
    looked_up: int
    """In embeddings, of which a token reads one row."""
    experts: int
    """In dense parts of a mixture."""
    chosen: float
    """Share of the experts that a token passes through."""
    other: int
    """In what else stays dense: norms, biases, convolutions."""
    dense_bytes: int
    """Of all that stays dense, as it is held: 2 bytes each unless the folder is in low bit already."""
    form: str
    """Format of a folder that is in low bit already; empty for every other."""
    size_bytes: int
    """Of the weight files."""
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    key_bytes: int
    """Of keys and values of one token in one layer, in bfloat16."""
    windows: tuple[int, ...]
    """For each layer with keys and values, how many tokens it remembers; 0 is all."""

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of a conversation."""
        return sum(min(tokens, window or tokens) for window in self.windows) * self.key_bytes

    @property
    def dense(self) -> int:
        """Weights that are never packed."""
        return self.looked_up + self.experts + self.other


def read_shape(folder: Path) -> Shape:
    """What the model in a folder is made of; of a GGUF, AWQ or GPTQ folder, the model that it would be made into.

    Raises:
        ModelError: the folder's files cannot be read, or hold no model.
    """
    if is_gguf(folder):
        return _gguf_shape(min(folder.glob("*.gguf")))
    config, files = read_config(folder), weight_files(folder)
    tensors = {name: tensor for file in files for name, tensor in read_header(file).items()}
    stored = packing(folder, config)
    method = str(stored.get("quant_method") or "")
    form = resolve(stored.get("low_bit", "sym_int4")).name if method == OURS else ""
    sizes = {name: tuple(tensor["shape"]) for name, tensor in tensors.items()}
    matrices: dict[str, Matrix] = {}
    if form:
        matrices = _packed(tensors, FORMATS[form])
        stored_bytes = sum(
            prod(tensor["shape"]) * DTYPE_BITS[tensor["dtype"]] // 8
            for name, tensor in tensors.items()
            if name.removesuffix("_scale") not in matrices
        )
    elif method in ("awq", "gptq"):
        sizes = _unpacked_sizes(sizes, method, stored)
    dense = {name: size for name, size in sizes.items() if name.removesuffix("_scale") not in matrices}
    size_bytes = sum(file.stat().st_size for file in files)
    return _shape(config, dense, matrices, form, size_bytes, stored_bytes if form else None)


def _gguf_shape(file: Path) -> Shape:
    # The gguf package brings numpy, which whoever asks about other folders need not wait for.
    from nibble.sources.gguf_families import config_of, family_of, names_of
    from nibble.sources.gguf_header import read_header as read_gguf_header

    header = read_gguf_header(file)
    family = family_of(header)
    names = names_of(header, family)
    sizes = {names[name]: info.shape for name, info in header.tensors.items() if name in names}
    return _shape(config_of(header, family, ()), sizes, {}, "", file.stat().st_size, None)


def _shape(
    config: Mapping[str, Any], sizes: Mapping[str, tuple[int, ...]], packed: Mapping[str, Matrix], form: str,
    size_bytes: int, dense_bytes: int | None,
) -> Shape:  # fmt: skip
    """Sort tensors by what becomes of them.

    Args:
        sizes: of the tensors that are stored dense.
        packed: those that are not.
        dense_bytes: of the former as they will be held; None is 2 bytes for each number.
    """
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    family = str(config.get("model_type", ""))
    counts = dict.fromkeys(("looked_up", "experts", "other"), 0)
    matrices, table = list(packed.values()), Matrix(0, 0)
    for name, size in sizes.items():
        kind = _kind(name, size, family)
        if kind == "matrix" and not form:
            matrices.append(Matrix(size[0], size[1]))
            continue
        counts["other" if kind == "matrix" else kind] += prod(size)
        if kind == "looked_up":
            table = max(table, Matrix(size[0], size[1]), key=lambda matrix: matrix.rows * matrix.columns)
    if not matrices and not table.rows:
        raise ModelError("The files hold no language model: neither an embedding nor a matrix.", "Name another model.")
    head = any(_module(name) in HEADS for name in (*sizes, *packed))
    layers = _whole(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    attention = _whole(text, "num_attention_heads", "n_head", "n_heads") or 1
    hidden = _whole(text, "hidden_size", "n_embd", "d_model")
    kv_heads = _whole(text, "num_key_value_heads", "num_kv_heads") or attention
    experts = _whole(text, "num_local_experts", "num_experts", "n_routed_experts")
    return Shape(
        family=family, matrices=tuple(matrices), tied=None if head or not table.rows else table, **counts,
        chosen=min(1.0, _whole(text, "num_experts_per_tok", "experts_per_token") / experts) if experts else 1.0,
        dense_bytes=2 * sum(counts.values()) if dense_bytes is None else dense_bytes,
        form=form, size_bytes=size_bytes, layers=layers, hidden=hidden,
        intermediate=_whole(text, "intermediate_size", "ffn_dim", "n_inner") or 4 * hidden,
        vocabulary=_whole(text, "vocab_size") or table.rows,
        key_bytes=4 * kv_heads * (_whole(text, "head_dim") or hidden // attention),
        windows=_windows(text, layers),
    )  # fmt: skip


def _kind(name: str, size: tuple[int, ...], family: str) -> Literal["matrix", "looked_up", "experts", "other"]:
    """What becomes of a dense tensor of the files."""
    if EXPERT.search(name):
        return "experts"
    if len(size) != 2 or not all(size) or not name.endswith(".weight") or KEPT.search(name):
        return "other"
    if LOOKED_UP.search(name):
        return "looked_up"
    return "matrix" if family not in NOT_LINEAR or _module(name) in HEADS else "other"


def _module(name: str) -> str:
    """Last part of the name of the module that a weight belongs to; empty for other tensors."""
    path, _, tensor = name.rpartition(".")
    return path.rpartition(".")[2] if tensor == "weight" else ""


def _packed(tensors: Mapping[str, Any], declared: Format) -> dict[str, Matrix]:
    """The matrices of a folder in low bit; codes are [out, blocks, bytes of a block], and scales tell the format."""
    found = {}
    for name, tensor in tensors.items():
        scale = tensors.get(f"{name}_scale")
        if scale is None or len(tensor["shape"]) != 3 or not all(tensor["shape"]):
            continue
        rows, blocks, width = tensor["shape"]
        kind = {"F16": "float16", "F32": "float32"}.get(scale["dtype"])
        for fmt in (declared, *FORMATS.values()):
            columns = blocks * fmt.block or width
            if (
                fmt.quantized
                and fmt.scale == kind
                and fmt.code_shape(rows, columns) == (rows, blocks, width)
                and fmt.scale_shape(rows, columns) == tuple(scale["shape"])
            ):
                found[name] = Matrix(rows, columns, fmt.name)
                break
    return found


def _unpacked_sizes(
    sizes: Mapping[str, tuple[int, ...]], method: str, stored: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Sizes of the weights in `qweight` tensors of AWQ [in, out / 8] and GPTQ [in / 8, out]; 8 is for 4 bits."""
    bits = min(_whole(stored, "bits", "w_bit") or 4, 32)
    found: dict[str, tuple[int, ...]] = {}
    for name, size in sizes.items():
        stem, _, kind = name.rpartition(".")
        if kind == "qweight" and len(size) == 2:
            rows, columns = (size[1] * 32 // bits, size[0]) if method == "awq" else (size[1], size[0] * 32 // bits)
            found[f"{stem}.weight"] = (rows, columns)
        elif kind not in ("qzeros", "scales", "g_idx"):
            found[name] = size
    return found


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != layers:
        return (0,) * min(layers, MOST_LAYERS)
    windows = {"full_attention": 0, "sliding_attention": _whole(config, "sliding_window")}
    return tuple(windows[kind] for kind in kinds if isinstance(kind, str) and kind in windows)


def _whole(config: Mapping[str, Any], *names: str) -> int:
    """The first of these that is a believable whole number; 0 where none is."""
    values: Iterable[Any] = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and 0 < value <= LARGEST), 0)
