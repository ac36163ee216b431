"""What learns: the base as it is trained on, its tokenizer, and the adapter put onto it.

Promises the device's own dtype where the one asked for cannot be, an adapter in float32, no cache while training, and
a sentence for whatever cannot be loaded. Knows nothing of data sets and steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch

from nibble.checkpoint import read_config
from nibble.data.looking import open_encoder
from nibble.data.render import Encoder, padding_id
from nibble.devices import Device
from nibble.errors import DeviceError, ModelError, NibbleError
from nibble.library import GUIDE, GUIDE_FOLDER
from nibble.lowbit import attention
from nibble.lowbit.linear import LowBitLinear
from nibble.qlora import quicken
from nibble.training import targets
from nibble.training.loss import frugal
from nibble.training.recipe import Recipe
from nibble.transformers import AutoModelForCausalLM

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "defaultcpuallocator")
"""What torch's RuntimeErrors say, in lower case, when memory ran out on a device that raises no error of its own."""


@dataclass
class Reader:
    """A base's tokenizer, with what is known of the base from its folder alone."""

    name: str
    """What the base is called here."""
    folder: Path
    tokenizer: Any
    encoder: Encoder
    padding: int
    family: str
    notes: list[str] = field(default_factory=list)


@dataclass
class Learner:
    """A base with an adapter on it."""

    model: peft.PeftModel
    format: str
    """Of the base, as it is in memory."""
    dtype: torch.dtype
    """Of the arithmetic."""
    notes: list[str] = field(default_factory=list)

    @property
    def trainable(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


def model_name(folder: Path) -> str:
    """What a model in this folder is called."""
    return GUIDE if folder.resolve() == GUIDE_FOLDER.resolve() else folder.name


def open_reader(folder: Path, max_length: int, *, trusted: bool = False) -> Reader:
    """The tokenizer of a base, and how it makes samples of at most so many tokens, or of the base's context.

    Raises:
        ModelError: there is none that can be loaded.
        DataError: it has no token to pad with.
    """
    encoder = open_encoder(folder, max_length, trusted=trusted)
    notes = []
    if encoder.max_length and encoder.max_length < max_length:
        sees = f"{model_name(folder)} sees {encoder.max_length} tokens, and so do the samples."
        notes.append(f"max_length is {max_length}; {sees}")
    family = str(read_config(folder).get("model_type", ""))
    return Reader(
        model_name(folder), folder, encoder.tokenizer, encoder, padding_id(encoder.tokenizer), family, notes
    )  # fmt: skip


def arithmetic(recipe: Recipe, device: Device) -> tuple[torch.dtype, list[str]]:
    """The dtype to compute in, and a note where it is not the one asked for."""
    if recipe.dtype == "float16" and device.kind == "cpu":
        return device.torch_dtype, [f"A CPU does not train in float16; {device.dtype} is used instead."]
    return getattr(torch, recipe.dtype or device.dtype), []


def load(reader: Reader, recipe: Recipe, device: Device, *, trusted: bool = False) -> Learner:
    """Load a base in the recipe's format, on the CPU, and put a fresh adapter on it.

    Raises:
        ModelError: the base cannot be loaded, or has none of the recipe's targets.
        DeviceError: there is not enough memory.
    """
    dtype, notes = arithmetic(recipe, device)
    try:
        model, stored = _base(reader.folder, recipe, dtype, trusted)
    except Exception as error:
        if is_out_of_memory(error.__cause__ or error):
            raise DeviceError(
                f"There is not enough memory to load {reader.name}.",
                "Choose a format with fewer bits, or a smaller base.",
            ) from error
        raise
    if stored and stored != recipe.form:
        notes.append(f"{reader.name} is packed as {stored} already and is trained on in this form.")
    chosen = targets.choose(model, recipe.targets)
    model.config.use_cache = False
    if recipe.gradient_checkpointing:
        notes += _checkpointing(model)
    torch.manual_seed(recipe.seed)
    lora = peft.LoraConfig(
        r=recipe.r, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, bias=recipe.bias,  # type: ignore[arg-type]
        target_modules=list(chosen.names), task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted: Any = quicken(peft.get_peft_model(model, lora))
    learner = Learner(adapted, stored or recipe.form, dtype, notes + chosen.notes)
    frugal(learner.model)
    if not learner.trainable:
        raise ModelError("There is nothing to train: the adapter holds no weights.", "Name other targets.")
    return learner


def _base(folder: Path, recipe: Recipe, dtype: torch.dtype, trusted: bool) -> tuple[Any, str]:
    """The base, and the format that its folder is packed in; empty where it is in full precision."""
    packed = (read_config(folder).get("quantization_config") or {}).get("low_bit") or ""
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trusted}
    if not packed:
        options |= {"load_in_low_bit": recipe.form, "modules_to_not_convert": list(recipe.modules_to_not_convert)}
    load = AutoModelForCausalLM.load_low_bit if packed else AutoModelForCausalLM.from_pretrained
    try:
        model = load(folder, attn_implementation="sdpa", **options)
        attention.use(model)
        return model, packed
    except ModelError as error:
        if "scaled_dot_product_attention" not in str(error.__cause__):
            raise
    return load(folder, attn_implementation="eager", **options), packed


def _checkpointing(model: Any) -> list[str]:
    """Let activations be computed anew, without re-entering; a note where the model's code cannot."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        return [f"{type(model).__name__} cannot compute activations anew; they are all kept."]
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
    return []


def evaluating(model: torch.nn.Module) -> None:
    """Set a model to measure: no dropout, and the packed weights exactly as training meets them."""
    model.eval()
    for module in model.modules():
        # In evaluation mode a packed layer would take a chat kernel's rounded form of its weight.
        if isinstance(module, LowBitLinear):
            module.training = True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory, of whatever device, was not enough."""
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)
    )


def out_of_memory(recipe: Recipe, kind: str) -> NibbleError:
    """What to say, and do, when a step did not fit."""
    ways = [f"a smaller batch_size (now {recipe.batch_size}; raise accumulation instead)"]
    ways.append(f"a smaller max_length (now {recipe.max_length})")
    if not recipe.gradient_checkpointing:
        ways.insert(0, "gradient_checkpointing")
    return DeviceError(f"A step did not fit into the memory of the {kind}.", f"Try {', or '.join(ways)}.")


def with_dtype(device: Device, dtype: torch.dtype) -> Device:
    """The same device, computing in this dtype."""
    return replace(device, dtype=str(dtype).removeprefix("torch."))
