"""The contract of a task: long work that knows nothing of who asked for it or where it is shown.

A task is a module with `run(spec, report) -> dict`. `nibble.jobs` runs it detached or in the foreground; the task reads
its spec, tells its `Report` how far it is, and returns a result that JSON can hold, or raises NibbleError. Where the
spec says `resume: true` it goes on from what it left in `report.folder`. Knows no task by name; imports no torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from nibble.errors import NibbleError


class Report(Protocol):
    """What a task tells while it works. Every method returns at once, never raises, and may be called by any thread."""

    @property
    def folder(self) -> Path | None:
        """Where artefacts go, such as checkpoints; None in the foreground without one."""

    def progress(self, done: float, total: float, unit: str = "", stage: str = "") -> None:
        """Tell that `done` of `total` units of this stage are done. A total of 0 is unknown; the unit "B" is bytes."""

    def metric(self, **numbers: float) -> None:
        """Tell measured numbers, such as step=10, loss=1.2; each call is one row of metrics.jsonl."""

    def note(self, text: str) -> None:
        """Tell one line for a person; the log keeps it."""


Task = Callable[[Mapping[str, Any], Report], dict[str, Any]]

SHORT_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
"""A task of ours: a module of nibble.tasks. Every other name is the full dotted path of a module."""


def load(name: str) -> Task:
    """The `run` of a task: of nibble.tasks.<name>, or of the module that a name with a dot is the path of.

    Raises:
        NibbleError: there is no such module, or it has no `run`.
    """
    path = f"{__name__}.{name}" if SHORT_NAME.fullmatch(name) else name
    try:
        found = importlib.util.find_spec(path)
    except (ImportError, ValueError):
        found = None
    run = getattr(importlib.import_module(path), "run", None) if found else None
    if not callable(run):
        raise NibbleError(f"There is no task {name!r}.", "A task is a module of nibble.tasks that has `run`.")
    return run  # type: ignore[no-any-return]
