"""What stands in a model's folder: ordinary files, no code, no links that lead astray.

A pipe or a device would block or never end when it is read, so nothing is opened before it was looked at here. Links
are what hubs' caches are made of: they may lead to files anywhere within the folder and in a cache's blobs, and to no
folder. Weights alone may lie on another disk: whatever such a link names, it is read as safetensors or GGUF and as
nothing else. Any other file is refused outside, since what is read as a tokenizer is copied into the models that are
made of this one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from nibble.errors import ModelError

MOST_ENTRIES = 20_000
CODE = (".py", ".pyc", ".pyd", ".so")
WEIGHTS = (".safetensors", ".gguf")


def check_entries(folder: Path) -> str:
    """Look at every entry of a folder and its subfolders; hidden folders, which no library looks into, are left out.

    Returns:
        The path of the first file with code, empty where there is none.

    Raises:
        ModelError: an entry that is neither file nor folder, a link to a folder or out; or far too many entries.
    """
    root = folder.resolve()
    code = ""
    for number, entry in enumerate(_entries(folder)):
        if number >= MOST_ENTRIES:
            raise ModelError(
                f"{folder.name} holds more than {MOST_ENTRIES:,} files.", "Name the folder of one model alone."
            )
        path = Path(entry.path)
        shown = path.relative_to(folder).as_posix()
        try:
            mode = entry.stat().st_mode
        except OSError:
            raise _refused(folder, shown, "is a link that leads nowhere") from None
        if entry.is_symlink() and not _may_lead(path.resolve(), root, path.name):
            raise _refused(folder, shown, "is a link that leads out of the folder")
        if entry.is_symlink() and stat.S_ISDIR(mode):
            # What it leads to may be hidden, and so not looked at.
            raise _refused(folder, shown, "is a link to a folder")
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise _refused(folder, shown, "is neither a file nor a folder")
        if entry.name.lower().endswith(CODE):
            code = min(code or shown, shown)
    return code


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    waiting = [str(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if entry.name.startswith("."):
                            continue
                        waiting.append(entry.path)
                    yield entry
        except OSError as error:
            raise ModelError(
                f"{error.filename} cannot be read: {error.strerror}.", "Check the folder's permissions."
            ) from None


def _may_lead(target: Path, root: Path, name: str) -> bool:
    in_cache = target.parent.name == "blobs" and (target.parent.parent / "snapshots").is_dir()
    return target.is_relative_to(root) or in_cache or name.endswith(WEIGHTS)


def _refused(folder: Path, shown: str, what: str) -> ModelError:
    return ModelError(f"{shown} in {folder.name} {what}.", "Get the model from its maker, or copy the file itself.")
