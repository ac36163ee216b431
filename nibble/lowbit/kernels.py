"""Which fast kernel serves a packed weight, and whether it is to be trusted.

Promises that a kernel is used only after it agreed, once in this process, with the portable path for that format on
that kind of device, and that its layout can be taken back bit for bit. Knows nothing of layers and of how kernels work.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch

from nibble.lowbit.blocks import QuantizedTensor, quantize
from nibble.lowbit.formats import FORMATS
from nibble.lowbit.int4_cpu import CpuInt4Weight
from nibble.lowbit.int4_cuda import CudaInt4Weight
from nibble.lowbit.recipes import RECIPES, Int4Weight

log = logging.getLogger(__name__)

KERNELS: dict[str, type[Int4Weight]] = {"cpu": CpuInt4Weight, "cuda": CudaInt4Weight}
"""Kind of device -> the form of a weight that its int4 kernel takes. Elsewhere the portable path serves."""

TOLERANCE = 0.02
"""Largest relative difference (of norms) from the portable path that is still rounding: bfloat16 gives 0.3 to 0.6 %,
codebooks as int8 0.5 % more; a wrong layout gives more than 100 %."""

ROWS = (1, 3, 200)
"""Input rows for which a kernel is tried."""


def accepts(weight: QuantizedTensor, dtype: torch.dtype) -> bool:
    """Whether a fast kernel can serve this weight for inputs of `dtype`, and does so rightly on this machine."""
    kind, name = weight.codes.device.type, weight.format.name
    return (
        kind in KERNELS
        and dtype == torch.bfloat16
        and name in RECIPES
        and KERNELS[kind].takes(weight.shape[0], RECIPES[name].planes * weight.format.padded(weight.in_features))
        and agrees(name, kind)
    )


def convert(weight: QuantizedTensor) -> Int4Weight:
    """A weight that `accepts` took, in the kernel's form: a new copy."""
    return KERNELS[weight.codes.device.type].pack(weight)


@lru_cache(maxsize=len(FORMATS) * len(KERNELS))
def agrees(name: str, kind: str = "cpu") -> bool:
    """Whether the kernel gives what the portable path gives, tried once on a small random weight; a no is logged."""
    random = torch.Generator().manual_seed(0)
    # Rows that are no whole number of the CPU kernel's blocks.
    weight = quantize(torch.randn(176, 256, generator=random).to(kind), name)
    worst = 0.0
    try:
        fast = KERNELS[kind].pack(weight)
        for count in ROWS:
            inputs = torch.randn(count, weight.in_features, generator=random).to(kind, torch.bfloat16)
            expected = inputs.float() @ weight.dequantize().T
            worst = max(worst, float((fast.matmul(inputs).float() - expected).norm() / expected.norm()))
        same = torch.equal(fast.canonical(), weight.codes)
    except (RuntimeError, AttributeError) as error:
        log.warning("torch's int4 kernel does not run on %s; %s takes the portable path: %s", kind, name, error)
        return False
    if worst <= TOLERANCE and same:
        return True
    log.warning(
        "torch's int4 kernel is off by %.1f %% for %s on %s; the portable path is used.", 100 * worst, name, kind
    )
    return False
