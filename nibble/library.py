"""The models on disk: where a name leads, and what a folder holds.

Promises that a folder is judged from its JSON files and safetensors headers alone, and that one which cannot be loaded
is listed with the reason. Imports neither torch nor transformers. Knows nothing of engines.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nibble.checkpoint import CONTEXT_KEYS, dtype_name, elements, read_config, read_header, read_json, weight_files
from nibble.errors import ModelError, NibbleError
from nibble.screen import check

GUIDE = "guide"
GUIDE_FOLDER = Path(__file__).parents[1] / "guide" / "model"

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""A model's name: a folder directly under home/models."""


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model from its folder alone."""

    name: str
    folder: Path
    family: str
    """`model_type` of config.json."""
    format: str
    """Low-bit format of the stored weights, or the dtype's name where they are in full precision."""
    parameters: int
    size_bytes: int
    """Of the weight files."""
    context: int
    """Tokens the model can see at once; 0 where config.json does not say."""
    problem: str = ""
    """Why it cannot be loaded; empty when nothing is wrong."""


Judge = Callable[[Path, str], "ModelCard"]
"""A folder and its name -> its card; raises where the folder cannot or must not be loaded."""


def models(home: Path, judge: Judge | None = None) -> list[ModelCard]:
    """The guide and every folder in home/models, by name; a broken one carries its problem instead of raising.

    Args:
        home: Nibble's home folder.
        judge: None is `check`, then `inspect`.
    """
    root = home / "models"
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    named = [(GUIDE, GUIDE_FOLDER)] + [(path.name, path) for path in folders if NAME.fullmatch(path.name)]
    return [_card_or_problem(name, folder, judge or _judge) for name, folder in named if folder.is_dir()]


def _judge(folder: Path, name: str) -> ModelCard:
    check(folder)
    return inspect(folder, name)


def _card_or_problem(name: str, folder: Path, judge: Judge) -> ModelCard:
    try:
        return judge(folder, name)
    except NibbleError as error:
        return ModelCard(name, folder, "", "", 0, 0, 0, problem=str(error))


def find(name: str, home: Path, *, paths: bool = False) -> Path:
    """The folder that a model's name leads to.

    Args:
        name: `guide`, a name in home/models or, where `paths`, any folder. Endpoints and the page pass names only.
        home: Nibble's home folder.
        paths: whether a path is accepted.

    Raises:
        ModelError: nothing of that name; the hint lists the names that there are.
    """
    if name == GUIDE:
        return GUIDE_FOLDER
    if NAME.fullmatch(name) and (home / "models" / name).is_dir():
        return home / "models" / name
    if paths and Path(name).expanduser().is_dir():
        return Path(name).expanduser().resolve()
    known = ", ".join(card.name for card in models(home)) or "none yet"
    what = "model or folder" if paths else "model"
    raise ModelError(
        f"There is no {what} {name!r}.", f"Models here: {known}. Put a model's folder into {home / 'models'}."
    )


def inspect(folder: Path, name: str = "") -> ModelCard:
    """What a folder holds, read from config.json and the safetensors headers.

    Raises:
        ModelError: as `check`.
    """
    config = read_config(folder)
    files = weight_files(folder)
    tensors = {key: tensor for file in files for key, tensor in read_header(file).items()}
    quantization = config.get("quantization_config") or {}
    text = config.get("text_config") or config
    manifest = read_json(folder / "nibble.json") if (folder / "nibble.json").exists() else {}
    return ModelCard(
        name=name or folder.name,
        folder=folder,
        family=str(config.get("model_type", "")),
        format=str(quantization.get("low_bit") or quantization.get("quant_method") or dtype_name(tensors)),
        parameters=int(manifest.get("parameters") or sum(elements(tensor["shape"]) for tensor in tensors.values())),
        size_bytes=sum(file.stat().st_size for file in files),
        context=next((int(text[key]) for key in CONTEXT_KEYS if isinstance(text.get(key), int)), 0),
    )
