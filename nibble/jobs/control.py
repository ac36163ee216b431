"""Start, find, stop and resume jobs. Any number of programs may do so at once, and each may be killed at any moment.

Promises that equal work is started once however often and from wherever it is asked for, that a job is its own session
and needs nothing of its starter, and that nothing is remembered here between two calls. Knows nothing of tasks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from nibble.errors import JobError
from nibble.jobs import processes
from nibble.jobs.folder import (
    JOB_ID,
    LIVE,
    Run,
    Status,
    device_lock,
    locks_folder,
    new_id,
    new_run,
    read_status,
    runs_folder,
    write_json,
    write_run,
)
from nibble.jobs.job import Job, holder, read
from nibble.jobs.processes import Lock
from nibble.tasks import SHORT_NAME

PROJECT = Path(__file__).parents[2]
GRACE_S = 5.0
"""How long a job that is asked to stop may save before it is killed."""


def start(
    task: str | ModuleType, spec: Mapping[str, Any], *, home: Path, exclusive: str | None = None, queue: bool = True
) -> Job:
    """Start work in a detached process and return at once.

    Args:
        task: name of a module of nibble.tasks; or a module with `run`, which only a Python caller can have.
        spec: what the task reads: text, numbers, lists, mappings; no secrets.
        home: Nibble's home folder.
        exclusive: a device; of the jobs that name it one works and the others wait.
        queue: whether to wait for the device; False refuses where it is taken.

    Raises:
        JobError: no such task, equal work already lives, the device is taken, or the spec cannot be kept.
    """
    run = new_run(task_name(task), spec, exclusive)
    with starting(home):
        refuse_twin(run, home)
        if exclusive and not queue:
            refuse_busy(exclusive, home)
        folder, lock = make_folder(run, home)
        with lock:
            _spawn(folder, lock, Status())
    return read(folder)


def task_name(task: str | ModuleType) -> str:
    """The name that run.yaml gets. Text is never a module's path: an endpoint could be made to pass one on.

    Raises:
        JobError: not the name of a task.
    """
    if isinstance(task, ModuleType):
        return task.__name__.removeprefix("nibble.tasks.")
    if not SHORT_NAME.fullmatch(task):
        raise JobError(f"{task!r} is not the name of a task.", "Name a module of nibble.tasks.")
    return task


@contextlib.contextmanager
def starting(home: Path) -> Iterator[None]:
    """Within it no other program starts a job. Folders that a killed starter left half made are gone then."""
    with Lock(locks_folder(home) / "start") as lock:
        lock.take(wait=True)
        for leftover in runs_folder(home).glob(".new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def refuse_twin(run: Run, home: Path) -> None:
    """Refuse work that is already under way, as a second click asks for it.

    Raises:
        JobError: a live job has the same task and spec.
    """
    for job in live_jobs(home):
        if (job.task, job.spec) == (run.task, run.spec):
            raise JobError(f"This very work is already {job.state}: {job.id}.", "Wait for its end, or stop it.")


def refuse_busy(exclusive: str, home: Path) -> None:
    """Refuse a device that work in a console holds, or that a live job holds or waits for.

    Raises:
        JobError: it is taken; by whom.
    """
    names = [job.id for job in live_jobs(home) if job.exclusive == exclusive]
    if processes.is_held(device_lock(home, exclusive)):
        names.insert(0, holder(home, exclusive))
    if names:
        raise JobError(f"{exclusive} is taken by {names[0]}.", "Wait for its end, or stop it.")


def make_folder(run: Run, home: Path) -> tuple[Path, Lock]:
    """A run's folder, whole from the first moment it is seen, and its lock, held.

    Raises:
        JobError: it cannot be written.
    """
    root, name = runs_folder(home), new_id(run.task)
    while (root / name).exists():
        name = new_id(run.task)
    beside = root / f".new-{name}"
    try:
        beside.mkdir(parents=True)
        write_run(beside, run)
        write_json(beside / "status.json", asdict(Status()))
        lock = Lock(beside / "run.lock")
        lock.take()
        beside.rename(root / name)
    except OSError as error:
        raise JobError(f"{root} cannot be written: {error.strerror}.", "Make room, or check its rights.") from None
    return root / name, lock


def _spawn(folder: Path, lock: Lock, status: Status) -> None:
    """Start the process of a run and hand it the lock, so that no moment passes in which nobody holds it."""
    command = [sys.executable, "-m", "nibble.tasks", "run", str(folder), "--lock", str(lock.fd)]
    environment = os.environ | {
        processes.JOB_VARIABLE: str(folder),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8:backslashreplace",
    }
    try:
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=PROJECT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, pass_fds=(lock.fd,),
            )  # fmt: skip
    except OSError as error:
        cause = f"No process could be started: {error.strerror}."
        write_json(folder / "status.json", asdict(Status("failed", status.attempt, cause)))
        raise JobError(cause, "Free memory or close other programs, then resume the job.") from None
    threading.Thread(target=_reap, args=(process, folder, status.attempt), daemon=True).start()


def _reap(process: subprocess.Popen[bytes], folder: Path, attempt: int) -> None:
    """Wait for a child's end, as a parent must, and write down how it ended: only a parent is told."""
    code = process.wait()
    if code:
        with contextlib.suppress(OSError):
            write_json(folder / "exit.json", {"attempt": attempt, "code": code})


