"""The same work in this very process, to its end, with one line of progress on a terminal: what the console does.

Promises that Ctrl+C ends it whole, and that a run which is kept lies in home/runs like any other: other programs see
it, can stop it, and can resume it. Knows nothing of tasks.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from nibble.errors import JobError, NibbleError
from nibble.jobs import processes
from nibble.jobs.control import make_folder, refuse_twin, starting, task_name
from nibble.jobs.folder import Run, Status, new_run
from nibble.jobs.processes import Stopped
from nibble.jobs.progress import Meter
from nibble.jobs.work import FileReport, last_word, perform, sentence, take_device

ERASE = "\x1b[K"
"""Terminals: erase the rest of the line."""
TERMINAL_S, FILE_S = 0.1, 10.0
"""A line is drawn anew at most this often on a terminal, and printed at most this often into a file."""


class LineReport:
    """A task's report that shows one line of progress; all goes on to a FileReport where the run is kept."""

    def __init__(self, stream: TextIO, kept: FileReport | None = None) -> None:
        self._stream, self._kept = stream, kept
        self._terminal = stream.isatty()
        self._meter = Meter()
        self._mutex = threading.Lock()
        self._shown = float("-inf")
        self._numbers = ""

    @property
    def folder(self) -> Path | None:
        """The run's folder, where it is kept."""
        return self._kept.folder if self._kept else None

    def progress(self, done: float, total: float, unit: str = "", stage: str = "") -> None:
        """As `nibble.tasks.Report`."""
        if self._kept:
            self._kept.progress(done, total, unit, stage)
        new_stage = self._meter.update(done, total, unit, stage)
        pause = TERMINAL_S if self._terminal else FILE_S
        if new_stage or time.monotonic() - self._shown >= pause:
            self._draw()

    def metric(self, **numbers: float) -> None:
        """As `nibble.tasks.Report`; the latest ones stand at the end of the line."""
        if self._kept:
            self._kept.metric(**numbers)
        self._numbers = " · ".join(f"{name} {value:.4g}" for name, value in numbers.items())

    def note(self, text: str) -> None:
        """As `nibble.tasks.Report`: a line of its own."""
        if self._kept:
            self._kept.note(text)
        self._write(" ".join(text.split()), lasting=True)

    def close(self) -> None:
        """Draw the last progress and leave the line."""
        if self._shown > float("-inf"):
            self._draw(lasting=True)

    def _draw(self, lasting: bool = False) -> None:
        self._shown = time.monotonic()
        self._write(" · ".join(part for part in (self._meter.reading().text(), self._numbers) if part), lasting)

    def _write(self, line: str, lasting: bool = False) -> None:
        """A line that the next one replaces on a terminal, or one that stays."""
        with self._mutex, contextlib.suppress(OSError):
            if not self._terminal:
                self._stream.write(line + "\n")
            elif lasting:
                self._stream.write(f"\r{line}{ERASE}\n")
            else:
                # A line that wraps could not be taken back.
                width = os.get_terminal_size(self._stream.fileno()).columns or 80
                self._stream.write(f"\r{line[: width - 1]}{ERASE}")
            self._stream.flush()


def run_foreground(
    task: str | ModuleType,
    spec: Mapping[str, Any],
    *,
    home: Path,
    exclusive: str | None = None,
    keep: bool = False,
    stream: TextIO | None = None,
) -> dict[str, Any]:
    """Do the work in this process and return its result.

    Args:
        task: as `nibble.jobs.start`.
        spec: as there.
        home: Nibble's home folder.
        exclusive: a device; this waits, and says so, while a job has it.
        keep: whether to make a folder in home/runs for it, which the task then gets for its artefacts.
        stream: where progress is shown; None is standard error.

    Raises:
        NibbleError: as the task does; an error that the task did not foresee is its `__cause__`.
        KeyboardInterrupt: Ctrl+C, after every process that the task had started is gone.
    """
    run = new_run(task_name(task), spec, exclusive)
    with contextlib.ExitStack() as held:
        kept = _kept_report(run, home, held) if keep else None
        report = LineReport(stream or sys.stderr, kept)
        held.callback(report.close)
        held.enter_context(_marked(str(kept.folder) if kept else f"foreground-{os.getpid()}-{time.monotonic_ns()}"))
        try:
            with processes.stoppable() if _in_main_thread() else contextlib.nullcontext():
                if exclusive:
                    name = kept.folder.name if kept else f"work in a console (pid {os.getpid()})"
                    say = lambda other: report.note(f"Waits for {exclusive}, which {other} holds.")  # noqa: E731
                    held.callback(take_device(home, exclusive, name, say).close)
                if kept:
                    kept.begin()
                result = perform(run, report, resume=False)
        except BaseException as error:
            if kept:
                if not isinstance(error, (NibbleError, KeyboardInterrupt, Stopped)):
                    kept.note(traceback.format_exc())
                kept.end(*last_word(error, kept.folder, 1))
            hint = f"`nibble jobs resume {kept.folder.name}` goes on with it." if kept else "Start it anew."
            if isinstance(error, Stopped):
                raise JobError("The work was stopped.", hint) from None
            if isinstance(error, (NibbleError, KeyboardInterrupt, SystemExit, GeneratorExit)):
                raise
            raise JobError(f"{run.task} failed. {sentence(error)}", hint) from error
        if kept:
            kept.end("done", result=result)
        return result


def _in_main_thread() -> bool:
    """Python lets only the main thread set what a signal does."""
    return threading.current_thread() is threading.main_thread()


def _kept_report(run: Run, home: Path, held: contextlib.ExitStack) -> FileReport:
    """The report of a run that has a folder; its lock and log are let go with `held`."""
    with starting(home):
        refuse_twin(run, home)
        folder, lock = make_folder(run, home)
    held.callback(lock.close)
    lock.keep()
    log = (folder / "log.txt").open("a", encoding="utf-8", errors="backslashreplace")
    report = FileReport(folder, Status().attempt, held.enter_context(log))
    report.tell()
    return report


@contextlib.contextmanager
def _marked(mark: str) -> Iterator[None]:
    """Within it every process that is started carries the mark, and none of them outlives it."""
    before = os.environ.get(processes.JOB_VARIABLE)
    os.environ[processes.JOB_VARIABLE] = mark
    try:
        yield
    finally:
        if before is None:
            del os.environ[processes.JOB_VARIABLE]
        else:
            os.environ[processes.JOB_VARIABLE] = before
        processes.sweep(mark, leader=None)
