"""Models as llama.cpp writes them into GGUF files, as the Hugging Face models that they were made from.

Promises that a file is refused by name where it holds something that no row of the tables tells the meaning of, so
that no model is read nearly right. Imports no torch. Keys and tensors: docs/gguf.md of ggml, and llama.cpp's
convert_hf_to_gguf.py, whose changes are undone here and in `nibble.sources.gguf`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nibble.errors import ModelError
from nibble.sources.gguf_header import MAX_NAME, Header, broken

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

WHOLE = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
"""Tensor of a GGUF file -> name in the model."""

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Part of a layer there -> here; each has a weight, and may have a bias."""

HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

_BLOCK = re.compile(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)")


@dataclass(frozen=True)
class Family:
    """One architecture of llama.cpp."""

    model_type: str
    architecture: str
    """Class of transformers."""
    parts: tuple[tuple[str, str], ...] = tuple(LAYER.items())
    permuted: bool = False
    """Whether rows of q and k are in pairs, for the rotation as llama.cpp does it."""


FAMILIES = {
    # Mistral, and others that are computed as Llama is, come under this name too.
    "llama": Family("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", parts=(*LAYER.items(), *HEAD_NORMS.items())),
}
"""`general.architecture` -> row."""

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every Llama from 3.1 on. A file holds only what follows from them."""


def family_of(header: Header) -> Family:
    """The row of a file.

    Raises:
        ModelError: an architecture without one.
    """
    name = header.get("general.architecture", str)
    if name not in FAMILIES:
        raise ModelError(
            f"{header.path.name} is a model of the architecture {name[:40]!r}, which is not read from GGUF here.",
            f"These are: {', '.join(FAMILIES)}. Else take the model's Hugging Face form (config.json and safetensors).",
        )
    return FAMILIES[name]


def names_of(header: Header, family: Family) -> dict[str, str]:
    """Tensor of the file -> its name in the model, in the file's order.

    Raises:
        ModelError: a tensor that the family does not have.
    """
    parts = dict(family.parts)
    names = {}
    for name in header.tensors:
        match = _BLOCK.fullmatch(name)
        if name in WHOLE:
            names[name] = WHOLE[name]
        elif match and match[2] in parts:
            names[name] = f"model.layers.{int(match[1])}.{parts[match[2]]}.{match[3]}"
        elif name != ROPE_FACTORS and not name.endswith(".attn_rot_embd"):
            raise ModelError(
                f"{header.path.name} holds {name[:80]}, which has no place in a {family.model_type} model here.",
                "Take the model's Hugging Face form (config.json and safetensors).",
            )
    return names


def config_of(header: Header, family: Family, rope_factors: Sequence[float]) -> dict[str, Any]:
    """config.json of the model.

    Args:
        header: of the file.
        family: its row.
        rope_factors: the tensor of this name: what each frequency is divided by; empty where there is none.

    Raises:
        ModelError: something is missing or makes no sense.
    """
    prefix = header.get("general.architecture", str)
    size = _Sizes(header, prefix)
    hidden, heads = size.whole("embedding_length"), size.whole("attention.head_count")
    head_dim = size.whole("attention.key_length", size.whole("rope.dimension_count", hidden // heads))
    for key, expected in (
        ("rope.dimension_count", head_dim),
        ("attention.value_length", head_dim),
        ("expert_count", 0),
    ):
        if size.whole(key, expected, least=0) != expected:
            raise ModelError(
                f"{header.path.name} says {prefix}.{key} = {size.whole(key)}, and only {expected} is read here.",
                "Take the model's Hugging Face form (config.json and safetensors).",
            )
    kv_heads, wide = size.whole("attention.head_count_kv", heads), size.whole("feed_forward_length")
    layers = size.whole("block_count")
    table = header.tensors.get(EMBEDDING)
    vocabulary = table.shape[0] if table else 0
    shapes = {
        EMBEDDING: (vocabulary, hidden),
        "blk.0.attn_q.weight": (heads * head_dim, hidden),
        "blk.0.attn_k.weight": (kv_heads * head_dim, hidden),
        "blk.0.ffn_up.weight": (wide, hidden),
        f"blk.{layers - 1}.attn_norm.weight": (hidden,),
    }
    # A model is built from these numbers before a weight is read.
    for name, shape in shapes.items():
        if name not in header.tensors or header.tensors[name].shape != shape:
            raise broken(header.path, f"{name[:MAX_NAME]} is missing, or does not fit what its metadata says")
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": size.whole("context_length"),
        "rms_norm_eps": size.real("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(size, rope_factors, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in header.tensors,
        "tie_word_embeddings": HEAD not in header.tensors,
        **special_ids(header),
    }


def special_ids(header: Header) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id, where the file says them."""
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    ids = {name: header.get(f"tokenizer.ggml.{key}", int, -1) for name, key in keys.items()}
    return {name: number for name, number in ids.items() if number >= 0}


def heads_of(name: str, config: dict[str, Any]) -> int:
    """How many heads the rows of a tensor are in, where the file has them in pairs; 0 for every other tensor."""
    match = _BLOCK.fullmatch(name)
    keys = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    return int(config[keys[match[2]]]) if match and match[2] in keys else 0


@dataclass(frozen=True)
class _Sizes:
    """Numbers of a file's metadata, under the name of its architecture."""

    header: Header
    prefix: str

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.header.get(f"{self.prefix}.{key}", int, default)
        if not least <= value < 2**31:
            raise broken(self.header.path, f"its {self.prefix}.{key} is {value}")
        return int(value)

    def real(self, key: str, default: float | None = None) -> float:
        value = self.header.get(f"{self.prefix}.{key}", (float, int), default)
        if not math.isfinite(value):
            raise broken(self.header.path, f"its {self.prefix}.{key} is {value}")
        return shortest(value)

    def word(self, key: str) -> str:
        return str(self.header.get(f"{self.prefix}.{key}", str, ""))


def shortest(value: float) -> float:
    """The shortest decimal that is the same number in float32: 1e-05, where a file's float32 reads 9.9999997e-06."""
    return float(str(np.float32(value)))


def _rope(size: _Sizes, factors: Sequence[float], head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of config.json."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": size.real("rope.freq_base", 10000.0)}
    kind = size.word("rope.scaling.type")
    if factors:
        return _llama3(size.header, rope, factors, head_dim)
    if kind in ("", "none"):
        return rope
    if kind not in ("linear", "yarn"):
        raise ModelError(
            f"{size.header.path.name} stretches its context by {kind[:40]!r}, which is not read from GGUF here.",
            "Take the model's Hugging Face form (config.json and safetensors).",
        )
    rope |= {"rope_type": kind, "factor": size.real("rope.scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = size.whole("rope.scaling.original_context_length")
    return rope


def _llama3(header: Header, rope: dict[str, Any], factors: Sequence[float], head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling, from what it comes to: transformers' `_compute_llama3_parameters`, the other way round."""
    rope |= {"rope_type": "llama3", "factor": shortest(max(factors)), **_LLAMA3}
    low, high, context = _LLAMA3.values()
    expected = []
    for place in range(0, head_dim, 2):
        turns = context / (2 * math.pi * rope["rope_theta"] ** (place / head_dim))
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        expected.append(1 / ((1 - share) / rope["factor"] + share))
    if len(factors) != len(expected) or any(abs(a / b - 1) > 1e-3 for a, b in zip(factors, expected, strict=True)):
        raise ModelError(
            f"The rotary factors of {header.path.name} follow no rule that is known here.",
            "Take the model's Hugging Face form (config.json and safetensors).",
        )
    return rope
