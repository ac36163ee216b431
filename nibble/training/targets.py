"""Which layers of a model get an adapter: the names a person knows, mapped to what the family calls them.

Promises a list of names that are all there, and a sentence that lists the linear layers where none is. Knows nothing of
PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nibble.errors import ModelError
from nibble.training.recipe import ALL_LINEAR

FUSED = (
    "c_attn",  # Qwen1, GPT-2
    "query_key_value",  # ChatGLM, GPT-NeoX, Falcon, Bloom
    "W_pack",  # Baichuan
    "qkv_proj",  # Phi-3, CodeGen
    "wqkv",  # InternLM2
    "Wqkv",  # MPT, DBRX, ModernBERT
    "qkv",
    "in_proj",
)
"""Names of one layer that holds query, key and value together."""

ELSEWHERE: dict[str, tuple[str, ...]] = {
    "q_proj": (*FUSED, "q_a_proj", "q_b_proj", "query", "wq", "q_lin", "q"),
    "k_proj": (*FUSED, "kv_a_proj_with_mqa", "key", "wk", "k_lin", "k"),
    "v_proj": (*FUSED, "kv_b_proj", "value", "wv", "v_lin", "v"),
    "o_proj": ("dense", "c_proj", "out_proj", "wo", "out_lin", "o"),
    "gate_proj": ("gate_up_proj", "dense_h_to_4h", "w1", "fc1", "c_fc", "wi_0", "wi"),
    "up_proj": ("gate_up_proj", "dense_h_to_4h", "w3", "w2", "fc1", "c_fc", "wi_1", "wi"),
    "down_proj": ("dense_4h_to_h", "c_proj", "fc2", "w2", "wo"),
}
"""Llama's name of a layer -> what other families call it, or that which holds it; all that a model has are taken of
the first kind found."""

TOGETHER = {"q_proj": {"q_a_proj", "q_b_proj"}}
"""Names that stand for one layer only together: DeepSeek's query in two parts."""


@dataclass(frozen=True)
class Targets:
    """What gets an adapter."""

    names: tuple[str, ...]
    """Last parts of the modules' dotted paths."""
    notes: list[str] = field(default_factory=list)


def choose(model: PreTrainedModel, wanted: Sequence[str]) -> Targets:
    """The layers of a model that these names mean.

    Args:
        model: the base.
        wanted: names of layers as Llama or this model calls them, or `ALL_LINEAR` alone.

    Raises:
        ModelError: none of them is there; it lists the linear layers that are.
    """
    present = linear_names(model)
    if ALL_LINEAR in wanted:
        if not present:
            raise _none(model, wanted, present)
        return Targets(present)
    found: dict[str, None] = {}
    notes, missing = [], []
    for name in wanted:
        names = (name,) if _there(model, name) else _elsewhere(name, present)
        if not names:
            missing.append(name)
        elif names != (name,):
            notes.append(f"{name} is called {' and '.join(names)} in this model.")
        found |= dict.fromkeys(names)
    if not found:
        raise _none(model, wanted, present)
    if missing:
        notes.append(f"This model has no layer called {', '.join(missing)}; the adapter does without.")
    return Targets(tuple(found), notes)


def linear_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Last parts of the paths of every linear layer but the output head, in the order of the model."""
    head = model.get_output_embeddings()
    found = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name, module in found.items() if module is not head))


def _there(model: PreTrainedModel, name: str) -> bool:
    """Whether a linear layer's path ends with this name, which may have several parts."""
    return any(
        isinstance(module, (nn.Linear, Conv1D)) and (path == name or path.endswith(f".{name}"))
        for path, module in model.named_modules()
    )


def _elsewhere(name: str, present: Sequence[str]) -> tuple[str, ...]:
    for other in ELSEWHERE.get(name, ()):
        if other in present:
            together = TOGETHER.get(name, set())
            return tuple(sorted(together & set(present))) if other in together else (other,)
    return ()


def _none(model: PreTrainedModel, wanted: Sequence[str], present: Sequence[str]) -> ModelError:
    there = ", ".join(present) or "none"
    return ModelError(
        f"None of the layers {', '.join(wanted)} is in {type(model).__name__}; its linear layers are: {there}.",
        f"Name some of these as targets, or {ALL_LINEAR}.",
    )
