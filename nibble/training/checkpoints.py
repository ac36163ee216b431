"""The checkpoints of a run: runs/<id>/checkpoints/checkpoint-<step>, each whole by its manifest or not one at all.

Promises that what a kill or a power cut left half written is never taken for a checkpoint. A checkpoint that is no
longer needed to go on from is thinned to its adapter, which comparisons read. Imports no torch. Knows nothing of what
the files mean.
"""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nibble import publish
from nibble.errors import ModelError

FOLDER = "checkpoints"
KIND = "checkpoint"
NAME = re.compile(r"checkpoint-([1-9][0-9]{0,8})")

STATE = ("state.safetensors", "state.json", "trainer_state.json")
"""What going on needs besides the adapter."""

RESUMABLE = 2
"""Of the newest checkpoints so many keep what going on needs."""


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint."""

    step: int
    folder: Path
    facts: dict[str, Any]
    """What its manifest says besides the files: `loss`, `eval_loss`, `threads`."""

    @property
    def resumable(self) -> bool:
        """Whether a run can go on from it."""
        return all(name in self.facts["files"] for name in STATE)


def place(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_folder / FOLDER / f"checkpoint-{step}"


def whole(run_folder: Path) -> list[Checkpoint]:
    """The checkpoints whose files are all there in their full size, by step; their contents are not read."""
    root = run_folder / FOLDER
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        match = NAME.fullmatch(folder.name)
        if match and (facts := _facts(folder, contents=False)):
            found.append(Checkpoint(int(match[1]), folder, facts))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def verify(folder: Path) -> bool:
    """Whether a checkpoint is whole to the last byte: every file has the size and sha256 of its manifest."""
    return _facts(folder, contents=True) is not None


def latest(run_folder: Path) -> Checkpoint | None:
    """The newest checkpoint that a run can go on from, read whole and compared with its manifest."""
    newest = reversed(whole(run_folder))
    return next((found for found in newest if found.resumable and verify(found.folder)), None)


def drop_broken(run_folder: Path) -> list[str]:
    """Remove what is no whole checkpoint, and what killed writers have left; the names of the former."""
    root = run_folder / FOLDER
    if not root.is_dir():
        return []
    publish.clean_all(root)
    broken = [folder for folder in sorted(root.iterdir()) if NAME.fullmatch(folder.name) and not verify(folder)]
    for folder in broken:
        shutil.rmtree(folder, ignore_errors=True)
    return [folder.name for folder in broken]


def thin(run_folder: Path) -> None:
    """Leave only the adapter in all but the newest checkpoints. What cannot be thinned stays as it is."""
    resumable = [found for found in whole(run_folder) if found.resumable]
    for old in resumable[:-RESUMABLE]:
        facts = {key: value for key, value in old.facts.items() if key != "files"}
        # No room for a copy is no reason to end the work.
        with suppress(OSError, ModelError), publish.publication(old.folder, facts) as fresh:
            for name in old.facts["files"]:
                if name not in STATE:
                    shutil.copyfile(old.folder / name, fresh / name)


def _facts(folder: Path, *, contents: bool) -> dict[str, Any] | None:
    """The manifest of a whole checkpoint; None where it is none."""
    try:
        facts = publish.read_manifest(folder)
        if facts.get("kind") != KIND or not facts.get("files"):
            return None
        publish.verify(folder, contents=contents)
    except (ModelError, OSError):
        return None
    return facts
