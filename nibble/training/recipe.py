"""The recipe of a fine-tuning run: every setting a field with its default, its bounds and a line of prose.

Promises that a setting which cannot be is named with what it may be, whoever sent it: the page's form, an endpoint, a
flag or run.yaml. The defaults are the QLoRA tutorial's. Imports no torch. Knows nothing of models and data sets.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nibble.config import check_keys, read_yaml
from nibble.errors import ConfigError
from nibble.lowbit.formats import resolve

METHODS = ("qlora", "lora")
"""LoRA on a base in low bit, or on one in bf16."""

ALL_LINEAR = "all-linear"
"""In place of `targets`: every linear layer but the head."""

SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")

OPTIMIZERS = ("adamw_torch", "sgd")
RENAMED = {"adamw_hf": "adamw_torch", "adamw": "adamw_torch", "paged_adamw_8bit": "adamw_torch"}
"""Optimizers that tutorials name and that are gone, or need another library -> torch's."""

DTYPES = ("", "bfloat16", "float32", "float16")

MOST_NAMES = 100


def told(
    default: Any, prose: str, *, least: float | None = None, most: float | None = None,
    choices: Collection[str] = (), simple: bool = False,
) -> Any:  # fmt: skip
    """A field: its default, what it means, its bounds or choices, and whether it is one of those that matter most."""
    metadata = {"prose": prose, "least": least, "most": most, "choices": tuple(choices), "simple": simple}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """What is trained on what, and how. Steps are optimizer steps; sizes are tokens and samples.

    Raises:
        ConfigError: a setting that cannot be, by its name.
    """

    model: str = told("guide", "the base: a model's name here, or a folder on the console", simple=True)
    data: str = told("quotes", "a data set: its name here, its id on a hub, or a file on the console", simple=True)
    columns: Mapping[str, str] = told({}, "field of the data set's form -> column, such as text: quote")
    leave_out: bool = told(False, "leave faulty rows out, counted, instead of refusing the data set")
    method: str = told("qlora", "qlora: the base in low bit; lora: in bf16", choices=METHODS)
    low_bit: str = told("nf4", "format of the base while it is trained", simple=True)
    r: int = told(8, "rank of the adapter", least=1, most=1024)
    alpha: float = told(32.0, "scale of the adapter: alpha / r", least=0.001, most=65_536)
    dropout: float = told(0.05, "share of the adapter's inputs left out in each step", least=0, most=0.9)
    bias: str = told("none", "which biases are trained too", choices=("none", "lora_only", "all"))
    targets: tuple[str, ...] = told(
        ("q_proj", "k_proj", "v_proj"), f"layers that get an adapter; {ALL_LINEAR} is every one but the head"
    )
    modules_to_not_convert: tuple[str, ...] = told(("lm_head",), "modules of the base that stay in full precision")
    max_steps: int = told(200, "steps in all", least=1, most=10_000_000, simple=True)
    epochs: float = told(0.0, "passes over the data; 0 counts steps instead", least=0, most=10_000)
    batch_size: int = told(4, "samples of a step, all devices together", least=1, most=65_536, simple=True)
    accumulation: int = told(1, "batches that one step adds up", least=1, most=65_536)
    learning_rate: float = told(2e-4, "highest learning rate", least=1e-9, most=1, simple=True)
    warmup_steps: int = told(20, "steps in which the learning rate rises", least=0, most=10_000_000)
    scheduler: str = told("linear", "how the learning rate falls after that", choices=SCHEDULERS)
    optimizer: str = told("adamw_torch", "the optimizer, torch's own", choices=OPTIMIZERS)
    weight_decay: float = told(0.0, "decay of the adapter's weights", least=0, most=1)
    max_grad_norm: float = told(1.0, "gradients are clipped to this norm; 0 clips nothing", least=0, most=1e6)
    max_length: int = told(512, "longest sample in tokens; the rest is cut off", least=8, most=1_048_576)
    packing: bool = told(False, "several samples in one row, where attention can be kept apart")
    save_steps: int = told(100, "a checkpoint every so many steps", least=1, most=10_000_000)
    logging_steps: int = told(20, "a row of the log every so many steps", least=1, most=10_000_000)
    eval_share: float = told(0.05, "share of the samples held out to measure the loss on", least=0, most=0.5)
    eval_steps: int = told(0, "measure it every so many steps; 0 is as often as a checkpoint", least=0, most=10_000_000)
    early_stop: int = told(0, "stop after so many measurements without a better loss; 0 never does", least=0, most=1000)
    gradient_checkpointing: bool = told(True, "compute activations anew instead of keeping them: less memory, slower")
    dtype: str = told("", "dtype of the arithmetic; empty is the device's own", choices=DTYPES)
    seed: int = told(42, "the same seed on the same machine gives the same adapter", least=0, most=2**32 - 1)
    out: str = told("", "the adapter's name; empty is made of the model's and the data set's")

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _checked(item, getattr(self, item.name)))
        if self.method == "qlora" and not resolve(self.low_bit).quantized:
            raise ConfigError(
                f"low_bit is {self.low_bit}, and qlora trains on a base in low bit.", "Take nf4, or method: lora."
            )

    @property
    def form(self) -> str:
        """The format that the base is loaded in."""
        return resolve(self.low_bit).name if self.method == "qlora" else "bf16"

    def evaluations(self, steps: int) -> int:
        """How often what is held out is measured in a run of so many steps."""
        return 1 + math.ceil(steps / (self.eval_steps or self.save_steps)) if self.eval_share else 0

    def as_spec(self) -> dict[str, Any]:
        """Plain data that YAML and JSON can hold; `from_spec` reads it back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def from_spec(spec: Mapping[str, Any]) -> Recipe:
    """The recipe in a spec of the task `finetune`, whose other keys (SPEC) are left alone.

    Raises:
        ConfigError: an unknown key, or a setting that cannot be.
    """
    check_keys(spec, [*NAMES, *SPEC], "finetune")
    return Recipe(**{key: value for key, value in spec.items() if key in NAMES and value is not None})


RUN_KEYS = ("task", "spec", "exclusive", "created")
"""What a job's run.yaml says; a plain recipe has none of these."""


