"""From a model's shape and a machine's figures to bytes and tokens a second.

Promises what the engine really holds: a packed matrix in the form that its kernel takes, with the scales of the stored
form beside it; the embedding dense, and an output layer that was tied to it packed once more; keys and values of a
conversation; the process. Memory is private memory, and the pages of a dense model's mapped files. No figure here is
of one model or one machine. Imports no torch. docs/estimates.md holds the estimates against measurements.

It does not know what other programs do to the machine, nor what a GPU's kernels take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nibble.estimate.shape import Matrix, Shape, read_shape
from nibble.lowbit.formats import FORMATS, Format, resolve
from nibble.probe import Machine, known, unmeasured

CONTEXT = 2048
"""Tokens of the conversation that memory is estimated for."""

CHAT_TOKENS = 128
"""Tokens of the conversation that speed is estimated for."""

KEPT = 0.85
"""Of the speed that the parts' own speeds add up to, what a whole model keeps: its weights sweep the caches in which
the parts were measured. From docs/estimates.md: most rows of two machines lay at 0.8 to 0.9."""

LEAN = {"llama", "mistral", "qwen2"}
"""Families whose tokens take the lean way (`nibble.lowbit.lean`)."""

KERNEL_ROWS = {"cpu": 16, "cuda": 8}
"""Device -> of what the number of a matrix's rows must be a multiple for the int4 kernel. Elsewhere there is none."""

TERM_BYTES = 4
"""Of a scale and a zero in bfloat16, which the kernel takes for each row and block of a plane."""

TOKENIZER_BYTES = 1024
"""Of a tokenizer for each of its tokens, with the copy that decodes: 0.6 to 1.3 kB were measured on tokenizers of
6,144, 32,000 and 151,665 tokens."""

PACKING_BYTES = 6 * 4 * 2**21
"""Beside the model while it is packed: a piece of a weight (2^21 numbers) in float32, six times over."""

CONVERTING_BYTES = 2**25
"""Beside the model while a packed weight is brought into the kernel's form."""

ANSWERING_BYTES = 2**25
"""Beside the model while a prompt is read: pieces of weights, unpacked."""

PIECE_TOKENS = 1024
"""Tokens of a prompt that are read at once; the engine chooses 64 to 2,048 by its speed."""


@dataclass(frozen=True)
class Estimate:
    """What a model will take in one format on one machine."""

    format: str
    disk_bytes: int
    """Of the weight files when saved."""
    peak_bytes: int
    """The most memory that the process takes, while loading or while answering."""
    steady_bytes: int
    """What it takes between answers, with a conversation of `CONTEXT` tokens."""
    tokens_per_s: float
    """In a short chat; 0 where the machine was not measured, and on a GPU."""
    fits: bool
    """Whether the peak is within the memory that is free now."""


def estimates(
    folder: Path, machine: Machine, *, formats: Sequence[str] | None = None, context: int = CONTEXT
) -> list[Estimate]:
    """What the model in a folder will take, in each format.

    Args:
        folder: a model's folder; one in low bit already has one estimate, in its own format.
        machine: what is known of this machine, from `nibble.probe`.
        formats: names of formats; None is all.
        context: tokens of the conversation.

    Raises:
        ModelError: the folder cannot be read.
        FormatError: one of the names is no format.
    """
    shape = read_shape(folder)
    return [estimate(shape, name, machine, context) for name in ([shape.form] if shape.form else formats or FORMATS)]


def needed_bytes(folder: Path, low_bit: str, home: Path) -> int:
    """The most memory that loading a model on the CPU and a conversation with it take.

    Raises:
        ModelError, FormatError: as `estimates`.
    """
    machine = (known(home) or unmeasured()).on("cpu")
    return estimates(folder, machine, formats=[low_bit])[0].peak_bytes


def estimate(shape: Shape, name: str, machine: Machine, context: int = CONTEXT) -> Estimate:
    """As `estimates`, of one shape in one format."""
    fmt = resolve(name)
    weights = [_Held.of(fmt, matrix, machine) for matrix in _matrices(shape, fmt)]
    base = shape.dense_bytes + (machine.process_bytes if machine.device == "cpu" else 0)
    base += TOKENIZER_BYTES * shape.vocabulary if machine.device == "cpu" else 0
    steady = base + sum(weight.bytes for weight in weights) + shape.cache_bytes(context)
    peak = max(base + _loading_peak(weights, fmt, shape), steady + _activations(shape, context) + ANSWERING_BYTES)
    speed = 0.0 if machine.device != "cpu" else _speed(shape, fmt, weights, machine)
    return Estimate(fmt.name, _disk_bytes(shape, fmt), peak, steady, speed, peak <= machine.free_bytes)


