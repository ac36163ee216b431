"""Adapters beside a loaded model: read at their first use, kept while they are used, told apart by what they hold.

Promises that an adapter of another model is refused in a sentence, that one which was trained anew is read anew, and
that only the adapters' own bytes are added to memory. Knows nothing of conversations.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from nibble import adapters, library
from nibble.adapters import Adapter
from nibble.errors import ModelError, NibbleError
from nibble.lowbit.lora import Addition, Lora, Wearing

KEPT = 8
"""Adapters that stay in memory; of more, the one that was not used for longest goes."""

PREFIX = "base_model.model."
"""Before the name of every tensor in an adapter's file."""

ENDINGS = {".lora_A.weight": "down", ".lora_B.weight": "up", ".bias": "bias"}


@dataclass(frozen=True)
class Dressed:
    """An adapter that is ready."""

    lora: Lora
    stops: tuple[int, ...]
    """Tokens at which it has learnt to stop, besides the model's own."""
    key: tuple[object, ...]
    """Tells its files from every other state of them."""


class Wardrobe:
    """The adapters of one loaded model."""

    def __init__(self, model: nn.Module, base: Path) -> None:
        """
        Args:
            model: as it answers, in low bit or not.
            base: its folder.
        """
        self._model, self._base = model, base
        self._wearing = Wearing(model)
        self._kept: OrderedDict[str, Dressed] = OrderedDict()

    def wear(self, folder: str) -> Dressed | None:
        """Put the adapter in a folder on the model; an empty one takes off what it wears.

        Raises:
            ModelError: there is none, it cannot be put on a model that answers, or it belongs to another model.
        """
        found = self._get(Path(folder)) if folder else None
        self._wearing.put_on(found.lora if found else None)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all that are kept."""
        return sum(found.lora.nbytes for found in self._kept.values())

    def _get(self, folder: Path) -> Dressed:
        key = _key(folder)
        found = self._kept.get(str(folder))
        if found is None or found.key != key:
            found = self._read(folder, key)
            self._kept[str(folder)] = found
        self._kept.move_to_end(str(folder))
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found

    def _read(self, folder: Path, key: tuple[object, ...]) -> Dressed:
        adapter = adapters.read(folder)
        if not adapters.belongs(adapter, self._base):
            raise self._foreign(adapter)
        lora = read_lora(adapter, self._model)
        stop = adapter.facts.get("stop_token_id")
        return Dressed(lora, (stop,) if isinstance(stop, int) else (), key)

    def _foreign(self, adapter: Adapter) -> ModelError:
        """The refusal of an adapter of another model, which may be called alike."""
        base = adapter.base
        if not base:
            hint = "Load the model that it was trained on."
        elif base in (self._base.name, library.GUIDE if self._base == library.GUIDE_FOLDER else ""):
            hint = f"The {base} that is here has other weights: train the adapter anew on it."
        else:
            hint = f"Load {base} first."
        return ModelError(
            f"{adapter.name} was trained on {base or 'another model'}, not on the model that is loaded.", hint
        )


def _key(folder: Path) -> tuple[object, ...]:
    """What changes whenever an adapter is written anew: a save replaces the folder, and with it every inode."""
    try:
        found = (folder / adapters.WEIGHTS).stat()
    except OSError:
        raise ModelError(f"The adapter {folder.name} is not here any more.", "Choose another, or none.") from None
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def read_lora(adapter: Adapter, model: nn.Module) -> Lora:
    """An adapter's tensors for the layers of a model, on its device.

    Raises:
        ModelError: something in it that cannot be put on a model while it answers, or does not fit.
    """
    if not adapter.leaves_base:
        raise _unusable(adapter, f"the base's own weights ({adapter.start[:40]})")
    if adapter.config.get("alora_invocation_tokens"):
        raise _unusable(adapter, "only what follows certain words")
    if adapter.method != "LORA" or adapter.config.get("use_dora"):
        kind = "DoRA" if adapter.config.get("use_dora") else adapter.method or "of no known kind"
        raise ModelError(f"{adapter.name} is {kind[:40]}; only LoRA is put on a model here.", "Merge it where PEFT is.")
    device = next(model.parameters()).device
    parts: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(adapter.folder / adapters.WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            ending = next((ending for ending in ENDINGS if name.endswith(ending)), "")
            if not ending or not name.startswith(PREFIX):
                raise _unusable(adapter, name)
            path = name[len(PREFIX) : -len(ending)].removesuffix(".base_layer")
            parts.setdefault(path, {})[ENDINGS[ending]] = file.get_tensor(name).float().to(device)
    return Lora({path: _addition(adapter, path, part, model) for path, part in parts.items()})


def _addition(adapter: Adapter, path: str, part: dict[str, torch.Tensor], model: nn.Module) -> Addition:
    try:
        layer: Any = model.get_submodule(path)
    except AttributeError:
        raise _unusable(adapter, path) from None
    if not isinstance(layer, nn.Linear):
        raise _unusable(adapter, path)
    down, up, bias = part.get("down"), part.get("up"), part.get("bias")
    shapes = [
        (down is None) == (up is None),
        down is None or down.shape[1:] == (layer.in_features,),
        up is None or (down is not None and up.shape == (layer.out_features, down.shape[0])),
        bias is None or (layer.bias is not None and bias.shape == layer.bias.shape),
        all(bool(torch.isfinite(tensor).all()) for tensor in part.values()),
    ]
    if not all(shapes):
        raise ModelError(f"{adapter.name} does not fit {path} of this model.", "Train it anew on this model.")
    return Addition(
        down, None if up is None else adapter.scale(path) * up,
        None if bias is None else bias - layer.bias.detach().float(),
    )  # fmt: skip


def _unusable(adapter: Adapter, name: str) -> NibbleError:
    return ModelError(
        f"{adapter.name} changes {name[:120]}, which cannot be changed on a model while it answers.",
        f"Merge it instead: nibble merge {adapter.name}.",
    )