def list_jobs(home: Path, limit: int | None = None, tasks: Collection[str] = ()) -> list[Job]:
    """The runs, newest first. Folders that are no runs are passed over; a broken run says what is wrong with it.

    Args:
        home: Nibble's home folder.
        limit: only so many of the newest; reading one takes about a millisecond.
        tasks: only those of these tasks; none is all.
    """
    # An id tells the task: of what is not asked for nothing is read.
    named = (folder for folder in _folders(home) if not tasks or folder.name.split("-")[2] in tasks)
    jobs = [read(folder) for folder in islice(named, limit)]
    return sorted(jobs, key=lambda job: (job.created, job.id), reverse=True)


def live_jobs(home: Path) -> list[Job]:
    """The runs that wait or work. Quick, however many have ended."""
    statuses = ((folder, read_status(folder)) for folder in _folders(home))
    jobs = (read(folder) for folder, status in statuses if status is None or status.state in LIVE)
    return [job for job in jobs if job.live]


def _folders(home: Path) -> list[Path]:
    """Every run's folder, latest id first."""
    root = runs_folder(home)
    found = (path for path in root.iterdir() if JOB_ID.fullmatch(path.name)) if root.is_dir() else iter(())
    return sorted((path for path in found if path.is_dir()), key=lambda path: path.name, reverse=True)


def find(job_id: str, home: Path) -> Job:
    """The job of this id.

    Raises:
        JobError: there is none.
    """
    folder = runs_folder(home) / job_id if JOB_ID.fullmatch(job_id) else None
    if folder is None or not folder.is_dir():
        raise JobError(f"There is no job {job_id!r}.", "The list of jobs (`nibble jobs`) shows their ids.")
    return read(folder)


def stop(job_id: str, home: Path, grace_s: float = GRACE_S) -> Job:
    """Stop a job and every process that it has started; return once they are gone, within ten seconds.

    The task is asked first (SIGTERM) and has `grace_s` seconds to save; then its whole tree is killed. A job that has
    ended is left as it is, but for processes that have outlived it.

    Raises:
        JobError: there is no such job, or a process could not be ended.
    """
    job = find(job_id, home)
    mark, deadline = str(job.folder), time.monotonic() + grace_s
    remembered = set()
    if job.live:
        write_json(job.folder / "stop.json", {"attempt": job.status.attempt})
        # In the first tenth of a second only the environment tells which process it is.
        leader = job.status.identity if job.status.pid else None
        remembered = processes.tree(mark, leader)
        asked = {process for process in remembered if leader is None or process.pid == leader.pid}
        for process in asked:
            with contextlib.suppress(processes.psutil.Error):
                process.terminate()
        while find(job_id, home).live and time.monotonic() < deadline:
            time.sleep(0.05)
    processes.kill(remembered)
    if not processes.sweep(mark, job.status.identity) or find(job_id, home).live:
        raise JobError(f"A process of the job {job_id} could not be ended.", "Restart the machine if it stays.")
    return find(job_id, home)


def resume(job_id: str, home: Path) -> Job:
    """Start a job that has failed, was stopped or was killed again, in its folder, with `resume: true` in its spec.

    Raises:
        JobError: there is no such job, or it waits, runs or is done.
    """
    with starting(home):
        job = find(job_id, home)
        if job.live or job.state == "done":
            raise JobError(f"The job {job_id} is {job.state}.", "Only one that ended before its time can be resumed.")
        if not job.task:
            raise JobError(f"The job {job_id} cannot be resumed. {job.cause}", "Start the work anew.")
        refuse_twin(Run(job.task, job.spec, job.exclusive, job.created), home)
        with Lock(job.folder / "run.lock") as lock:
            end = time.monotonic() + 5
            # The last attempt may still be on its way out, or a reader may look at the lock.
            while not lock.take():
                if time.monotonic() > end:
                    raise JobError(f"A process still works on the job {job_id}.", "Stop it first.")
                time.sleep(0.02)
            for word in ("stop.json", "exit.json"):
                (job.folder / word).unlink(missing_ok=True)
            status = Status(attempt=job.status.attempt + 1)
            write_json(job.folder / "status.json", asdict(status))
            _spawn(job.folder, lock, status)
    return read(job.folder)
