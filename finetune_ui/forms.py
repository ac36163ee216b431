"""The form of the Fine-tune tab: the fields of a recipe, what stands in them, and what a person may not write there.

Promises that every setting of `nibble.training.recipe.Recipe` has its field, with that table's defaults and bounds, and
that a setting which cannot be is named. Knows nothing of Gradio and of how a field looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

import yaml

from nibble.config import StrictLoader
from nibble.errors import ConfigError, NibbleError
from nibble.training.recipe import NAMES, Recipe
from nibble.wishes import Finetune

ELSEWHERE = ("model", "data", "columns", "leave_out")
"""Settings that have widgets of their own in the first step."""

SIMPLE = tuple(item.name for item in fields(Recipe) if item.metadata["simple"] and item.name not in ELSEWHERE)
"""What matters most, after model and data."""

GROUPS = {
    "group_adapter": (
        "out", "method", "r", "alpha", "dropout", "bias", "targets", "modules_to_not_convert",
    ),
    "group_course": (
        "epochs", "accumulation", "warmup_steps", "scheduler", "optimizer", "weight_decay", "max_grad_norm", "seed",
    ),
    "group_samples": ("max_length", "packing", "eval_share", "eval_steps", "early_stop"),
    "group_machine": ("gradient_checkpointing", "dtype", "save_steps", "logging_steps"),
}  # fmt: skip
"""The rest, folded: word of the group -> its settings."""

FIELDS: Mapping[str, Field[Any]] = {item.name: item for item in fields(Recipe)}

MOST_YAML = 100_000
"""Characters of a run.yaml that is opened."""

Values = dict[str, Any]


def default(name: str) -> Any:
    """A setting's default."""
    item = FIELDS[name]
    return item.default_factory() if item.default_factory is not MISSING else item.default


def shown(value: Any) -> str | bool:
    """A value as it stands in its field."""
    if isinstance(value, bool):
        return value
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def defaults() -> Values:
    """What stands in the fields of an untouched form."""
    return {name: shown(default(name)) for name in NAMES if name not in ELSEWHERE}


def settings(model: Any, data: Any, columns: Any, leave_out: Any, values: Any) -> dict[str, Any]:
    """The settings that the fields make, as they were written: nothing is checked yet.

    An emptied field is its default, but for those that may be empty.
    """
    told = {key: value for key, value in values.items() if key in NAMES} if isinstance(values, Mapping) else {}
    for name, value in told.items():
        if isinstance(value, str) and not value.strip() and default(name) not in ("", ()):
            told[name] = default(name)
    mapped = dict(columns) if isinstance(columns, Mapping) else {}
    own = {"model": model or "", "data": data or "", "columns": mapped, "leave_out": bool(leave_out)}
    return told | own


def problems(told: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with the settings: name -> a sentence; empty where nothing is."""
    found = {}
    for name, value in told.items():
        # Each beside the others' defaults, so that one does not hide the next.
        method = {"method": told["method"]} if name == "low_bit" and told.get("method") == "lora" else {}
        try:
            Finetune({name: value, **method}).recipe()
        except NibbleError as error:
            found[name] = str(error)
    return found


def as_yaml(told: Mapping[str, Any]) -> str:
    """The settings as a run.yaml that `nibble finetune` takes too.

    Raises:
        NibbleError: a setting that cannot be.
    """
    return yaml.safe_dump(Finetune(told).recipe().as_spec(), sort_keys=False, allow_unicode=True)


def from_yaml(text: str) -> dict[str, Any]:
    """The settings in a run.yaml: a recipe alone, or a job's with its recipe under `spec`.

    Raises:
        NibbleError: it is neither, or a setting cannot be.
    """
    try:
        values = yaml.load(text[:MOST_YAML], StrictLoader)  # noqa: S506 - a SafeLoader, made stricter
    except (yaml.YAMLError, RecursionError, ValueError):
        raise ConfigError("This is not a run.yaml: it cannot be read as YAML.", "Save one from this form.") from None
    values = values.get("spec", values) if isinstance(values, dict) else None
    if not isinstance(values, dict) or not values.keys() & set(NAMES):
        raise ConfigError("This is not a run.yaml of fine-tuning.", "Save one from this form.")
    recipe = Finetune({key: value for key, value in values.items() if key in NAMES}).recipe()
    return recipe.as_spec()


def fill(told: Mapping[str, Any]) -> Values:
    """What stands in the form's fields for these settings."""
    return {name: shown(told.get(name, default(name))) for name in NAMES if name not in ELSEWHERE}
