"""The console command that does what a job does, to be copied into a terminal.

Promises that the line can be pasted as it is, whatever stands in the names. Knows nothing of how it is shown.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from nibble.config import Settings
from nibble.training.recipe import Recipe

Flags = list[str]


def _value(flag: str) -> Callable[[Any], Flags]:
    return lambda value: [flag, str(value)]


def _joined(flag: str) -> Callable[[Any], Flags]:
    return lambda values: [flag, ",".join(values)] if values else []


def _pick(limits: Mapping[str, float]) -> Flags:
    flags = ["--pick"]
    if "memory_bytes" in limits:
        flags += ["--max-memory", f"{limits['memory_bytes'] / 1e9:g}GB"]
    return flags + (["--max-kl", f"{limits['max_kl']:g}"] if "max_kl" in limits else [])


SUBJECT = {"download": "repo", "quantize": "model", "evaluate": "model", "merge": "adapter", "compare": "adapter"}
"""Task -> the key of its spec that stands without a flag."""

FLAGS: Mapping[str, Callable[[Any], Flags]] = {
    "hub": _value("--hub"),
    "revision": _value("--revision"),
    "file": _value("--file"),
    "name": _value("--name"),
    "dataset": lambda wanted: ["--dataset"] if wanted else [],
    "low_bit": _joined("--low-bit"),
    "out": lambda name: ["--out", str(name)] if name else [],
    "skip": lambda names: [part for name in names for part in ("--skip", name)],
    "overrides": lambda rules: [part for name, form in rules.items() for part in ("--override", f"{name}={form}")],
    "pick": _pick,
    "evaluate": lambda wanted: [] if wanted else ["--no-report"],
    "against": _value("--against"),
    "tokens": _value("--tokens"),
    "checkpoints": lambda steps: (
        ["--checkpoints", ",".join(map(str, steps)) if steps != "all" else "all"] if steps else []
    ),
    "prompts": lambda prompts: [part for prompt in prompts for part in ("--prompt", prompt)],
    "seed": _value("--seed"),
    "max_new_tokens": _value("--max-new-tokens"),
    "device": lambda kind: [] if kind == "cpu" else ["--device", kind],
    "config": _value("--config"),
    "home": lambda home: [] if Path(home) == Settings().home_folder else ["--home", str(home)],
}
"""Key of a spec -> the flags that say the same."""


SERVERS = ("device", "config", "home")
"""Of those, what a fine-tuning has too; the rest it says in its own way."""


def command(task: str, spec: Mapping[str, Any]) -> str:
    """The line that does the same in a console; empty for a task that has none.

    Args:
        task: as in run.yaml.
        spec: what the task is told.
    """
    if task not in SUBJECT and task != "finetune":
        return ""
    subject = _recipe(spec) if task == "finetune" else [_subject(task, spec)]
    words = ["python", "-m", "nibble", task, *subject]
    for key, flags in FLAGS.items():
        if key in spec and (task != "finetune" or key in SERVERS):
            words += flags(spec[key])
    return shlex.join(words)


def _subject(task: str, spec: Mapping[str, Any]) -> str:
    # A comparison is of an adapter, or of a run.
    return str(spec.get(SUBJECT[task]) or spec.get("run") or "")


def _recipe(spec: Mapping[str, Any]) -> Flags:
    """The settings of a fine-tuning that are not the defaults; base and data set always."""
    flags = ["--base", str(spec.get("model", "")), "--data", str(spec.get("data", ""))]
    for item in fields(Recipe):
        value, usual = spec.get(item.name), item.default
        usual = {} if usual is MISSING else list(usual) if isinstance(usual, tuple) else usual
        if item.name in ("model", "data") or value is None or value == usual:
            continue
        name = f"--{item.name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(name if value else f"--no-{name[2:]}")
        elif isinstance(value, Mapping):
            flags += [name, ", ".join(f"{key}={column}" for key, column in value.items())]
        else:
            flags += [name, ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)]
    return flags + (["--dry-run"] if spec.get("dry_run") else [])
