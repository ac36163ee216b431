"""What going on needs besides the adapter: the optimizer, the schedule and every generator of random numbers.

Promises files of plain data, numbers as safetensors and the rest as JSON, so that reading them runs nothing; and that
what is read is bit for bit what was written. Knows nothing of checkpoints.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file

Dice = dict[str, Any]
"""The state of every generator: plain data, and tensors of bytes."""

TENSORS, PLAIN = "state.safetensors", "state.json"


def dice() -> Dice:
    """The states of Python's, numpy's and torch's generators in this process."""
    version, numbers, spare = random.getstate()
    twister: Any = numpy.random.get_state()
    kind, keys, place, has_gauss, gauss = twister
    found: Dice = {
        "python": [version, list(numbers), spare],
        "numpy": [kind, keys.tolist(), place, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        found[accelerator.type] = torch.get_device_module(accelerator.type).get_rng_state()
    return found


def cast(states: Dice) -> None:
    """Put the generators back into these states."""
    version, numbers, spare = states["python"]
    random.setstate((version, tuple(numbers), spare))
    kind, keys, place, has_gauss, gauss = states["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), place, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type in states:
        torch.get_device_module(accelerator.type).set_rng_state(states[accelerator.type])


def write(folder: Path, optimizer: dict[str, Any], schedule: dict[str, Any], states: list[Dice], **more: Any) -> None:
    """Write the state dicts of optimizer and schedule, the generators of each process, and more plain data."""
    tensors: dict[str, torch.Tensor] = {}
    plain = {"optimizer": optimizer, "schedule": schedule, "dice": states, "more": more}
    stored = json.dumps(_without_tensors(plain, "", tensors))
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    (folder / PLAIN).write_text(stored, encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """What `write` wrote: `optimizer`, `schedule`, `dice`, `more`."""
    tensors = load_file(folder / TENSORS)
    plain = json.loads((folder / PLAIN).read_text(encoding="utf-8"))
    found = _with_tensors(plain, tensors)
    # JSON's keys are text; an optimizer's are the numbers of its parameters.
    found["optimizer"]["state"] = {int(key): value for key, value in found["optimizer"]["state"].items()}
    return found  # type: ignore[no-any-return]


MARK = "\0tensor"
"""Stands in the place of a tensor, with its name in the other file."""


def _without_tensors(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {MARK: name}
    if isinstance(value, dict):
        return {str(key): _without_tensors(each, f"{name}.{key}", tensors) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(each, f"{name}.{place}", tensors) for place, each in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if MARK in value:
            return tensors[value[MARK]]
        return {key: _with_tensors(each, tensors) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_tensors(each, tensors) for each in value]
    return value
