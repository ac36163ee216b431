"""Where a data set's name leads: what ships with Nibble, uploads kept in home/data, what came from a hub, and paths.

    home/data/<name>.<ending>    an upload
    home/data/<org>__<name>/     a data set of a hub: its files and `nibble.json`, put there by `nibble.hub`

Promises that an upload is kept whole or not at all, that no name leads out of home, and that uploads fill neither the
disk nor more than `QUOTA_BYTES`. Knows nothing of what is in the files, and fetches nothing.
"""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import BinaryIO, Literal

from nibble import library, publish
from nibble.data.read import DATASET, SUFFIXES, open_source
from nibble.data.shipped import FOLDER, SHIPPED
from nibble.disk import tree_bytes
from nibble.errors import DataError, ModelError

DATA = "data"
"""The folder in home."""

QUOTA_BYTES = 32 * 2**30
"""All uploads together."""

SPARE_BYTES = 2**28
"""Left free on the disk."""

CHUNK = 2**22

HUB_ID = re.compile(r"([A-Za-z0-9_][\w.-]{0,95})/([A-Za-z0-9_][\w.-]{0,95})", re.ASCII)
"""A data set on a hub."""


class NotHere(DataError):
    """A data set of a hub that was not fetched yet."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"The data set {name} is not here yet.", f"Fetch it first: python -m nibble download {name} --dataset"
        )
        self.name = name


Kind = Literal["shipped", "upload", "hub"]


@dataclass(frozen=True)
class Entry:
    """One data set that is here."""

    name: str
    """What `find` and a recipe call it."""
    kind: Kind
    path: Path
    """A file; of a hub's data set its folder, which `nibble.data.open_source` reads as one."""
    size_bytes: int
    note: str = ""
    """What it holds, or where it comes from."""


def find(name: str, home: Path, *, paths: bool = False) -> Path:
    """The file, or the folder of a hub's data set, that a name leads to.

    Args:
        name: one of `SHIPPED`, an upload's name, `org/name` on a hub or, where `paths`, any file. Endpoints and the
            page pass names only.
        home: Nibble's home folder.
        paths: whether a path is accepted.

    Raises:
        NotHere: it is one of a hub, and was not fetched; the hint says how.
        DataError: nothing of that name.
    """
    if name in SHIPPED:
        return FOLDER / f"{name}.jsonl"
    kept = _kept(name, home)
    if kept is not None:
        return kept
    on_hub = is_on_hub(name)
    if on_hub:
        folder = hub_folder(name, home)
        if folder.is_dir():
            return folder
    if paths and (not on_hub or _exists(name)):
        # Whether it can be read is said by `open_source`, with all that may be wrong with it.
        return Path(name).expanduser()
    if on_hub:
        raise NotHere(name)
    known = ", ".join(names(home))
    raise DataError(
        f"There is no data set {name[:200]!r}.", f"Here: {known}; or upload a file, or name org/name on a hub."
    )


def names(home: Path) -> list[str]:
    """What the data sets that are here are called, in the order of `entries`."""
    return [entry.name for entry in entries(home)]


def entries(home: Path) -> list[Entry]:
    """Every data set that is here: the shipped ones, then uploads and those of hubs by name."""
    shipped = [_entry(name, "shipped", FOLDER / f"{name}.jsonl", prose) for name, prose in SHIPPED.items()]
    return [*shipped, *sorted(_uploads(home), key=lambda entry: entry.name), *_from_hubs(home)]


def keep(upload: Path, home: Path, name: str = "") -> str:
    """Keep a file that was uploaded. Under a name that is given, one that stands there is replaced whole.

    Args:
        upload: the file, which is only read. Its ending says what it is.
        home: Nibble's home folder.
        name: what to call it; empty is made of the file's own name, and leaves what has that name in its place.

    Returns:
        The name.

    Raises:
        DataError: it is no data file, its name cannot be one, or there is no room.
    """
    called = name or _free_name(upload, home / DATA)
    if not library.NAME.fullmatch(called) or called in SHIPPED:
        raise DataError(
            f"{called[:200]!r} cannot be the name of a data set.",
            f"Use letters, digits, dots, dashes and underscores, up to 128; not {' or '.join(SHIPPED)}.",
        )
    source = open_source(upload)
    folder = home / DATA
    target = folder / f"{called}{source.path.suffix.lower()}"
    fresh = folder / f".{target.name}.tmp-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        room = _room(folder, called)
        with upload.open("rb") as stream:
            _copy(stream, fresh, room, upload.name)
        fresh.replace(target)
        for other in _files(folder):
            if other.stem == called and other != target:
                other.unlink()
        _sync(folder)
    except OSError as error:
        raise DataError(
            f"{upload.name} could not be kept in {folder}: {error.strerror}.", "Free some space, or set home elsewhere."
        ) from None
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
    return called


