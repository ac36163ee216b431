"""The models and adapters on disk: where a name leads, and what a folder holds.

Promises that a folder is judged from its JSON files and safetensors headers alone, that one which cannot be loaded is
listed with the reason, and that no name leads out of home; a link that the owner of home put there is followed. Imports
neither torch nor transformers. Knows nothing of engines, and deletes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nibble import publish
from nibble.checkpoint import (
    CONTEXT_KEYS,
    dtype_name,
    elements,
    is_gguf,
    read_config,
    read_header,
    weight_files,
)
from nibble.errors import ModelError, NibbleError, SourceError
from nibble.screen import BIGDL_KEY, check, check_adapter, check_source, quant_method, templates

GUIDE = "guide"
GUIDE_FOLDER = Path(__file__).parents[1] / "guide" / "model"

NAME = re.compile(r"(?!(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|\Z))[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""A model's or an adapter's name: a folder directly under home/models or home/adapters, on any file system."""

REMOTE = re.compile(r"(?:https://[^/\s]+/(?:models/)?)?([A-Za-z0-9_][\w.-]*)/([A-Za-z0-9_][\w.-]*)(?:[/?#].*)?")
"""A model on a hub, by its id or its page there."""

MODELS, ADAPTERS = "models", "adapters"

OWN_TEMPLATE = "tokenizer"
"""`ModelCard.template` of a model that brings its own."""

Kind = Literal["model", "adapter", "source"]


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
    """0 where that is not known."""
    size_bytes: int
    """Of the weight files."""
    context: int
    """Tokens the model can see at once; 0 where config.json does not say."""
    problem: str = ""
    """Why it cannot be used; empty when nothing is wrong."""
    kind: Kind = "model"
    """A "source" can only be converted: GGUF, AWQ, GPTQ, BigDL-LLM's; an "adapter" belongs on a model."""
    template: str = ""
    """`OWN_TEMPLATE` where the tokenizer brings a chat template; else empty, and loading picks the family's form."""
    note: str = ""
    """Of a source: what can be done with it, in a sentence."""
    base: str = ""
    """Of an adapter: the model that it was trained on, as its maker called it."""

    @property
    def loadable(self) -> bool:
        """Whether it can be loaded as it is."""
        return self.kind == "model" and not self.problem


Judge = Callable[[Path, str], ModelCard]
"""A folder and its name -> its card; raises where the folder cannot or must not be loaded."""


def models(home: Path, judge: Judge | None = None, trusted: Collection[str] = ()) -> list[ModelCard]:
    """The guide and every folder in home/models, by name; a broken one carries its problem instead of raising.

    Args:
        home: Nibble's home folder.
        judge: None is `check`, then `inspect`.
        trusted: names of models whose own Python code may run.
    """

    def judged(folder: Path, name: str) -> ModelCard:
        check(folder, trust_remote_code=name in trusted)
        return inspect(folder, name)

    named = [(GUIDE, GUIDE_FOLDER), *_named(home / MODELS)]
    return [
        _card_or_problem(name, folder, judge or judged, trusted=name in trusted)
        for name, folder in named
        if folder.is_dir()
    ]


def adapters(home: Path) -> list[ModelCard]:
    """Every folder in home/adapters, by name; a broken one carries its problem instead of raising."""
    return [_card_or_problem(name, folder, _judge_adapter, kind="adapter") for name, folder in _named(home / ADAPTERS)]


def _named(root: Path) -> list[tuple[str, Path]]:
    folders = sorted(path for path in root.iterdir() if NAME.fullmatch(path.name)) if root.is_dir() else []
    return [(path.name, path) for path in folders if path.is_dir()]


def _judge_adapter(folder: Path, name: str) -> ModelCard:
    config = check_adapter(folder)
    said = publish.read_manifest(folder).get("base")
    weights = folder / "adapter_model.safetensors"
    return ModelCard(
        name=name,
        folder=folder,
        family="",
        format=str(config.get("peft_type") or ""),
        parameters=sum(elements(tensor["shape"]) for tensor in read_header(weights).values()),
        size_bytes=weights.stat().st_size,
        context=0,
        kind="adapter",
        base=str((said.get("name") if isinstance(said, dict) else "") or config.get("base_model_name_or_path") or ""),
    )


