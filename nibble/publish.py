"""Putting a folder in place whole or not at all.

Promises that a reader finds the old folder or the new one, never a mix, whatever fails and whenever power goes: the new
one is written beside, every byte is synced, `nibble.json` names each file with its size and sha256 and is written last,
and one rename puts the folder in place. Imports no torch. Knows nothing of models.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from nibble.errors import ModelError

MANIFEST = "nibble.json"
MAX_MANIFEST_BYTES = 16 * 2**20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def publication(folder: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when the block ends without an exception.

    Args:
        folder: where the result is to stand; an earlier result there is replaced whole.
        facts: what `nibble.json` says besides the list of files; JSON values.

    Raises:
        ModelError: `folder` exists and is not an earlier result, or another save to it is under way.
        OSError: writing failed; `folder` is as it was.
    """
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        clean(folder)
        _refuse_foreign(folder)
        fresh = folder.parent / f".{folder.name}.tmp-{uuid.uuid4().hex}"
        fresh.mkdir()
        try:
            yield fresh
            _write_manifest(fresh, facts)
            _put(fresh, folder)
        finally:
            # After an exchange this name holds the old folder, after a failure the unfinished one.
            shutil.rmtree(fresh, ignore_errors=True)
            clean(folder)


def clean(folder: Path) -> None:
    """Remove what saves to `folder` that were killed have left beside it; call it only while no save is under way."""
    for aside in _beside(folder, "old"):
        if folder.exists():
            _discard(aside)
        else:
            aside.rename(folder)
    for left in _beside(folder, "tmp"):
        _discard(left)


def _beside(folder: Path, kind: str) -> list[Path]:
    """What saves and removals have put beside `folder`; never the lock or a folder of another, as m is of m.old-2."""
    ours = re.compile(rf"\.{re.escape(folder.name)}\.{kind}-[0-9a-f]{{32}}")
    found = [path for path in folder.parent.iterdir() if ours.fullmatch(path.name)]
    return [path for path in found if path.is_symlink() or path.is_dir()]


def _discard(path: Path) -> None:
    """Remove a folder, or a link without what it leads to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def clean_all(parent: Path) -> None:
    """Remove what killed saves have left anywhere in `parent`, as at a start; saves that are under way are let be."""
    for lock in parent.glob(".*.lock"):
        folder = parent / lock.name[1 : -len(".lock")]
        with suppress(ModelError, OSError), alone(folder):
            clean(folder)


def remove(folder: Path) -> None:
    """Take a folder away, as one to a reader: its name goes first, then what is in it.

    What a kill leaves of it goes with the next `clean`. A link is removed, and what it leads to is not.

    Raises:
        ModelError: a save to it is under way.
        OSError: its name cannot be taken away; it is as it was.
    """
    with alone(folder):
        aside = folder.parent / f".{folder.name}.tmp-{uuid.uuid4().hex}"
        folder.rename(aside)
        try:
            _sync(folder.parent)
        except OSError:
            aside.rename(folder)
            raise
        _discard(aside)


def read_manifest(folder: Path) -> dict[str, Any]:
    """`nibble.json` of a published folder; empty where there is none.

    Raises:
        ModelError: it is not a JSON object.
    """
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        sound = path.is_file() and path.stat().st_size <= MAX_MANIFEST_BYTES
        manifest = json.loads(path.read_text(encoding="utf-8")) if sound else None
    except (ValueError, RecursionError):
        manifest = None
    files = manifest.get("files", {}) if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(_is_entry(name, facts) for name, facts in files.items()):
        raise ModelError(f"{MANIFEST} in {folder.name} is broken.", "Quantize the model again.")
    return dict(manifest or {})


def _is_entry(name: str, facts: Any) -> bool:
    """Whether a manifest's line can be true: a file within the folder, with its size and hash."""
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    known = isinstance(facts, dict) and isinstance(facts.get("size"), int) and isinstance(facts.get("sha256"), str)
    return inside and known


def verify(folder: Path, *, pattern: str = "*", contents: bool = False) -> None:
    """Compare a published folder with its manifest: every file's size, and on request its sha256 too.

    Args:
        folder: as `publication` put it in place.
        pattern: names of the files to compare.
        contents: whether to read them whole.

    Raises:
        ModelError: the first file that is missing or differs.
    """
    for name, facts in read_manifest(folder).get("files", {}).items():
        path = folder / name
        if not fnmatch(name, pattern):
            continue
        if not path.is_file() or path.stat().st_size != facts["size"]:
            raise ModelError(f"{name} in {folder.name} is missing or cut short.", "Quantize the model again.")
        if contents and _sha256(path) != facts["sha256"]:
            raise ModelError(f"{name} in {folder.name} is damaged.", "Quantize the model again.")


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_dir() and ((folder / MANIFEST).exists() or not any(folder.iterdir())):
        return
    raise ModelError(
        f"{folder} exists and is not a model that Nibble has saved, so it is not replaced.",
        "Name another folder, or remove that one yourself.",
    )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the right to change what stands at `folder`; it ends with the process at the latest.

    Raises:
        ModelError: a save to it is under way.
    """
    lock = os.open(folder.parent / f".{folder.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ModelError(f"{folder.name} is being saved already.", "Wait until that is done.") from None
        yield
    finally:
        os.close(lock)


def _write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _sync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**facts, "files": files}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(manifest)
    for directory in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        _sync(directory)


def _put(fresh: Path, folder: Path) -> None:
    with ExitStack() as undo:
        if not folder.exists():
            fresh.rename(folder)
            undo.callback(folder.rename, fresh)
        elif _exchange(fresh, folder):
            undo.callback(_exchange, fresh, folder)
        else:
            # Only where the file system cannot exchange: for an instant there is no folder, never half of one. A kill
            # in that instant is mended by `clean`, which also removes the old folder.
            aside = folder.parent / f".{folder.name}.old-{uuid.uuid4().hex}"
            folder.rename(aside)
            undo.callback(aside.rename, folder)
            fresh.rename(folder)
            undo.callback(folder.rename, fresh)
        # What is not known to last has not been saved: the caller is told so, and finds what stood there before.
        _sync(folder.parent)
        undo.pop_all()


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (Linux renameat2); false where the system or file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(library, "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sync(path: Path) -> None:
    """Make the contents of a file, or the names in a directory, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
