"""What happens inside the process that does the work: it locks, runs the task, keeps status.json, and ends its tree.

Promises that a last word is written whatever the task raises, that a full disk or a reader stalls nothing, and that no
process of the job outlives it. Knows nothing of who started it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

from nibble import tasks
from nibble.errors import JobError, NibbleError
from nibble.jobs import processes
from nibble.jobs.folder import LIVE, Run, State, Status, device_lock, read_json, read_run, read_status, write_json
from nibble.jobs.job import holder
from nibble.jobs.processes import Lock, Stopped
from nibble.jobs.progress import Meter

WRITE_S = 0.25
"""Progress is written down at most this often; a change of state and a note at once."""


class FileReport:
    """A task's report that keeps status.json and metrics.jsonl, and writes notes to the log."""

    def __init__(self, folder: Path, attempt: int, log: TextIO) -> None:
        self._folder = folder
        self._log = log
        self._mutex = threading.Lock()
        self._meter = Meter()
        self._began = time.monotonic()
        self._metrics = _line_file(folder / "metrics.jsonl")
        me = processes.identify(os.getpid())
        assert me is not None
        self._status = Status(
            attempt=attempt, pid=me.pid, ticks=me.ticks, boot=me.boot, oom_kills=processes.oom_kills()
        )
        self._news = threading.Event()
        threading.Thread(target=self._tell_news, daemon=True).start()

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self._folder

    def progress(self, done: float, total: float, unit: str = "", stage: str = "") -> None:
        """As `nibble.tasks.Report`."""
        self._meter.update(done, total, unit, stage)
        self._news.set()

    def metric(self, **numbers: float) -> None:
        """As `nibble.tasks.Report`; each row carries `t`, seconds since the work began. What is not finite is null."""
        row: dict[str, float | None] = {"t": round(time.monotonic() - self._began, 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        # A single write(2) at the end of the file: rows of several threads never mix.
        with contextlib.suppress(OSError):
            self._metrics.write((json.dumps(row, default=float) + "\n").encode())

    def note(self, text: str) -> None:
        """As `nibble.tasks.Report`."""
        line = " ".join(text.split())
        with contextlib.suppress(OSError):
            self._log.write(line + "\n")
            self._log.flush()
        self.tell(note=line)

    def _tell_news(self) -> None:
        """Write progress down, in a thread: no disk makes the task wait, and the last word before a silence is kept."""
        while self._status.state in LIVE:
            self._news.wait()
            self._news.clear()
            self.tell()
            time.sleep(WRITE_S)

    def begin(self) -> None:
        """The wait is over, if there was one."""
        self._began = time.monotonic()
        self.tell(state="running", started=time.time())

    def end(self, state: State, cause: str = "", result: Mapping[str, Any] | None = None) -> None:
        """The last word."""
        self.tell(state=state, cause=cause, ended=time.time(), result=dict(result) if result is not None else None)
        self._news.set()

    def tell(self, **changes: Any) -> None:
        """Write status.json with these fields changed. A disk that is full or gone is no reason to end the work."""
        with self._mutex:
            if self._status.state not in LIVE:
                return
            elapsed = time.monotonic() - self._began if self._status.started or "started" in changes else 0.0
            self._status = replace(self._status, progress=self._meter.reading(), elapsed_s=round(elapsed, 3), **changes)
            with contextlib.suppress(OSError):
                write_json(self._folder / "status.json", asdict(self._status))


def _line_file(path: Path) -> FileIO:
    """Open a file for appending lines, unbuffered; one that an earlier kill has cut within a line is ended first."""
    stream = path.open("a+b", buffering=0)
    size = stream.seek(0, os.SEEK_END)
    if size and os.pread(stream.fileno(), 1, size - 1) != b"\n":
        stream.write(b"\n")
    return stream


def work(folder: Path, lock_fd: int | None = None) -> int:
    """Do the work of a run folder in this process, which then has to end; return its exit code.

    Args:
        folder: home/runs/<id>, with run.yaml and the status that the starter wrote.
        lock_fd: descriptor on which the starter has locked run.lock; None locks it here.
    """
    lock = Lock(folder / "run.lock", lock_fd)
    if lock_fd is None and not lock.take():
        sys.stderr.write(f"Another process works in {folder}.\n")
        return 1
    lock.keep()
    os.environ[processes.JOB_VARIABLE] = str(folder)
    processes.prefer_as_victim()
    faulthandler.enable()
    status = read_status(folder)
    attempt = status.attempt if status else 1
    report = FileReport(folder, attempt, sys.stdout)
    report.tell()
    state, cause, result = _attempt(folder, attempt, report)
    processes.sweep(str(folder), processes.identify(os.getpid()))
    report.end(state, cause, result)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    return 0 if state == "done" else 1


def _attempt(folder: Path, attempt: int, report: FileReport) -> tuple[State, str, Mapping[str, Any] | None]:
    """State, cause and result; the border at which every error becomes a sentence."""
    try:
        with processes.stoppable():
            run = read_run(folder)
            if run.exclusive:
                take_device(folder.parents[1], run.exclusive, folder.name, lambda name: report.tell())
            report.begin()
            return "done", "", perform(run, report, resume=attempt > 1)
    except BaseException as error:  # noqa: BLE001 - the border of the job: nothing may end it without a word
        if isinstance(error, NibbleError):
            sys.stderr.write(f"{error}\n")
        elif not isinstance(error, Stopped):
            traceback.print_exc()
        return *last_word(error, folder, attempt), None


def last_word(error: BaseException, folder: Path, attempt: int) -> tuple[State, str]:
    """State and cause of an attempt that this ended."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped", "Stopped with Ctrl+C."
    if isinstance(error, Stopped):
        asked = read_json(folder / "stop.json").get("attempt") == attempt
        return ("stopped", "Stopped on request.") if asked else ("killed", "Ended from outside (SIGTERM).")
    return "failed", str(error) if isinstance(error, NibbleError) else sentence(error)


def perform(run: Run, report: tasks.Report, *, resume: bool) -> dict[str, Any]:
    """Run the task of a run and return its result as JSON will keep it.

    Raises:
        NibbleError: as the task does, or the result is none.
    """
    spec = run.spec | {"resume": True} if resume else run.spec
    result = tasks.load(run.task)(spec, report)
    try:
        kept = json.loads(json.dumps(result, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise JobError(f"The result of {run.task} cannot be kept as JSON: {error}.", "Report this.") from None
    if not isinstance(kept, dict):
        raise JobError(f"The result of {run.task} is no mapping.", "Report this.")
    return kept


def take_device(home: Path, exclusive: str, name: str, waits: Callable[[str], None]) -> Lock:
    """Hold a device for the rest of this process's life.

    Args:
        home: Nibble's home folder.
        exclusive: the device.
        name: what to call the holder, for those who wait.
        waits: called once with the present holder's name where there is one; then this waits in the kernel.
    """
    lock = Lock(device_lock(home, exclusive))
    if not lock.take():
        waits(holder(home, exclusive))
        lock.take(wait=True)
    lock.keep()
    os.ftruncate(lock.fd, 0)
    os.pwrite(lock.fd, name.encode(), 0)
    return lock


def sentence(error: BaseException) -> str:
    """An error that nobody foresaw, in one line of at most 300 characters."""
    if isinstance(error, MemoryError):
        return "Memory ran out (MemoryError)."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}." if error.filename else f"{error.strerror}."
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300].rstrip(": ")
