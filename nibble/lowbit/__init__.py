"""Low-bit weights: the table of formats, quantize and dequantize, the layer, and the plug-in for transformers.

Importing this package does not import torch; the first use of what needs it does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nibble.lowbit.formats import FORMATS, Format, resolve

if TYPE_CHECKING:
    from nibble.lowbit.blocks import QuantizedTensor, quantize
    from nibble.lowbit.linear import LowBitLinear, kernel_name, prepare

__all__ = ["FORMATS", "Format", "LowBitLinear", "QuantizedTensor", "kernel_name", "prepare", "quantize", "resolve"]

_HOMES = {
    "QuantizedTensor": "nibble.lowbit.blocks",
    "quantize": "nibble.lowbit.blocks",
    "LowBitLinear": "nibble.lowbit.linear",
    "prepare": "nibble.lowbit.linear",
    "kernel_name": "nibble.lowbit.linear",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
