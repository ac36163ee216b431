"""Attention on a CPU: of one new token, as fast as its cache can be read, and of short samples that are learnt from.

Promises the values of transformers' `sdpa` attention, which serves every case but these two: one new token without a
graph, and samples of at most `SHORT` tokens with one, in bfloat16. Knows nothing of packed weights.

Where several query heads share a key-value head, they are laid out as rows of one product. Transformers repeats the
keys and values instead, or asks torch for grouped-query attention, which on a CPU is slower still.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "nibble"
"""What stands for `attn_implementation`; never written to a saved config."""

SERVED = {"is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions", "cache_position"}
"""Further arguments that change nothing for one new token: a sliding window, say, is in the mask already."""


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `sdpa_attention_forward`: query [batch, heads, new, dim], key and value [batch, kv heads, all, dim].

    Returns:
        The result [batch, new, heads, dim], and None for the weights.
    """
    plain = not kwargs.get("dropout") and not kwargs.get("output_attentions")
    plain = plain and all(kwargs[name] is None for name in kwargs.keys() - SERVED - {"dropout", "scaling"})
    if plain and _short_sample(query, key, value):
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return _Learnt.apply(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None
    if not plain or not _one_token(query, attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    batch, heads, _, size = query.shape
    rows = query.view(batch, key.shape[1], heads // key.shape[1], size)
    out = scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling"))
    return out.reshape(batch, 1, heads, value.shape[-1]), None


def _one_token(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    return (
        query.shape[2] == 1
        and query.device.type == "cpu"
        and not (torch.is_grad_enabled() and query.requires_grad)
        # One mask for all heads: [batch, 1, 1, all].
        and (mask is None or mask.shape[1] == 1)
    )


SHORT = 128
"""Tokens up to which whole rows of scores in float32 are faster than torch's tiles, whose backward pass is slow."""


def _short_sample(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and 1 < query.shape[2] == key.shape[2] <= SHORT
        and query.shape[-1] == value.shape[-1]
        and torch.is_grad_enabled()
        and query.requires_grad
    )


class _Learnt(torch.autograd.Function):
    """Attention that keeps no scores for backward, computed in float32."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """query [batch, heads, n, dim], key and value [batch, kv heads, n, dim] -> as query.

        Args:
            mask: [batch or 1, 1 or heads, n, n]: whether a token sees another, or what is added to its score; None: all
                before it.
            scale: of the scores.
        """
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        weights = _weights(_grouped(query, key), key.float(), mask, scale, query.shape)
        return (weights @ value.float()).view(query.shape).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, mask = ctx.saved_tensors
        rows, keys, values = _grouped(query, key), key.float(), value.float()
        weights = _weights(rows, keys, mask, ctx.scale, query.shape)
        given = _grouped(gradient, key)
        to_value = weights.transpose(-1, -2) @ given
        scores = given @ values.transpose(-1, -2)
        scores.sub_((scores * weights).sum(-1, keepdim=True)).mul_(weights).mul_(ctx.scale)
        to_query = (scores @ keys).view(query.shape)
        to_key = scores.transpose(-1, -2) @ rows
        return to_query.to(query.dtype), to_key.to(key.dtype), to_value.to(value.dtype), None, None


def _grouped(heads: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[batch, heads, n, dim] -> float32 [batch, kv heads, heads that share one * n, dim]."""
    return heads.float().reshape(len(heads), key.shape[1], -1, heads.shape[-1])


def _weights(
    rows: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, scale: float, shape: torch.Size
) -> torch.Tensor:
    """How much each row takes of each key: float32 [batch, kv heads, heads that share one * n, n]."""
    scores = (rows @ keys.transpose(-1, -2)).mul_(scale)
    whole = scores.view(*shape[:3], keys.shape[2])
    if mask is None:
        mask = torch.ones(whole.shape[2:], dtype=torch.bool).tril_()
    if mask.dtype == torch.bool:
        whole.masked_fill_(~mask, torch.finfo(torch.float32).min)
    else:
        whole.add_(mask)
    return scores.softmax(-1)


def register() -> None:
    """Make the name known to transformers. A second call does nothing new."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def use(model: PreTrainedModel) -> bool:
    """Choose this attention for a model that would use `sdpa`; false where the model's code does not allow it."""
    if getattr(model.config, "_attn_implementation", None) != "sdpa" or not model._can_set_attn_implementation():
        return False
    register()
    model.set_attn_implementation(NAME)
    return True
