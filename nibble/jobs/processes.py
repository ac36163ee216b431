"""Processes and locks: whether the process that was started is still that one, its whole tree, and who holds what.

Promises that a process is recognised by pid *and* start time in ticks since boot, which no change of the clock moves,
and that nothing outside a job's own tree is ever signalled. Linux. Knows nothing of run folders.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from nibble.errors import JobError

JOB_VARIABLE = "NIBBLE_JOB"
"""Environment variable that every process of a job inherits, also one that leaves the session: its run folder."""

FORCED_AFTER_S = 8
"""A job that has been asked to stop and is stuck in a library's code ends itself after this long."""

OOM_FILES = (
    "/proc/vmstat",
    "/sys/fs/cgroup{unified}/memory.events",
    "/sys/fs/cgroup/memory{memory}/memory.oom_control",
    "/sys/fs/cgroup/memory.events",
    "/sys/fs/cgroup/memory/memory.oom_control",
)
"""Where the kernel counts out-of-memory kills (a line `oom_kill N`): of the machine, of control groups 2 and 1."""


@dataclass(frozen=True)
class Identity:
    """One process, for ever: no later process equals it."""

    pid: int
    ticks: int
    """Start time in clock ticks since boot, field 22 of /proc/PID/stat (proc(5))."""
    boot: str
    """The kernel's random id of this boot."""

    @property
    def alive(self) -> bool:
        """Whether this very process still runs; one that has ended and only waits for its parent does not."""
        return self.pid > 0 and identify(self.pid) == self


def identify(pid: int) -> Identity | None:
    """The process that has this pid now; None where there is none, or only a zombie."""
    try:
        # The second field is the program's name in parentheses, which may itself hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else Identity(pid, int(fields[19]), boot_id())


def boot_id() -> str:
    """The kernel's random id of this boot; empty where it gives none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def tree(mark: str, leader: Identity | None) -> set[psutil.Process]:
    """Every living process of a job but this one.

    Args:
        mark: value of NIBBLE_JOB in their environment.
        leader: the job's first process. While it lives its descendants, and its session where it leads one, count too:
            they may have emptied their environment.
    """
    found: set[psutil.Process] = set()
    session = None
    if leader is not None and leader.alive:
        with contextlib.suppress(psutil.Error):
            first = psutil.Process(leader.pid)
            found |= {first, *first.children(recursive=True)}
        session = leader.pid
    for process in psutil.process_iter():
        # AccessDenied and NoSuchProcess: not ours, or gone.
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session or process.environ().get(JOB_VARIABLE) == mark:
                found.add(process)
    return {process for process in found if process.pid != os.getpid() and identify(process.pid)}


def kill(processes: set[psutil.Process]) -> None:
    """SIGKILL each; psutil compares start times first, so that a pid taken anew is spared."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def sweep(mark: str, leader: Identity | None, seconds: float = 3.0) -> bool:
    """SIGKILL a job's tree, but this process, again and again until it is empty; whether it is."""
    end = time.monotonic() + seconds
    known = tree(mark, leader)
    while known:
        kill(known)
        time.sleep(0.02)
        known = {process for process in known if identify(process.pid) and process.is_running()} | tree(mark, leader)
        if time.monotonic() > end:
            return not known
    return True


class Stopped(BaseException):
    """Raised in the main thread of a job that was asked to stop. No `except Exception` of a library swallows it."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within it SIGTERM raises Stopped, once, so that a task can still save; the kernel ends what does not listen."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(FORCED_AFTER_S)
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.alarm(0)


class Lock:
    """An flock(2) on a file. The kernel frees it when the last process that keeps it ends, however it ends."""

    def __init__(self, path: Path, fd: int | None = None) -> None:
        """Open the file, or go on with the descriptor on which another process has locked it.

        Raises:
            JobError: the file cannot be made, or the file system has no locks.
        """
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) if fd is None else fd
        except OSError as error:
            hint = "Check the folder that `home` names."
            raise JobError(f"{path} cannot be opened: {error.strerror}.", hint) from None

    def take(self, *, wait: bool = False, shared: bool = False) -> bool:
        """Lock it, after waiting for whoever holds it where `wait`; whether it is ours now.

        Raises:
            JobError: the file system has no locks.
        """
        try:
            fcntl.flock(self.fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError as error:
            raise JobError(
                f"{self.path} cannot be locked: {error.strerror}.", "Let `home` name a folder on a local disk."
            ) from None
        return True

    def keep(self) -> None:
        """Hold it for the rest of this process's life, and let no child of it, forked or executed, hold it longer."""
        os.set_inheritable(self.fd, False)
        os.register_at_fork(after_in_child=self.close)

    def close(self) -> None:
        """Let go."""
        # The number is forgotten first: it may soon be another file's.
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def is_held(path: Path) -> bool:
    """Whether a process holds this lock exclusively. Never waits and never makes the file."""
    if not path.exists():
        return False
    with Lock(path) as lock:
        return not lock.take(shared=True)


def oom_kills() -> dict[str, int]:
    """File -> out-of-memory kills that the kernel has counted there, for each file that can be read."""
    groups = {"unified": "", "memory": ""}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
            _, kinds, path = line.split(":", 2)
            for kind in (kinds or "unified").split(","):
                groups[kind] = path.rstrip("/")
    counts = {}
    for template in OOM_FILES:
        name = template.format(**groups)
        with contextlib.suppress(OSError):
            for line in Path(name).read_text(encoding="ascii").splitlines():
                if line.startswith("oom_kill "):
                    counts[name] = int(line.split()[1])
    return counts


def prefer_as_victim() -> None:
    """Let the kernel end this process before the page's when memory runs out; a process may always raise its score."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")
