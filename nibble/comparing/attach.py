"""An adapter put on a loaded base for a while, and taken off again without a trace.

Promises that the base is afterwards what it was, bit for bit; that only LoRA adapters are taken, and of a foreign
adapter_config.json only the fields that say what the adapter is; and a sentence where it does not fit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
from safetensors.torch import load_file
from torch import nn

from nibble.adapters import Adapter
from nibble.errors import ModelError
from nibble.screen import check_adapter

KEPT = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_dora",
    "lora_bias",
)  # fmt: skip
"""Fields of adapter_config.json that are taken: not what would download, compute or import something."""


@contextmanager
def attached(model: nn.Module, folder: Path, called: str = "") -> Iterator[None]:
    """Within the block the adapter in a folder is on the model.

    Args:
        model: a causal language model of transformers. Its layers are wrapped in place.
        folder: of an adapter in PEFT's form.
        called: what to call it; empty is the folder's name.

    Raises:
        ModelError: it is no LoRA adapter, or does not fit the model.
    """
    config = _config(folder)
    modules = dict(model.named_modules())
    # An adapter with biases writes them into the base's own.
    biases = {} if config.bias == "none" else {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if name.endswith("bias")
    }  # fmt: skip
    try:
        _put_on(model, config, folder, called or folder.name)
        yield
    finally:
        _take_off(model, modules)
        for name, values in biases.items():
            model.get_parameter(name).data.copy_(values)


def _config(folder: Path) -> peft.LoraConfig:
    said = check_adapter(folder)
    if said.get("peft_type") != "LORA":
        raise ModelError(
            f"{folder.name} is an adapter of the kind {str(said.get('peft_type'))[:40]}.",
            "Only LoRA adapters can be compared.",
        )
    if not Adapter(folder.name, folder, said).leaves_base or said.get("alora_invocation_tokens"):
        raise ModelError(
            f"{folder.name} is more than a sum on its base: it began with another base, or works on some tokens only.",
            "Convert it with PEFT into a plain LoRA adapter first.",
        )
    try:
        return peft.LoraConfig(
            **{key: said[key] for key in KEPT if said.get(key) is not None}, task_type="CAUSAL_LM", inference_mode=True
        )
    except (TypeError, ValueError) as error:
        raise _unfit(folder.name, "adapter_config.json cannot be used", error) from error


def _put_on(model: Any, config: peft.LoraConfig, folder: Path, called: str) -> None:
    before = set(model.modules())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights = load_file(folder / "adapter_model.safetensors")
            wrapped = peft.PeftModelForCausalLM(model, config)
            found: Any = peft.set_peft_model_state_dict(wrapped, weights)
            # What PEFT adds is made to learn: its dropout would change each answer.
            for module in set(model.modules()) - before:
                module.training = False
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, OSError) as error:
        raise _unfit(called, f"it does not fit {type(model).__name__} of this size", error) from error
    strange = found.unexpected_keys or [key for key in found.missing_keys if "lora_" in key]
    if strange or not weights:
        raise ModelError(
            f"{called} does not fit this base: {strange[0] if strange else 'it'} has no counterpart.",
            "It belongs to another model.",
        )


def _take_off(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Put every module back in its place; what PEFT put around it goes."""
    for name, module in modules.items():
        # A module inside one that was replaced is back with it.
        if name and model.get_submodule(name) is not module:
            model.set_submodule(name, module)
    if hasattr(model, "peft_config"):
        del model.peft_config


def _unfit(called: str, why: str, error: Exception) -> ModelError:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ModelError(f"{called} cannot be put on its base: {why} ({line[:200]}).", "It belongs to another model.")