def _card_or_problem(
    name: str, folder: Path, judge: Judge, *, kind: Kind = "model", trusted: bool = False
) -> ModelCard:
    try:
        try:
            return judge(folder, name)
        except SourceError as reason:
            check_source(folder, trusted=trusted)
            return _source_card(folder, name, str(reason))
    except NibbleError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{name} cannot be read: {error.strerror}. Check the folder's permissions."
    return ModelCard(name, folder, "", "", 0, 0, 0, problem=problem, kind=kind)


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
    if NAME.fullmatch(name) and (home / MODELS / name).is_dir():
        return home / MODELS / name
    folder = _as_path(name) if paths else None
    if folder is not None:
        return folder
    known = ", ".join([GUIDE, *(name for name, _ in _named(home / MODELS))])
    what = "model or folder" if paths else "model"
    raise ModelError(
        f"There is no {what} {name[:200]!r}.", f"Models here: {known}. Put a model's folder into {home / MODELS}."
    )


def has_adapter(name: str, home: Path) -> bool:
    """Whether there is an adapter of that name."""
    return bool(NAME.fullmatch(name)) and (home / ADAPTERS / name).is_dir()


def find_adapter(name: str, home: Path, *, paths: bool = False) -> Path:
    """The folder that an adapter's name leads to.

    Args:
        name: a name in home/adapters or, where `paths`, any folder. Endpoints and the page pass names only.
        home: Nibble's home folder.
        paths: whether a path is accepted.

    Raises:
        ModelError: nothing of that name; the hint lists the names that there are.
    """
    if has_adapter(name, home):
        return home / ADAPTERS / name
    folder = _as_path(name) if paths else None
    if folder is not None:
        return folder
    known = ", ".join(name for name, _ in _named(home / ADAPTERS)) or "none yet; fine-tune one"
    raise ModelError(f"There is no adapter {name[:200]!r}.", f"Adapters here: {known}.")


def _as_path(name: str) -> Path | None:
    """The folder at a path; None where there is none, or no file system could have one."""
    try:
        folder = Path(name).expanduser()
        return folder.resolve() if name and folder.is_dir() else None
    except (OSError, ValueError, RuntimeError):
        return None


def inspect(folder: Path, name: str = "") -> ModelCard:
    """What a folder holds, read from config.json and the safetensors headers.

    Raises:
        ModelError: as `check`.
    """
    config = read_config(folder)
    files = weight_files(folder)
    tensors = {key: tensor for file in files for key, tensor in read_header(file).items()}
    quantization = config.get("quantization_config") or {}
    manifest = publish.read_manifest(folder)
    known = manifest.get("parameters")
    return ModelCard(
        name=name or folder.name,
        folder=folder,
        family=str(config.get("model_type", "")),
        format=str(quantization.get("low_bit") or quantization.get("quant_method") or dtype_name(tensors)),
        parameters=known if isinstance(known, int) else sum(elements(item["shape"]) for item in tensors.values()),
        size_bytes=sum(file.stat().st_size for file in files),
        context=_context(config),
        template=OWN_TEMPLATE if templates(folder) else "",
    )


def _source_card(folder: Path, name: str, note: str) -> ModelCard:
    """The card of a folder that can only be converted; how many parameters it packs is not told by its headers."""
    gguf = list(folder.glob("*.gguf")) if is_gguf(folder) else []
    config: dict[str, Any] = read_config(folder) if (folder / "config.json").exists() else {}
    files = gguf or (list(folder.glob("pytorch_model*.bin")) if BIGDL_KEY in config else [])
    return ModelCard(
        name=name,
        folder=folder,
        family=str(config.get("model_type", "")),
        format=str(config.get(BIGDL_KEY) or quant_method(folder, config) or "gguf"),
        parameters=0,
        size_bytes=sum(file.stat().st_size for file in files or weight_files(folder)),
        context=_context(config),
        kind="source",
        template=OWN_TEMPLATE if templates(folder) else "",
        note=note,
    )


def _context(config: dict[str, Any]) -> int:
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    return next((text[key] for key in CONTEXT_KEYS if type(text.get(key)) is int), 0)


def report_file(name: str, home: Path) -> Path:
    """Where the report of a model is kept; see `nibble.quality.kept`."""
    return home / "reports" / f"{name}.json"


def drop_report(name: str, home: Path) -> None:
    """Forget what was measured of a model: it goes, or another takes its name.

    Raises:
        OSError: the file cannot be removed.
    """
    report_file(name, home).unlink(missing_ok=True)