@dataclass(frozen=True)
class _Held:
    """One matrix as it is held: bytes in its stored form and in the form that serves."""

    matrix: Matrix
    format: Format
    stored: int
    bytes: int

    @classmethod
    def of(cls, fmt: Format, matrix: Matrix, machine: Machine) -> _Held:
        fmt = FORMATS[matrix.form] if matrix.form else fmt
        stored = fmt.nbytes(matrix.rows, matrix.columns)
        return cls(matrix, fmt, stored, _kernel_bytes(fmt, matrix, machine) or stored)

    @property
    def weights(self) -> int:
        return self.matrix.rows * self.matrix.columns


def _matrices(shape: Shape, fmt: Format) -> Iterator[Matrix]:
    """What is packed or, in a format that packs nothing, would be; a tied output layer is then no matrix of its own."""
    yield from shape.matrices
    if shape.tied is not None and fmt.quantized and not shape.form:
        yield shape.tied


def _kernel_bytes(fmt: Format, matrix: Matrix, machine: Machine) -> int:
    """Bytes of a matrix that the int4 kernel serves; 0 where it does not.

    See `nibble.lowbit.recipes`: one plane of 4-bit codes or two, a scale and a zero for each block of each; and the
    stored form's scales, from which it can be taken back.
    """
    multiple = KERNEL_ROWS.get(machine.device)
    if not planes(fmt) or multiple is None or matrix.rows % multiple or not served(fmt, machine):
        return 0
    codes = planes(fmt) * fmt.padded(matrix.columns) * matrix.rows // 2
    terms = planes(fmt) * fmt.padded(matrix.columns) // fmt.block * matrix.rows * TERM_BYTES
    scales = fmt.nbytes(matrix.rows, matrix.columns) - matrix.rows * fmt.padded(matrix.columns) * fmt.bits // 8
    return codes + terms + scales


def planes(fmt: Format) -> int:
    """How many matrices of 4-bit codes the kernel multiplies for one of this format; 0 where it cannot."""
    if fmt.kind in ("float8", "none"):
        return 0
    return 1 if fmt.bits == 4 and fmt.kind != "codebook" else 2


def served(fmt: Format, machine: Machine) -> bool:
    """Whether the machine's int4 kernel serves a format; where that was not tried it is taken to."""
    return bool(planes(fmt)) and (machine.kernels is None or machine.device != "cpu" or fmt.name in machine.kernels)


def _loading_peak(weights: Sequence[_Held], fmt: Format, shape: Shape) -> int:
    """The most that packed weights take while loading: all in the stored form, then one after the other converted."""
    held = sum(weight.stored for weight in weights)
    peak = held + (PACKING_BYTES if fmt.quantized and not shape.form else 0)
    # The largest first, as `nibble.lowbit.linear.prepare` does it.
    for weight in sorted(weights, key=lambda weight: weight.weights * weight.format.bits, reverse=True):
        if weight.bytes != weight.stored:
            peak = max(peak, held + weight.bytes + CONVERTING_BYTES)
            held += weight.bytes - weight.stored
    return peak


def _activations(shape: Shape, context: int) -> int:
    """Of the pieces in which a prompt is read: two rows of the width between the two halves of a layer's second part,
    their product, and some of the layer's own width, in bfloat16."""
    return 2 * min(context, PIECE_TOKENS) * (3 * shape.intermediate + 6 * shape.hidden)


def _disk_bytes(shape: Shape, fmt: Format) -> int:
    if shape.form:
        return shape.size_bytes
    packed = sum(fmt.nbytes(matrix.rows, matrix.columns) for matrix in _matrices(shape, fmt))
    return packed + 2 * shape.dense


def _speed(shape: Shape, fmt: Format, weights: Sequence[_Held], machine: Machine) -> float:
    """Tokens a second: each weight once, each layer's own time, the cache once; 0 where something is not known."""
    rates, dense = machine.rates, machine.rates.get("bf16", 0.0)
    way = "dense" if not fmt.quantized else "portable"
    if served(fmt, machine):
        way = "lean" if shape.family in LEAN else "kernel"
    if not dense or not machine.bandwidth or way not in machine.layer_s or any(
        not rates.get(weight.format.name) for weight in weights
    ):  # fmt: skip
        return 0.0
    seconds = machine.token_s + shape.layers * machine.layer_s[way]
    seconds += sum(weight.weights / rates[weight.format.name] for weight in weights)
    tied = shape.tied.rows * shape.tied.columns if shape.tied and not fmt.quantized and not shape.form else 0
    seconds += (shape.other + shape.chosen * shape.experts) / dense + tied / (rates.get(fmt.name) or dense)
    seconds += shape.cache_bytes(CHAT_TOKENS) / machine.bandwidth
    return KEPT / seconds if seconds > 0 else 0.0
