"""The full-precision model that an adapter is merged into.

Promises that a base in low bit leads to the model which it was made from, where that is here. Imports no torch. Knows
nothing of adapters' contents.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nibble import library, publish, screen
from nibble.adapters import Adapter, base_folder
from nibble.bigdl.folders import saved_format
from nibble.checkpoint import is_gguf, read_config
from nibble.errors import ModelError


@dataclass(frozen=True)
class Base:
    """What an adapter belongs to."""

    name: str
    folder: Path
    """In full precision."""
    trained_on: Path
    """What the adapter was trained on: the same folder, or a low-bit form of it."""
    known_by: str
    """`fingerprint` where the weights are those that the adapter recorded, else `name`."""

    @property
    def packed(self) -> bool:
        """Whether the adapter was trained on a folder in low bit."""
        return self.folder != self.trained_on


def find(adapter: Adapter, home: Path, *, paths: bool = False) -> Base:
    """The base of an adapter, in full precision.

    Raises:
        ModelError: it is not here, or only in low bit.
    """
    trained_on = base_folder(adapter, home, paths=paths)
    folder = trained_on if in_full(trained_on) else _origin(adapter, trained_on, home)
    screen.check(folder, tokenizer=False)
    name = library.GUIDE if folder == library.GUIDE_FOLDER else folder.name
    return Base(name, folder, trained_on, "fingerprint" if adapter.fingerprint else "name")


def in_full(folder: Path) -> bool:
    """Whether it is a model in full precision."""
    if not (folder / "config.json").exists():
        return False
    config = read_config(folder)
    return not screen.packing(folder, config) and not saved_format(config) and not is_gguf(folder)


def _origin(adapter: Adapter, packed: Path, home: Path) -> Path:
    made_from = str(publish.read_manifest(packed).get("source") or "")
    try:
        folder = library.find(made_from, home)
        if in_full(folder):
            return folder
    except ModelError:
        pass
    raise ModelError(
        f"{adapter.name} was trained on {packed.name}, which is in low bit, and a merge needs the full-precision model "
        f"that it was made from ({made_from or 'it does not say which'}).",
        f"Put that model into {home / library.MODELS}." if made_from else "Take an adapter of a full-precision model.",
    )
