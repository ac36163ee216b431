"""Fake quantization to Q4_0 (`sym_int4`) for training: the values of the format, gradients as if nothing happened.

Promises: the forward values are those of ggml's `quantize_row_q4_0_ref` followed by dequantization.
Knows nothing of packing; `nibble.lowbit` does that.
"""

import torch
from torch import Tensor, nn

BLOCK = 32


def fake_q4_0(weight: Tensor) -> Tensor:
    """`weight` (rows, columns; columns a multiple of 32) rounded to Q4_0, with a straight-through gradient.

    Per block of 32 along the columns: d = m / -8 in float16, where m is the value of largest magnitude with its sign;
    q = clamp(floor(w / d + 8.5), 0, 15); the value kept is (q - 8) * d.
    """
    with torch.no_grad():
        blocks = weight.detach().float().reshape(-1, BLOCK)
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        exact = largest / -8
        inverse = torch.where(exact == 0, torch.zeros_like(exact), 1 / exact)
        quantized = torch.floor(blocks * inverse + 8.5).clamp_(0, 15) - 8
        kept = (quantized * exact.half().float()).reshape(weight.shape).to(weight.dtype)
    return weight + (kept - weight).detach()


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of every Linear in `model`, by their names in it."""
    return {f"{name}.weight": module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
