"""The models and adapters on disk: where a name leads, what a folder holds, and how it goes.

Promises that a folder is judged from its JSON files and safetensors headers alone, that one which cannot be loaded is
listed with the reason, and that no name leads out of home. A link that the owner of home put there is followed to read
and never to delete. Imports neither torch nor transformers. Knows nothing of engines.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from nibble import jobs, publish
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
from nibble.lowbit.formats import ALIASES, FORMATS
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


@dataclass(frozen=True)
class DiskUse:
    """What home takes on its disk, in bytes, and what is left there."""

    models: int
    adapters: int
    runs: int
    unfinished: int
    """Downloads that were cut, and leftovers of saves that were killed."""
    free: int


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


def delete(name: str, home: Path, *, loaded: Collection[str], kind: str = "") -> int:
    """Take a model or an adapter off the disk, with the report of a model: whole to a reader, then gone.

    Args:
        name: in home/models or home/adapters.
        home: Nibble's home folder.
        loaded: names of the models that are in memory or are being loaded.
        kind: as its card says; empty will do where only one of the two has that name.

    Returns:
        The bytes that were freed; none where it was a link, whose folder stays.

    Raises:
        ModelError: nothing of that name, or both a model and an adapter; the guide; or something uses it.
    """
    root, folder = _place(name, home, kind)
    if root == MODELS:
        if name == GUIDE:
            raise ModelError("The guide is part of Nibble and is not deleted.", "Delete another model.")
        if name in loaded:
            raise ModelError(f"{name} is loaded.", "Unload it, or load another model first.")
        user = next((job for job in jobs.list_jobs(home) if job.live and _uses(job, folder, home)), None)
        if user:
            raise ModelError(f"The job {user.id} works with {name}.", f"Wait for its end, or stop it: {user.id}.")
    size = 0 if folder.is_symlink() else tree_bytes(folder)
    try:
        publish.remove(folder)
        if root == MODELS:
            drop_report(name, home)
    except OSError as error:
        raise ModelError(f"{name} cannot be deleted: {error.strerror}.", "Check the permissions of home.") from None
    return size


def _place(name: str, home: Path, kind: str) -> tuple[str, Path]:
    """`MODELS` or `ADAPTERS`, and the folder there that a name and a kind lead to.

    Raises:
        ModelError: no such kind, nothing of that name, or two things and no kind.
    """
    if kind not in ("", *get_args(Kind)):
        raise ModelError(f"There is no kind {kind[:40]!r}.", f"Kinds: {', '.join(get_args(Kind))}.")
    roots = (MODELS, ADAPTERS) if not kind else (ADAPTERS,) if kind == "adapter" else (MODELS,)
    places = [(root, home / root / name) for root in roots] if NAME.fullmatch(name) else []
    found = [
        (root, place)
        for root, place in places
        if place.is_dir() or place.is_symlink() or (root == MODELS and name == GUIDE)
    ]
    if not found:
        what = "adapter" if kind == "adapter" else "model" if kind else "model or adapter"
        raise ModelError(f"There is no {what} {name[:200]!r}.", "`nibble models` lists what there is.")
    if len(found) > 1:
        raise ModelError(f"Both a model and an adapter are called {name}.", "Say which: kind is model or adapter.")
    return found[0]


def report_file(name: str, home: Path) -> Path:
    """Where the report of a model is kept; see `nibble.quality.kept`."""
    return home / "reports" / f"{name}.json"


def drop_report(name: str, home: Path) -> None:
    """Forget what was measured of a model: it goes, or another takes its name.

    Raises:
        OSError: the file cannot be removed.
    """
    report_file(name, home).unlink(missing_ok=True)


def _uses(job: jobs.Job, folder: Path, home: Path) -> bool:
    """Whether a job reads a model or makes it."""
    wanted = folder.resolve()
    places = (place for path in _touched(job, home) if (place := _resolved(path)))
    return any(wanted in (place, *place.parents) for place in places)


def _touched(job: jobs.Job, home: Path) -> Iterator[Path]:
    """The folders and files of models that a job's spec names, and those that it makes."""
    root = home / MODELS
    said = {key: job.spec[key] for key in ("model", "against", "out", "name", "repo", "file") if job.spec.get(key)}
    said = {key: value.strip() for key, value in said.items() if isinstance(value, str)}
    source = _meant(said["model"], root) if "model" in said else None
    if source:
        yield source
    if "against" in said:
        yield _meant(said["against"], root)
    elif source and job.task == "evaluate":
        # A low-bit model is compared with the one that it was made from.
        with suppress(ModelError, OSError):
            made_from = str(publish.read_manifest(source).get("source"))
            if NAME.fullmatch(made_from):
                yield root / made_from
    if "repo" in said:
        came = _meant(said["repo"], root).name
        if "file" in said:
            org, between, _ = came.rpartition("__")
            came = f"{org}{between}{Path(said['file']).stem}"
        yield root / said.get("name", came)
    if source and job.task == "quantize":
        stem = said.get("out") or (source.stem if source.suffix == ".gguf" else source.name)
        yield from (root / f"{stem}-{name}" for name in (*_formats(job.spec.get("low_bit")), "picked"))
    if "out" in said:
        yield root / said["out"]


def _meant(value: str, root: Path) -> Path:
    """Where the model lies or will lie that a spec names: by its name, its id on a hub, its page there, or a path."""
    remote = REMOTE.fullmatch(value)
    if remote:
        return root / f"{remote[1]}__{remote[2]}"
    return root / value if NAME.fullmatch(value) else Path(value)


def _formats(low_bit: object) -> list[str]:
    """The formats that a spec names, by their own names; every one where it names none."""
    names = low_bit.split(",") if isinstance(low_bit, str) else low_bit
    if not names or not isinstance(names, list):
        return list(FORMATS)
    told = (name.strip().lower() for name in names if isinstance(name, str))
    return [ALIASES.get(name, name) for name in told]


def _resolved(path: Path) -> Path | None:
    try:
        return path.expanduser().resolve()
    except (OSError, ValueError, RuntimeError):
        return None


def disk_use(home: Path) -> DiskUse:
    """What home takes on its disk. Walks every file of it: some milliseconds for a hundred models."""
    sizes = dict.fromkeys((MODELS, ADAPTERS, "runs"), 0)
    unfinished = 0
    for kind in sizes:
        for path in (home / kind).iterdir() if (home / kind).is_dir() else ():
            size = 0 if path.is_symlink() else tree_bytes(path)
            if path.name.startswith(".") and kind != "runs":
                unfinished += size
            else:
                sizes[kind] += size
    there = next(folder for folder in (home, *home.resolve().parents) if folder.exists())
    return DiskUse(
        sizes[MODELS], sizes[ADAPTERS], sizes["runs"], unfinished=unfinished, free=shutil.disk_usage(there).free
    )


def tree_bytes(path: Path) -> int:
    """The bytes of a file or of all files in a folder; links are not followed, and what goes meanwhile counts none."""
    return sum(_sizes(path))


def _sizes(path: Path) -> Iterator[int]:
    waiting = [path]
    while waiting:
        here = waiting.pop()
        try:
            if here.is_dir() and not here.is_symlink():
                waiting += list(here.iterdir())
            else:
                yield os.lstat(here).st_size
        except OSError:
            continue
