"""The finished adapter: home/adapters/<name>, in PEFT's own form, whole or not there.

Promises that any program with PEFT can put it on its base, and that what it was made of and how is written beside it.
Knows nothing of how it was trained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from safetensors.torch import load_file

from nibble import publish
from nibble.adapters import WEIGHTS
from nibble.sources.safetensors import TOKENIZER_FILES

KIND = "adapter"
FILES = ("adapter_config.json", WEIGHTS)


@dataclass(frozen=True)
class Origin:
    """What an adapter was trained on."""

    name: str
    folder: Path
    fingerprint: str
    format: str
    family: str

    def as_dict(self) -> dict[str, str]:
        """As nibble.json says it."""
        return {"name": self.name, "fingerprint": self.fingerprint, "format": self.format, "family": self.family}


def publish_adapter(folder: Path, source: Any, origin: Origin, facts: Mapping[str, Any]) -> None:
    """Put an adapter in place.

    Args:
        folder: home/adapters/<name>; an earlier adapter there is replaced whole.
        source: the model that it is on, or the folder of a checkpoint.
        origin: its base; the tokenizer is copied from there.
        facts: what nibble.json says of it besides.

    Raises:
        ModelError, OSError: as `publish.publication`.
    """
    with publish.publication(folder, {"kind": KIND, "base": origin.as_dict(), **facts}) as fresh:
        if isinstance(source, Path):
            for name in FILES:
                shutil.copyfile(source / name, fresh / name)
        else:
            save_adapter(source, fresh)
        _name_base(fresh / FILES[0], origin.folder)
        for pattern in (*TOKENIZER_FILES, "*.jinja"):
            for path in origin.folder.glob(pattern):
                if path.is_file() and not (fresh / path.name).exists():
                    shutil.copyfile(path, fresh / path.name)


def _name_base(path: Path, base: Path) -> None:
    """Say in adapter_config.json where the base lies."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(base)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_adapter(model: peft.PeftModel, folder: Path) -> None:
    """Write an adapter in PEFT's own form, without the card that PEFT adds."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def load_adapter(model: peft.PeftModel, folder: Path) -> None:
    """Put the numbers of a saved adapter into the one that is on a model."""
    peft.set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
