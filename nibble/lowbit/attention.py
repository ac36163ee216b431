"""Attention of one new token on a CPU, as fast as its cache can be read.

Promises the values of transformers' `sdpa` attention, which serves every case but this one: one new token, on a CPU, no
graph. Knows nothing of packed weights.

Where several query heads share a key-value head, they are laid out as rows of one product. Transformers repeats the
keys and values instead, or asks torch for grouped-query attention, which on a CPU is slower still.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
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
    if not _one_token(query, attention_mask) or kwargs.get("dropout") or kwargs.get("output_attentions"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if any(kwargs[name] is not None for name in kwargs.keys() - SERVED - {"dropout", "scaling"}):
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
