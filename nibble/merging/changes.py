"""What an adapter changes in its base: a product of two small matrices for each layer, or new values.

Promises that PEFT itself says which layers an adapter means and which shapes it must have there, on a model without
weights; that the factor is computed here; and that what cannot be merged exactly is refused by name. Knows nothing of
the base's files.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nibble.adapters import WEIGHTS, Adapter
from nibble.errors import ModelError

KEPT = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "lora_bias",
    "ensure_weight_tying",
)  # fmt: skip
"""Fields of adapter_config.json that are taken: not what would download, compute or import something."""

UNMERGED = {
    "use_dora": "DoRA scales each row of a weight anew",
    "use_qalora": "QA-LoRA works on groups of inputs",
    "alora_invocation_tokens": "it works only after certain tokens",
    "target_parameters": "it changes tensors that are no layers",
    "trainable_token_indices": "it changes single rows of the embedding",
    "layer_replication": "it repeats layers of the base",
    "megatron_config": "it is made for layers of Megatron",
    "arrow_config": "it routes among several adapters",
    "monteclora_config": "its weights are drawn at random",
    "velora_config": "it compresses what it has seen",
}
"""Fields of adapter_config.json -> why an adapter that sets them is more than W + scale·B·A."""

PREFIX = "base_model.model."
BLOCK = 2**24
"""Numbers of a weight that are computed at once."""


@dataclass
class Change:
    """What becomes of one weight: other values, or scale · left @ right on top, or both."""

    left: torch.Tensor | None = None
    """float32 [rows, rank] of the weight as it is stored; a vector counts as one column."""
    right: torch.Tensor | None = None
    """float32 [rank, columns]."""
    scale: float = 0.0
    values: torch.Tensor | None = None
    """In place of the base's, as the adapter stores them."""

    def add(self, rows: slice, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """scale · left @ right in some rows; None where there is no product."""
        if self.left is None or self.right is None:
            return None
        return self.scale * (self.left[rows].to(dtype) @ self.right.to(dtype))

    @property
    def empty(self) -> bool:
        """Whether its product is zero by one of its factors."""
        return self.values is None and not (_any(self.left) and _any(self.right))


def _any(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and bool(tensor.count_nonzero())


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of a matrix's rows, none with many more than `BLOCK` numbers."""
    step = max(1, BLOCK // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, min(shape[0], start + step))


def read_changes(adapter: Adapter, model: PreTrainedModel) -> dict[str, Change]:
    """Parameter of the model -> what the adapter makes of it.

    Args:
        adapter: as `nibble.adapters.read` gives it.
        model: the base without weights; PEFT's layers stay in it.

    Raises:
        ModelError: it is broken, does not fit the model, or is of a kind that is not merged.
    """
    _refuse_kinds(adapter)
    tensors = _load(adapter)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    layers, wanted = _fit(adapter, model)
    _compare(adapter, tensors, wanted)
    changes: dict[str, Change] = {}
    used: set[str] = set()
    for path, layer in layers.items():
        used |= _read_layer(adapter, path, layer, tensors, changes)
    for key, values in tensors.items():
        if key not in used:
            place = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            if place not in parameters or parameters[place].shape != values.shape:
                raise _unfit(adapter, f"{place} has another shape there, or is not there")
            changes.setdefault(place, Change()).values = values
    return changes


def _refuse_kinds(adapter: Adapter) -> None:
    """Refuse what is more, or less, than a LoRA adapter of the plain kind."""
    if adapter.method != "LORA":
        raise ModelError(
            f"{adapter.name} is an adapter of the kind {adapter.method[:40] or 'unnamed'}, which is not merged here.",
            "Only LoRA adapters are merged.",
        )
    for key, why in UNMERGED.items():
        if adapter.config.get(key):
            raise ModelError(f"{adapter.name} cannot be merged ({key}): {why}.", "Use it in Chat, or train it without.")
    if not adapter.leaves_base:
        raise ModelError(
            f"{adapter.name} cannot be merged: its start ({adapter.start[:40]}) took something away from the base.",
            "Convert it to an ordinary LoRA adapter with PEFT first (path_initial_model_for_weight_conversion).",
        )


def _load(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The adapter's tensors, all finite numbers."""
    try:
        with safe_open(adapter.folder / WEIGHTS, framework="pt") as opened:
            tensors = {str(name): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{WEIGHTS} of {adapter.name} cannot be read: {error}.", "Save the adapter again.") from None
    if not tensors:
        raise ModelError(f"{adapter.name} holds no weights.", "Train it again.")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ModelError(f"{name} of {adapter.name} holds no floating-point numbers.", "Save the adapter again.")
        bad = int((~torch.isfinite(tensor.float())).sum())
        if bad:
            raise ModelError(
                f"{name} of {adapter.name} holds {bad:,} numbers that are not finite.",
                "Its training went wrong: take an earlier checkpoint, or train again with a lower learning rate.",
            )
    return tensors


def _fit(adapter: Adapter, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The layers that PEFT puts the adapter on, by their paths, and the tensors that it expects, with their shapes."""
    said = {key: adapter.config[key] for key in KEPT if adapter.config.get(key) is not None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = peft.PeftModelForCausalLM(model, peft.LoraConfig(**said, task_type="CAUSAL_LM"))
            expected = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, re.error) as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise _unfit(adapter, line[:200]) from error
    layers = {
        name.removeprefix(PREFIX): module for name, module in wrapped.named_modules() if isinstance(module, LoraLayer)
    }
    return layers, {name: tuple(tensor.shape) for name, tensor in expected.items()}


def _compare(adapter: Adapter, tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an adapter whose tensors are not those that its configuration means on this base."""
    # What PEFT saves besides where embeddings have an adapter: the base's own rows.
    strange = [name for name in tensors if name not in wanted and not name.endswith(".base_layer.weight")]
    if strange:
        raise _unfit(adapter, f"{strange[0].removeprefix(PREFIX)} has no counterpart there")
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise ModelError(
            f"{adapter.name} is incomplete: {len(missing)} of its {len(wanted)} tensors are missing, "
            f"{missing[0].removeprefix(PREFIX)} first.",
            "Copy the whole adapter, or train it again.",
        )
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise _unfit(
                adapter, f"{name.removeprefix(PREFIX)} has the shape {tuple(tensors[name].shape)}, there it is {shape}"
            )


def _read_layer(
    adapter: Adapter, path: str, layer: Any, tensors: Mapping[str, torch.Tensor], changes: dict[str, Change]
) -> set[str]:
    """Enter the change of one layer; the names of the tensors that it is made of."""
    scale, base = adapter.scale(path), layer.get_base_layer()
    head = f"{PREFIX}{path}."
    if isinstance(base, nn.Embedding):
        names = [f"{head}lora_embedding_A", f"{head}lora_embedding_B"]
        down, up = (tensors[name].float() for name in names)
        changes[f"{path}.weight"] = Change(down.T.contiguous(), up.T.contiguous(), scale)
        return set(names)
    if not isinstance(base, (nn.Linear, Conv1D)):
        raise ModelError(
            f"{adapter.name} cannot be merged: {path} is a {type(base).__name__}.",
            "Linear layers and embeddings are merged.",
        )
    names = [f"{head}lora_A.weight", f"{head}lora_B.weight"]
    down, up = (tensors[name].float() for name in names)
    # Conv1D stores its weight as [in, out]; that is what `fan_in_fan_out` is about.
    pair = (down.T.contiguous(), up.T.contiguous()) if isinstance(base, Conv1D) else (up, down)
    changes[f"{path}.weight"] = Change(*pair, scale)
    bias = f"{head}lora_B.bias"
    if bias in tensors:
        if base.bias is None:
            raise ModelError(
                f"{adapter.name} cannot be merged: it adds a bias to {path}, which has none.",
                "Train it without lora_bias.",
            )
        changes.setdefault(f"{path}.bias", Change())
        entry = changes[f"{path}.bias"]
        entry.left, entry.right, entry.scale = tensors[bias].float()[:, None], torch.ones(1, 1), scale
        names.append(bias)
    return set(names)


def _unfit(adapter: Adapter, why: str) -> ModelError:
    return ModelError(
        f"{adapter.name} does not fit {adapter.base or 'this base'}: {why}.", "It belongs to another model."
    )
