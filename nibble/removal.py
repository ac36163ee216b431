"""How a model or an adapter goes.

Promises that nothing is deleted which a job reads or makes, which is loaded, or which ships with Nibble; and that of a
link only the link goes. Knows nothing of what a folder holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from nibble import jobs, publish
from nibble.disk import tree_bytes
from nibble.errors import ModelError, NibbleError
from nibble.library import ADAPTERS, GUIDE, MODELS, NAME, REMOTE, Kind, drop_report
from nibble.lowbit.formats import ALIASES, FORMATS


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


def _uses(job: jobs.Job, folder: Path, home: Path) -> bool:
    """Whether a job reads a model or makes it."""
    wanted = folder.resolve()
    places = (place for path in _touched(job, home) if (place := _resolved(path)))
    return any(wanted in (place, *place.parents) for place in places)


def _touched(job: jobs.Job, home: Path) -> Iterator[Path]:
    """The folders and files of models and adapters that a job's spec names, and those that it makes."""
    root = home / MODELS
    yield from _worn(job, home)
    said = {key: job.spec[key] for key in ("model", "against", "out", "name", "repo", "file") if job.spec.get(key)}
    said = {key: value.strip() for key, value in said.items() if isinstance(value, str)}
    source = _meant(said["model"], root) if "model" in said else None
    if source:
        yield source
    if "against" in said:
        yield _meant(said["against"], root)
    elif source and job.task == "evaluate":
        # A low-bit model is compared with the one that it was made from.
        yield from _made_from(source, root)
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
        yield (home / ADAPTERS if job.task == "finetune" else root) / said["out"]


def _worn(job: jobs.Job, home: Path) -> Iterator[Path]:
    """The adapter that a job merges or compares, its base, and the model that the base was made from."""
    root, name = home / MODELS, job.spec.get("adapter")
    if isinstance(name, str) and NAME.fullmatch(name.strip()):
        folder = home / ADAPTERS / name.strip()
        yield folder
        base = _manifest(folder).get("base")
        if isinstance(base, dict) and base.get("name"):
            lies = _meant(str(base["name"]), root)
            yield lies
            yield from _made_from(lies, root)
    run = job.spec.get("run")
    if job.task == "compare" and isinstance(run, str):
        with suppress(NibbleError):
            yield _meant(str(jobs.find(run, home).spec.get("model")), root)


def _made_from(folder: Path, root: Path) -> Iterator[Path]:
    source = str(_manifest(folder).get("source") or "")
    if NAME.fullmatch(source):
        yield root / source


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return publish.read_manifest(folder)
    except (ModelError, OSError):
        return {}


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
