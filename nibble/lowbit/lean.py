"""One new token through a decoder layer of the Llama family, in as few steps as can be.

Promises the values of the layer's own forward, rounding apart: tried once for each layer, dropped with a log line if
they differ. Serves a single token of a single conversation on a CPU, in bfloat16, when nobody wants gradients;
everything else takes the layer's own way. Hooks on the parts of a layer are not called for such a token; an adapter
that the layers wear (`nibble.lowbit.lora`) is added all the same. Knows nothing of formats.

A layer's products take most of a token's time, but its some sixty small operations and fifteen modules took as long as
a sixth of them. Here the projections that read the same input are one product, keys and values are written into room
kept for them instead of being copied whole for each token, and the norms take three operations instead of seven.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from nibble.lowbit import attention
from nibble.lowbit.int4_cpu import CpuInt4Weight, block_rows
from nibble.lowbit.kernels import TOLERANCE
from nibble.lowbit.linear import LowBitLinear, give_back_memory
from nibble.lowbit.lora import addition_of

log = logging.getLogger(__name__)

LAYERS = {
    ("transformers.models.llama.modeling_llama", "LlamaDecoderLayer"),
    ("transformers.models.mistral.modeling_mistral", "MistralDecoderLayer"),
    ("transformers.models.qwen2.modeling_qwen2", "Qwen2DecoderLayer"),
}
"""Classes whose forward is the one written here."""

CACHE = "cache" if "cache" in inspect.signature(LlamaDecoderLayer.forward).parameters else "past_key_values"
"""What transformers calls the keys and values that a forward or `generate` is handed: `cache` since 5.24."""

SPARE_TOKENS = 256
"""Room that is kept for tokens to come; a quarter of the conversation where that is more."""


class RoomyLayer(DynamicLayer):
    """A cache layer that writes new tokens behind the old ones, in room kept for them, instead of copying all."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [batch, kv heads, new, dim]; returns all of them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys: Any = self._append("_key_room", self.keys, key_states)
        values: Any = self._append("_value_room", self.values, value_states)
        self.keys, self.values = keys, values
        return keys, values

    def _append(self, name: str, held: Any, new: torch.Tensor) -> torch.Tensor:
        if held.requires_grad or new.requires_grad:
            return torch.cat((held, new), dim=-2) if held.numel() else new
        length = held.shape[-2] if held.numel() else 0
        total = length + new.shape[-2]
        room = vars(self).get(name)
        # Whoever cropped the cache left a view of the room, whoever reordered it a tensor of its own.
        if (
            room is None
            or total > room.shape[-2]
            or room.shape[:2] != new.shape[:2]
            or (length and held.data_ptr() != room.data_ptr())
            or room.is_inference() != torch.is_inference_mode_enabled()
        ):
            batch, heads, _, size = new.shape
            room = new.new_empty(batch, heads, total + max(SPARE_TOKENS, total // 4), size)
            if length:
                room[:, :, :length] = held
            vars(self)[name] = room
        room[:, :, length:total] = new
        return room[:, :, :total]


@dataclass(frozen=True)
class _Joined:
    """Packed layers that read the same input, as one weight."""

    layers: tuple[LowBitLinear, ...]
    weight: CpuInt4Weight
    bias: torch.Tensor | None
    parts: tuple[Any, ...]
    """The layers' own forms of their weights, which are views of this one."""

    def product(self, row: torch.Tensor) -> torch.Tensor:
        """row [1, in] -> the layers' outputs side by side [1, out]."""
        out = self.weight.matmul(row)
        if self.bias is not None:
            out.add_(self.bias)
        start = 0
        for layer in self.layers:
            if (addition := addition_of(layer)) is not None:
                out[:, start : start + layer.out_features] += addition.of(row)
            start += layer.out_features
        return out

    @property
    def current(self) -> bool:
        """Whether the layers still hold what was joined."""
        return all(layer._fast is part for layer, part in zip(self.layers, self.parts, strict=True))


def _join(layers: Sequence[nn.Module]) -> _Joined | None:
    """One weight of several layers, each of which then holds a view of it; None where they cannot be joined."""
    if not all(type(layer) is LowBitLinear and isinstance(layer._fast, CpuInt4Weight) for layer in layers):
        return None
    packed: list[LowBitLinear] = list(layers)  # type: ignore[arg-type]
    fasts: list[CpuInt4Weight] = [layer._fast for layer in packed]  # type: ignore[misc]
    first = fasts[0]
    biases = [layer.bias for layer in packed]
    if (
        any((fast.format, fast.in_features) != (first.format, first.in_features) for fast in fasts)
        or any(fast.out_features % block_rows() for fast in fasts)
        or len({bias is None for bias in biases}) > 1
    ):
        return None
    whole = replace(
        first, codes=torch.cat([fast.codes for fast in fasts]), terms=torch.cat([fast.terms for fast in fasts], dim=1)
    )
    start = 0
    for layer, fast in zip(packed, fasts, strict=True):
        rows = slice(start, start + fast.out_features)
        layer.hold(replace(fast, codes=whole.codes[rows], terms=whole.terms[:, rows]))
        start = rows.stop
    bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
    return _Joined(tuple(packed), whole, bias, tuple(layer._fast for layer in packed))


@dataclass(frozen=True)
class _Lean:
    """A decoder layer's parts, gathered so that a token needs no look-ups."""

    norms: tuple[nn.Module, nn.Module]
    qkv: _Joined
    out: _Joined
    gate_up: _Joined
    down: _Joined
    index: int
    heads: int
    kv_heads: int
    size: int
    scaling: float

    @classmethod
    def of(cls, layer: Any) -> _Lean | None:
        """The parts of a decoder layer; None where its layers are not all packed for the kernel."""
        attn, mlp = layer.self_attn, layer.mlp
        names = ((attn, "q_proj k_proj v_proj"), (attn, "o_proj"), (mlp, "gate_proj up_proj"), (mlp, "down_proj"))
        joined = [_join([getattr(owner, name) for name in group.split()]) for owner, group in names]
        if any(part is None for part in joined):
            return None
        qkv, out, gate_up, down = joined
        assert qkv and out and gate_up and down
        heads, kv_heads = (projection.out_features // attn.head_dim for projection in (attn.q_proj, attn.k_proj))
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        return cls(norms, qkv, out, gate_up, down, attn.layer_idx, heads, kv_heads, attn.head_dim, attn.scaling)

    @property
    def current(self) -> bool:
        return self.qkv.current and self.out.current and self.gate_up.current and self.down.current

    def step(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, cache: Any, rotation: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """hidden [1, 1, width] of one token -> the same after this layer; its keys and values go into the cache."""
        row = hidden.view(1, -1)
        qkv = self.qkv.product(_norm(row, self.norms[0])).view(1, -1, 1, self.size)
        turning = self.heads + self.kv_heads
        turned = _rotate(qkv[:, :turning], *rotation)
        keys, values = cache.update(turned[:, self.heads :], qkv[:, turning:], self.index)
        # The heads that share a key-value head are rows of one product.
        query = turned[:, : self.heads].view(1, self.kv_heads, -1, self.size)
        mixed = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self.scaling)
        row = row + self.out.product(mixed.reshape(1, -1))
        gate, up = self.gate_up.product(_norm(row, self.norms[1])).chunk(2, dim=1)
        return (row + self.down.product(silu(gate).mul_(up))).view(1, 1, -1)


def _norm(row: torch.Tensor, norm: Any) -> torch.Tensor:
    """RMSNorm of one row, rounded where transformers rounds."""
    length = torch.linalg.vector_norm(row, dtype=torch.float32).item()
    return (row * (length * length / row.shape[1] + norm.variance_epsilon) ** -0.5).mul_(norm.weight)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of heads [1, n, 1, dim], the halves of `dim` being the two coordinates."""
    first, second = heads.chunk(2, dim=-1)
    return torch.addcmul(heads * cos.unsqueeze(1), torch.cat((-second, first), dim=-1), sin.unsqueeze(1))


def offer(model: PreTrainedModel) -> None:
    """Give each decoder layer of a model that knows the lean way a choice; a second call makes the layers try again."""
    if model.config._attn_implementation == attention.NAME:
        for layer in model.modules():
            if (type(layer).__module__, type(layer).__name__) in LAYERS:
                vars(layer).pop("_nibble_lean", None)
                vars(layer)["forward"] = MethodType(_forward, layer)


def _forward(
    layer: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """A decoder layer's forward: the lean way where it serves, otherwise the layer's own."""
    cache = kwargs.get(CACHE)
    if (
        hidden_states.shape[:2] == (1, 1)
        and hidden_states.dtype == torch.bfloat16
        and cache is not None
        and position_embeddings is not None
        and not (torch.is_grad_enabled() and hidden_states.requires_grad)
        and not layer.training
        and not kwargs.get("output_attentions")
        and (lean := _lean_of(layer)) is not None
    ):
        held = cache.layers[lean.index] if len(cache.layers) > lean.index else None
        if type(held) is DynamicLayer:
            held.__class__ = RoomyLayer
        return lean.step(hidden_states, attention_mask, cache, position_embeddings)
    return type(layer).forward(
        layer, hidden_states, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache,
        position_embeddings=position_embeddings, **kwargs,
    )  # fmt: skip


def _lean_of(layer: Any) -> _Lean | None:
    """A layer's parts, gathered when they are first asked for; None where this way is not open to it."""
    lean: _Lean | bool | None = vars(layer).get("_nibble_lean")
    if lean is False or layer.self_attn.config._attn_implementation != attention.NAME:
        return None
    if isinstance(lean, _Lean) and lean.current:
        return lean
    if not all(module.prepared for module in layer.modules() if isinstance(module, LowBitLinear)):
        return None
    fresh = _Lean.of(layer)
    if fresh is not None and not _agrees(layer, fresh):
        fresh = None
    vars(layer)["_nibble_lean"] = fresh or False
    # The separate forms of what was joined: a third of the model, all layers together, that glibc would keep.
    give_back_memory()
    return fresh


def _agrees(layer: Any, lean: _Lean) -> bool:
    """Whether both ways give and remember the same for a random token after a few others; a no is logged."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).bfloat16()

    # Small, so that what the layer adds is not lost beside what it is added to.
    hidden = 0.01 * draw(1, 1, lean.out.weight.out_features)
    keys, values = draw(2, 1, lean.kv_heads, 5, lean.size)
    angles = 6 * torch.rand(1, 1, lean.size // 2, generator=random).repeat(1, 1, 2)
    rotation = (angles.cos().bfloat16(), angles.sin().bfloat16())
    caches = (DynamicCache(), DynamicCache())
    with torch.inference_mode():
        for cache in caches:
            cache.update(keys, values, lean.index)
        ours = lean.step(hidden, None, caches[0], rotation)
        theirs = type(layer).forward(layer, hidden, use_cache=True, position_embeddings=rotation, **{CACHE: caches[1]})
    pairs = [(ours, theirs)]
    for name in ("keys", "values"):
        one, other = (getattr(cache.layers[lean.index], name)[:, :, -1] for cache in caches)
        pairs.append((one, other))
    error = max(float((one.float() - other.float()).norm() / other.float().norm()) for one, other in pairs)
    if error <= TOLERANCE:
        return True
    log.warning("%s is off by %.1f %% the lean way; its own is used.", type(layer).__name__, 100 * error)
    return False