def read_spec(path: Path) -> dict[str, Any]:
    """The settings in a file: a recipe, or the run.yaml of a job.

    Raises:
        ConfigError: it is neither, or of a job of another kind.
    """
    values = read_yaml(path)
    if "spec" not in values:
        check_keys(values, [*NAMES, *SPEC], str(path))
        return values
    check_keys(values, [*RUN_KEYS], str(path))
    spec = values["spec"]
    if values.get("task") != "finetune" or not isinstance(spec, dict):
        raise ConfigError(f"{path} is the run of another task.", "Name one whose task is finetune.")
    return {key: value for key, value in spec.items() if key in NAMES}


NAMES = tuple(item.name for item in fields(Recipe))

SPEC = ("home", "device", "config", "paths", "resume", "dry_run")
"""What else a spec of the task may say. `paths`: whether model and data may be paths; `dry_run`: two steps, measured,
and nothing kept. All but `dry_run` are never a visitor's to choose."""


def _checked(item: Field[Any], value: Any) -> Any:
    """A value of a field in its own type.

    Raises:
        ConfigError: it is none, or out of bounds.
    """
    if item.name == "optimizer":
        value = RENAMED.get(value, value) if isinstance(value, str) else value
    sort = dict if item.default is MISSING else type(item.default)
    cast, kind = CASTS[sort]
    try:
        made = cast(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{item.name} is {reprlib.repr(value)}.", f"It must be {kind}.") from None
    least, most, choices = (item.metadata[key] for key in ("least", "most", "choices"))
    if choices and made not in choices:
        named = ", ".join(choice or "empty" for choice in choices)
        raise ConfigError(f"{item.name} is {made[:60]!r}.", f"It must be one of: {named}.")
    if least is not None and not least <= made <= most:
        low, high, told = (
            f"{number:,}" if isinstance(number, int) else f"{number:g}" for number in (least, most, made)
        )
        raise ConfigError(f"{item.name} is {told}.", f"It must lie between {low} and {high}.")
    return made


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 4096 or "\0" in value:
        raise ValueError
    return value.strip()


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _number(value: Any) -> float:
    # YAML reads 2e-4 as text.
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _integer(value: Any) -> int:
    number = _number(value)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _names(value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or len(items) > MOST_NAMES:
        raise ValueError
    return tuple(name for item in items if (name := _text(item)))


def _mapping(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or len(value) > MOST_NAMES:
        raise ValueError
    return {_text(key): _text(each) for key, each in value.items()}


CASTS: dict[type, tuple[Callable[[Any], Any], str]] = {
    str: (_text, "a short text"),
    bool: (_boolean, "true or false"),
    int: (_integer, "a whole number"),
    float: (_number, "a number"),
    tuple: (_names, "a list of names"),
    dict: (_mapping, "a mapping of fields to columns"),
}
"""Type of a field's default -> how a value becomes it, and how to say so."""
