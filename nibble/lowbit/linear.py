"""A linear layer whose weight is packed: forward, and backward to its input, in every format on every device.

Promises that float32 inputs meet exactly the dequantized weight, that `state_dict` and every move see the stored form
of the weight whatever form the layer holds, and that training never sees a kernel's rounding. Knows nothing of
transformers. Not safe to be called first from two threads at once: `prepare` it before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from nibble.errors import ModelError
from nibble.lowbit import kernels
from nibble.lowbit.blocks import QuantizedTensor, chunk_for, quantize, row_chunks
from nibble.lowbit.formats import Format
from nibble.lowbit.recipes import Int4Weight


class LowBitLinear(nn.Linear):
    """`nn.Linear` with a packed weight, which is never trained itself.

    A subclass with a uint8 `weight`, so that PEFT takes it for a quantized linear layer and attaches LoRA to it.
    """

    weight_scale: torch.Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        fmt: Format,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """An empty layer, to be filled by loading.

        Args:
            shape: (out, in) of the weight.
            fmt: how the weight is packed.
            bias: whether there is one.
            dtype: of the bias.
            device: of all tensors; "meta" allocates nothing.
        """
        # nn.Linear's own __init__ would allocate and fill a dense weight.
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.format = fmt
        codes = torch.empty(fmt.code_shape(*shape), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scales = torch.empty(fmt.scale_shape(*shape), dtype=getattr(torch, fmt.scale or "float32"), device=device)
        self.register_buffer("weight_scale", scales)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(shape[0], dtype=dtype, device=device)) if bias else None
        )
        self._fast: Int4Weight | None = None
        self._asked: torch.dtype | None = None
        self._trained = False
        self._dense = _Dense()

    @classmethod
    def from_linear(cls, layer: nn.Linear, name: str) -> LowBitLinear:
        """Quantize a dense layer; the bias is shared.

        Raises:
            FormatError, ModelError: as `quantize`.
        """
        packed = quantize(layer.weight, name)
        new = cls((layer.out_features, layer.in_features), packed.format, device="meta")
        new.weight = nn.Parameter(packed.codes, requires_grad=False)
        new.weight_scale = packed.scales
        new.bias = layer.bias
        return new

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight in its stored form; a copy where the layer holds a kernel's form."""
        codes = self.weight if self._fast is None else self._fast.canonical()
        return QuantizedTensor(self.format, codes, self.weight_scale, self.in_features)

    @property
    def kernel(self) -> str:
        """What serves one-token steps."""
        return "portable" if self._fast is None else "int4 kernel of torch"

    @property
    def prepared(self) -> bool:
        """Whether the layer has chosen what serves one-token steps, and not gone back from it since."""
        return self._asked is not None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dense weight [out, in]."""
        return self.quantized.dequantize(dtype)

    def prepare(self, dtype: torch.dtype) -> None:
        """Take the fastest kernel's form for one-token steps with inputs of `dtype`. A second call does nothing."""
        if self._asked == dtype:
            return
        self._restore()
        self._asked = dtype
        if kernels.accepts(self.quantized, dtype):
            self.hold(kernels.convert(self.quantized))

    def hold(self, fast: Int4Weight) -> None:
        """Take a kernel's form of this layer's weight in the place of the present one."""
        self._fast = fast
        self.weight = nn.Parameter(fast.codes, requires_grad=False)

    def _restore(self) -> None:
        """Go back to the stored form."""
        if self._fast is not None:
            self.weight = nn.Parameter(self._fast.canonical(), requires_grad=False)
        self._fast = self._asked = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Linear's name for it
        """input [..., in] times the transposed weight, plus the bias: [..., out] in the input's dtype."""
        rows = input.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and input.requires_grad:
            self._restore()
            self._trained = True
            out = _Product.apply(_activations(rows), self.format, self.weight, self.weight_scale, self._dense)
        else:
            # Whatever the number of rows: a prompt asked twice must meet the same weights. But the evaluations between
            # training steps must not move every weight there and back.
            if self._asked is None and not (self.training or self._trained):
                self.prepare(rows.dtype)
            if self._fast is not None and rows.dtype == torch.bfloat16:
                out = self._fast.matmul(rows)
            else:
                self._restore()
                out = matmul(_activations(rows), self.quantized)
        out = out.view(*input.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LowBitLinear:
        self._restore()
        scale = self.weight_scale
        super()._apply(fn, recurse)
        # model.to(bfloat16) and .half() mean the activations; a scale that is rounded is another weight.
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._fast is not None:
            destination[prefix + "weight"] = self._fast.canonical()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Shape, bias and format, as nn.Linear prints them."""
        return f"{super().extra_repr()}, format={self.format.name}"


def _activations(rows: torch.Tensor) -> torch.Tensor:
    """The rows as nn.Linear would take them: in autocast's dtype where that is on."""
    if not rows.is_floating_point():
        raise ModelError(
            f"A low-bit layer was given {rows.dtype} where it needs floating-point numbers.",
            "The model casts to the dtype of this layer's weight: name the layer in modules_to_not_convert.",
        )
    if torch.is_autocast_enabled(rows.device.type):
        return rows.to(torch.get_autocast_dtype(rows.device.type))
    return rows


FEW_ROWS = 32
"""Up to so many rows a product counts as that of a token or a few."""

DENSE = 2**24
"""Weights that a product dequantizes at once: all of most matrices, since one product is faster than its parts."""


def _parts(weight: QuantizedTensor, rows: int) -> list[slice]:
    size = chunk_for(weight.codes.device)
    # For one token the product is little beside the unpacking, which is fastest where its result stays in the caches.
    size = size if rows <= FEW_ROWS else max(DENSE, size)
    return list(row_chunks(weight.shape[0], weight.shape[1], size=size))


def matmul(rows: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """rows [n, in] times the transposed weight: [n, out] in the rows' dtype, on any device; no graph.

    A large weight is dequantized a part at a time, so that memory stays flat.
    """
    parts = _parts(weight, len(rows))
    if len(parts) == 1:
        return linear(rows, weight.dequantize(rows.dtype))
    out = rows.new_empty(len(rows), weight.shape[0])
    for part in parts:
        out[:, part] = linear(rows, weight.rows(part).dequantize(rows.dtype))
    return out


def matmul_transposed(rows: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """rows [n, out] times the weight: [n, in] in the rows' dtype; sums over parts of the weight are kept in float32."""
    parts = _parts(weight, len(rows))
    if len(parts) == 1:
        return rows @ weight.dequantize(rows.dtype)
    total = torch.zeros(len(rows), weight.in_features, dtype=torch.float32, device=rows.device)
    for part in parts:
        total += rows[:, part] @ weight.rows(part).dequantize(rows.dtype)
    return total.to(rows.dtype)


class _Product(torch.autograd.Function):
    """`matmul` with a gradient to the rows; keeps the packed weight for backward, never a dense one."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, rows: torch.Tensor, fmt: Format, codes: torch.Tensor, scales: torch.Tensor, dense: _Dense
    ) -> torch.Tensor:
        # Not as a saved tensor: checkpointing would compute the whole product again to save it again.
        ctx.weight = QuantizedTensor(fmt, codes, scales, rows.shape[1])
        ctx.dense = dense
        if _within_backward() and len(_parts(ctx.weight, len(rows))) == 1:
            return linear(rows, dense.unpack(ctx.weight, rows.dtype))
        dense.clear()
        return matmul(rows, ctx.weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        weight = ctx.dense.take(ctx.weight, grad.dtype)
        return (matmul_transposed(grad, ctx.weight) if weight is None else grad @ weight), None, None, None, None


class _Dense:
    """The weight of one layer, unpacked for a forward pass within a backward pass and left there for the backward.

    Gradient checkpointing computes a block of layers again just before their backward, in the graph of the first time:
    there is no other place where the second forward and the backward meet.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Let go of it."""
        self._of: tuple[torch.Tensor, int] | None = None
        self._weight: torch.Tensor | None = None

    def unpack(self, weight: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight, left here."""
        self._of = weight.codes, weight.codes._version
        self._weight = weight.dequantize(dtype)
        return self._weight

    def take(self, weight: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor | None:
        """The dense weight, no longer here; None where it is not that of `weight` in this dtype."""
        of, found = self._of, self._weight
        self.clear()
        same = of is not None and of[0] is weight.codes and of[1] == weight.codes._version
        return found if same and found is not None and found.dtype == dtype else None


def _within_backward() -> bool:
    """Whether autograd runs a backward pass in this thread: what is computed now, it computes again."""
    # The question that torch.utils.checkpoint asks; torch has no public name for it.
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def prepare(model: nn.Module) -> None:
    """Bring every packed layer into the form its fastest kernel wants, so that no answer waits. Harmless twice."""
    dtype = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), torch.float32)
    layers = [module for module in model.modules() if isinstance(module, LowBitLinear)]
    # The largest first: both its forms are in memory for a moment, and at first there is least beside them.
    for layer in sorted(layers, key=lambda layer: layer.weight.numel(), reverse=True):
        layer.prepare(dtype)
        give_back_memory()
    for module in model.modules():
        # What was built on the layers' former forms (`nibble.lowbit.lean`) is built anew.
        vars(module).pop("_nibble_lean", None)


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library keeps it (glibc does)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


KEPT_BYTES = 2**27
"""Of freed memory, what `keep_memory` lets lie at the end of the heap, and the largest piece that is taken from it."""


def keep_memory() -> None:
    """Let freed memory stay with this process, where the C library can (glibc): a training step takes it again at once.

    Otherwise each step asks the system for the same hundred thousand pages.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
            set_option(option, KEPT_BYTES)


def kernel_name(model: nn.Module) -> str:
    """What serves one-token steps in most of a model's packed layers; empty where none is packed."""
    names = [module.kernel for module in model.modules() if isinstance(module, LowBitLinear)]
    return max(sorted(set(names)), key=names.count, default="")