def _free_name(upload: Path, folder: Path) -> str:
    """The file's own name, with a number where something else has it: what was trained on it needs that as it is."""
    made = made_name(upload)
    for called in chain([made], (f"{made}-{number}" for number in count(2))):
        there = [path for path in _files(folder) if path.stem == called]
        if called not in SHIPPED and all(filecmp.cmp(path, upload, shallow=False) for path in there):
            return called
    raise AssertionError("there are always more numbers")


def delete(name: str, home: Path) -> int:
    """Take an upload, or a hub's data set, off the disk; the bytes that were freed.

    Raises:
        DataError: nothing of that name, or it is part of Nibble.
    """
    if name in SHIPPED:
        raise DataError(f"{name} is part of Nibble and is not deleted.", "Delete another data set.")
    path = _kept(name, home)
    if path is None and HUB_ID.fullmatch(name):
        path = hub_folder(name, home)
    if path is None or not path.exists():
        raise DataError(f"There is no data set {name[:200]!r}.", "Reload the list.")
    size = tree_bytes(path)
    try:
        if path.is_dir():
            publish.remove(path)
        else:
            path.unlink()
    except ModelError as error:
        raise DataError(error.message, error.hint) from None
    except OSError as error:
        raise DataError(f"{name} cannot be deleted: {error.strerror}.", "Check the permissions of home.") from None
    return size


def hub_folder(name: str, home: Path) -> Path:
    """Where a hub's data set `org/name` lies, or will lie."""
    return home / DATA / name.replace("/", "__", 1)


def made_name(upload: Path) -> str:
    """A name made of a file's own."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", upload.stem).strip(".-_")[:120] or "upload"


def _kept(name: str, home: Path) -> Path | None:
    """The upload of a name."""
    if not library.NAME.fullmatch(name):
        return None
    found = (home / DATA / f"{name}{suffix}" for suffix in SUFFIXES)
    return next((path for path in found if path.is_file()), None)


def _files(folder: Path) -> Iterator[Path]:
    """The uploads in home/data."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in SUFFIXES and library.NAME.fullmatch(path.stem) and path.is_file():
            yield path


def _uploads(home: Path) -> Iterator[Entry]:
    for path in _files(home / DATA):
        yield _entry(path.stem, "upload", path, path.name)


def _from_hubs(home: Path) -> Iterator[Entry]:
    folder = home / DATA
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(".") or not path.is_dir():
            continue
        with suppress(ModelError, OSError):
            facts = publish.read_manifest(path)
            name = str(facts.get("source"))
            if facts.get("kind") == DATASET and HUB_ID.fullmatch(name) and hub_folder(name, home) == path:
                yield _entry(name, "hub", path, str(facts.get("hub", "")))


def _entry(name: str, kind: Kind, path: Path, note: str) -> Entry:
    return Entry(name, kind, path, tree_bytes(path), note)


def is_on_hub(name: str) -> bool:
    """Whether a name can be that of a data set on a hub, and is not meant to be a file."""
    return bool(HUB_ID.fullmatch(name)) and not name.endswith(tuple(SUFFIXES))


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def _room(folder: Path, called: str) -> int:
    """Bytes that an upload of this name may have."""
    others = sum(path.stat().st_size for path in _files(folder) if path.stem != called)
    return max(0, min(QUOTA_BYTES - others, shutil.disk_usage(folder).free - SPARE_BYTES))


def _copy(stream: BinaryIO, fresh: Path, room: int, name: str) -> None:
    """Write a copy that lasts.

    Raises:
        DataError: it is larger than the room that there is.
    """
    with fresh.open("xb") as copy:
        written = 0
        while piece := stream.read(CHUNK):
            written += len(piece)
            if written > room:
                raise DataError(
                    f"There is no room for {name}: uploads may take {room / 1e9:.1f} GB more.",
                    "Delete data sets that are no longer needed, or start Nibble on the console with the file's path.",
                )
            copy.write(piece)
        copy.flush()
        os.fsync(copy.fileno())


def _clean(folder: Path) -> None:
    """Remove what uploads that were killed have left; those under way are younger."""
    for left in folder.glob(".*.tmp-*"):
        if re.fullmatch(r"\..+\.tmp-[0-9a-f]{32}", left.name) and left.is_file() and _old(left):
            left.unlink(missing_ok=True)


def _old(path: Path) -> bool:
    """Whether a file was last written an hour ago or earlier, by the clock of its own disk."""
    marker = path.parent / f".clock.tmp-{uuid.uuid4().hex}"
    marker.touch()
    try:
        return marker.stat().st_mtime - path.stat().st_mtime > 3600
    finally:
        marker.unlink()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
