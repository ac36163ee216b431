"""The console command that does what a job does, to be copied into a terminal.

Promises that the line can be pasted as it is, whatever stands in the names. Knows nothing of how it is shown.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nibble.config import Settings

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


SUBJECT = {"download": "repo", "quantize": "model", "evaluate": "model"}
"""Task -> the key of its spec that stands without a flag."""

FLAGS: Mapping[str, Callable[[Any], Flags]] = {
    "hub": _value("--hub"),
    "revision": _value("--revision"),
    "file": _value("--file"),
    "name": _value("--name"),
    "low_bit": _joined("--low-bit"),
    "out": _value("--out"),
    "skip": lambda names: [part for name in names for part in ("--skip", name)],
    "overrides": lambda rules: [part for name, form in rules.items() for part in ("--override", f"{name}={form}")],
    "pick": _pick,
    "evaluate": lambda wanted: [] if wanted else ["--no-report"],
    "against": _value("--against"),
    "tokens": _value("--tokens"),
    "device": lambda kind: [] if kind == "cpu" else ["--device", kind],
    "config": _value("--config"),
    "home": lambda home: [] if Path(home) == Settings().home_folder else ["--home", str(home)],
}
"""Key of a spec -> the flags that say the same."""


def command(task: str, spec: Mapping[str, Any]) -> str:
    """The line that does the same in a console; empty for a task that has none.

    Args:
        task: as in run.yaml.
        spec: what the task is told.
    """
    if task not in SUBJECT:
        return ""
    words = ["python", "-m", "nibble", task, str(spec.get(SUBJECT[task], ""))]
    for key, flags in FLAGS.items():
        if key in spec:
            words += flags(spec[key])
    return shlex.join(words)
