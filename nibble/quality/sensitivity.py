"""What each layer's rounding would cost the whole model, without trying each: from gradients.

The divergence of the next-token distribution after a small change D of a weight W is, to second order,

    KL  ~  1/2 sum_ij F_ij D_ij^2,    F_ij = E[(d ln p(y) / d W_ij)^2],    y drawn from the model's own distribution

the diagonal of the Fisher information (Kim et al., SqueezeLLM, 2023, section 4.1, use the same with the text's tokens
in the place of y). Tokens are drawn at every position of a window at once: scores of different positions are
uncorrelated, so the square of the summed gradient has the sum of their F for its mean.

Promises that one gradient at a time is in memory. Needs torch. The figures rank layers; sums of them only estimate. (On
the guide each estimate lies within a half of what packing that layer alone is then measured to cost: a test.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from nibble.lowbit.blocks import quantize
from nibble.lowbit.formats import resolve

PASSES, LENGTH = 8, 128
"""Windows that are read, and how many of their tokens."""


def sensitivities(
    model: Any, windows: Sequence[Sequence[int]], formats: Sequence[str], progress: Callable[[float, float], None]
) -> list[dict[str, Any]]:
    """The estimated KL, in nats a token, of packing one linear layer alone, for each layer and format.

    Args:
        model: dense; its gradients are taken and thrown away, and a head tied to the embedding gets its own copy.
        windows: of token ids.
        formats: names.
        progress: told the windows done, and all.

    Returns:
        For each layer `name`, `shape` [out, in], `bytes` {format: bytes} and `kl` {format: nats}, in the model's order.
    """
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    model.requires_grad_(False)
    layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    sums = {name: dict.fromkeys(formats, 0.0) for name in layers}
    for name, layer in layers.items():
        layer.weight.requires_grad_(True)
        layer.weight.register_post_accumulate_grad_hook(_adder(sums[name]))
    read = [list(window[:LENGTH]) for window in windows[:PASSES]]
    random = torch.Generator().manual_seed(0)
    for done, window in enumerate(read):
        progress(done, len(read))
        logits = model(input_ids=torch.tensor([window], device=model.device), use_cache=False).logits[0].float()
        likelihoods = torch.log_softmax(logits, dim=-1)
        drawn = torch.multinomial(likelihoods.detach().exp().cpu(), 1, generator=random).to(likelihoods.device)
        likelihoods.gather(1, drawn).sum().backward()
    progress(len(read), len(read))
    positions = sum(len(window) for window in read)
    return [
        {
            "name": name, "shape": list(layer.weight.shape),
            "bytes": {low_bit: resolve(low_bit).nbytes(*layer.weight.shape) for low_bit in formats},
            "kl": {low_bit: 0.5 * total / positions for low_bit, total in sums[name].items()},
        }
        for name, layer in layers.items()
    ]  # fmt: skip


def _adder(sums: dict[str, float]) -> Callable[[torch.Tensor], None]:
    """Adds gradient^2 times error^2 of each format to `sums`, and lets the gradient go."""

    def add(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        squares = weight.grad.float().square_()
        weight.grad = None
        for low_bit in sums:
            change = quantize(weight, low_bit).dequantize().sub_(weight.detach())
            sums[low_bit] += float(change.square_().mul_(squares).sum())

    return add
