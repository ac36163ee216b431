"""LoRA on a low-bit base, under the names of `ipex_llm.transformers.qlora`: PEFT's own, made to fit our layers.

    from nibble.qlora import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"]))

Promises that the adapters are PEFT's standard ones, which any PEFT reads without Nibble, and that arguments of older
libraries are taken for what they mean today or refused with a sentence. Knows nothing of data and jobs.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any, TypeVar

import peft
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from nibble.devices import choose
from nibble.errors import ModelError
from nibble.training.recipe import RENAMED as OPTIMIZERS

__all__ = [
    "LoraConfig", "PeftModel", "TrainingArguments", "cast_lora_weight", "get_peft_model",
    "prepare_model_for_kbit_training",
]  # fmt: skip

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

MODES = ("qlora", "lora")
"""LoRA on a base in low bit, or on one in bf16: what the base is decides, so the word changes nothing."""

ARGUMENTS = {
    "evaluation_strategy": "eval_strategy", "no_cuda": "use_cpu", "warmup_ratio": "warmup_steps",
    "per_gpu_train_batch_size": "per_device_train_batch_size", "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}  # fmt: skip
"""Arguments that transformers no longer has -> their names today."""

GONE = ("logging_dir", "overwrite_output_dir", "save_safetensors", "use_mps_device", "no_deprecation_warning")
"""Arguments that transformers no longer has and that had no bearing on the result."""


class LoraConfig(peft.LoraConfig):
    """PEFT's, which also takes `training_mode`.

    Not a dataclass of its own: what is saved is PEFT's standard form, without the word.
    """

    def __init__(self, *args: Any, training_mode: str = "qlora", **kwargs: Any) -> None:
        """
        Args:
            training_mode: "qlora" or "lora"; accepted for compatibility, the base decides.
            All else as `peft.LoraConfig`.

        Raises:
            ModelError: a mode of IPEX-LLM that is not offered.
        """
        if training_mode not in MODES:
            raise ModelError(
                f"The training mode {training_mode!r} is not offered here.", f"Choose one of: {', '.join(MODES)}."
            )
        super().__init__(*args, **kwargs)


class TrainingArguments(transformers.TrainingArguments):
    """Transformers' own, which also takes what older scripts write. Unlike IPEX-LLM's, it forces no dtype."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_todays(kwargs))


def _todays(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an older transformers, as today's takes them; what is changed is logged."""
    known = inspect.signature(transformers.TrainingArguments.__init__).parameters
    made: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in GONE and name not in known:
            log.warning("%s no longer exists in transformers; it is left out.", name)
            continue
        made[name if name in known else ARGUMENTS.get(name, name)] = value
    optimizer = made.get("optim")
    if optimizer in OPTIMIZERS:
        made["optim"] = OPTIMIZERS[optimizer]
        log.warning("The optimizer %s is not here; %s is taken.", optimizer, made["optim"])
    if made.get("fp16") and (made.get("use_cpu") or not torch.accelerator.is_available()):
        made["fp16"], made["bf16"] = False, choose("cpu").torch_dtype == torch.bfloat16
        log.warning("A CPU does not train in fp16; %s is taken.", "bf16" if made["bf16"] else "float32")
    return made


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Freeze a base, and have it compute activations anew in backward instead of keeping them.

    PEFT's function of this name also casts every weight that is not packed to float32, embeddings too. Nothing here
    needs it, and it doubles them: a base keeps the dtype that it was loaded in.

    Args:
        model: of transformers, packed or not.
        use_gradient_checkpointing: less memory, slower.
        gradient_checkpointing_kwargs: for torch; non-reentrant unless it says otherwise.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if use_gradient_checkpointing:
        how = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if how["use_reentrant"]:
            # It gives no gradient where no input asks for one.
            model.enable_input_require_grads()  # type: ignore[operator]
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)  # type: ignore[operator]
    return model


def get_peft_model(model: nn.Module, peft_config: peft.PeftConfig, *args: Any, **kwargs: Any) -> nn.Module:
    """A model whose adapters are trained and nothing else; adapters on low-bit layers are float32.

    Args:
        model: the base.
        peft_config: such as `LoraConfig`.
        All else as PEFT's function.

    Raises:
        ModelError: no layer bears any of the names in `target_modules`; the hint lists those that do.
    """
    try:
        adapted = peft.get_peft_model(model, peft_config, *args, **kwargs)  # type: ignore[arg-type]
        return quicken(adapted)
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        names = sorted(
            {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        )
        raise ModelError(
            "No layer of this model bears a name in target_modules.", f'Take of: {", ".join(names)}; or "all-linear".'
        ) from error


class Dropout(nn.Dropout):
    """Torch's, but on a CPU four numbers at a time are dropped by one draw; torch draws one by one on one core.

    The probability is rounded to 1 / 65,536.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Dropout's name for it
        """The input with some of its numbers 0 and the others larger by as much, in training."""
        level = round(self.p * 2**16)
        if not self.training or not 0 < level < 2**16 or input.device.type != "cpu":
            return super().forward(input)
        draws = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = draws.view(torch.int16)[: input.numel()].view(input.shape) >= level - 2**15
        return input * kept.to(input.dtype).mul_(2**16 / (2**16 - level))


def quicken(model: Model) -> Model:
    """Make a step faster that gives the same: our dropout in the place of torch's, and one layer less twice.

    Gradient checkpointing would compute the last layer a second time right after the first.
    """
    again = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in again[-1:]:
        layer.gradient_checkpointing = False
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, dropout in module.lora_dropout.items():
                if type(dropout) is nn.Dropout:
                    module.lora_dropout[name] = Dropout(dropout.p)
    return model


def cast_lora_weight(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Cast the adapters of a model, in place, which makes a step faster and its updates coarser."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.adapter_layer_names:
                getattr(module, name).to(dtype)
