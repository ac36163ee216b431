"""A job as it stands now: what state follows from its files and from the process that they name.

Promises that a state is computed from files, pid and the process's start time, and never from what some server
remembers; that a torn file is told and does not raise; and that a reader can stall nothing. Knows nothing of tasks.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nibble.errors import NibbleError
from nibble.jobs import processes
from nibble.jobs.folder import FINAL, LIVE, Run, State, Status, device_lock, read_json, read_run, read_status, tail
from nibble.jobs.progress import Progress

TAIL_BYTES = 200_000
METRICS_BYTES = 8_000_000
CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Terminal sequences and control characters: a log is shown, never obeyed."""

CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE", "SIGTRAP", "SIGSYS")


@dataclass(frozen=True)
class Job:
    """A run as it stands now."""

    id: str
    folder: Path
    task: str
    spec: dict[str, Any]
    exclusive: str | None
    created: float
    state: State
    cause: str
    """Why it failed, was killed or waits, in a sentence; else empty."""
    status: Status

    @property
    def live(self) -> bool:
        """Whether it waits or runs."""
        return self.state in LIVE

    @property
    def progress(self) -> Progress:
        """How far it is, or was when it ended."""
        return self.status.progress

    def log(self, limit: int = TAIL_BYTES) -> str:
        """The end of log.txt as plain text: at most `limit` bytes of it, whole lines, without terminal sequences."""
        lines = tail(self.folder / "log.txt", min(limit, TAIL_BYTES)).split("\n")
        # A progress bar rewrites its line; what it showed last is enough.
        return CONTROL.sub("", "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines))

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, the latest 8 MB of them; one that was cut short is left out."""
        rows = []
        for line in tail(self.folder / "metrics.jsonl", METRICS_BYTES).splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Everything but the log and the metrics, for JSON; of a job that went wrong, the log's last lines too."""
        lines = self.log(4_000).rstrip().splitlines()[-5:] if self.state in ("failed", "killed") else []
        progress = asdict(self.progress) | {"text": self.progress.text()}
        own = {"id": self.id, "task": self.task, "state": self.state, "cause": self.cause, "folder": str(self.folder)}
        status = asdict(self.status)
        told = {key: status[key] for key in ("attempt", "pid", "started", "ended", "elapsed_s", "note", "result")}
        rest = {"exclusive": self.exclusive, "created": self.created, "spec": self.spec, "log_end": lines}
        return own | told | {"progress": progress} | rest


def read(folder: Path) -> Job:
    """A run as it stands now; one whose run.yaml cannot be read is failed, and says so."""
    try:
        run, broken = read_run(folder), ""
    except NibbleError as error:
        run, broken = Run("", {}, None, folder.stat().st_mtime if folder.exists() else 0.0), str(error)
    state, cause, status = _judge(folder)
    if broken and state not in LIVE:
        state, cause = "failed", broken
    if state == "waiting" and run.exclusive and status.pid:
        cause = f"Waits for {run.exclusive}, which {holder(folder.parents[1], run.exclusive)} holds."
    return Job(folder.name, folder, run.task, run.spec, run.exclusive, run.created, state, cause, status)


def holder(home: Path, exclusive: str) -> str:
    """Who last took a device, as it wrote it down."""
    return tail(device_lock(home, exclusive), 200).strip() or "another job"


def _judge(folder: Path) -> tuple[State, str, Status]:
    """State and cause. A process that has just ended wrote its last word before, so what is dead is read once more."""
    status = None
    for _ in range(3):
        before, status = status, read_status(folder)
        if status is not None and status.state in FINAL:
            return status.state, status.cause, status
        if status is not None and status.pid:
            alive = status.identity.alive
        else:
            # Just being started, or the file is damaged: whoever works in the folder has it locked.
            alive = processes.is_held(folder / "run.lock")
        if alive:
            return (status.state, status.cause, status) if status else ("running", "", Status("running"))
        if before == status and before is not None:
            break
    state, cause = _verdict(folder, status)
    return state, cause, status or Status(state)


def _verdict(folder: Path, status: Status | None) -> tuple[State, str]:
    """How a process ended that could not say so itself."""
    if status is None:
        if (folder / "stop.json").exists():
            return "stopped", "Stopped on request."
        return "killed", "Its status.json cannot be read, and no process works on it."
    ended = read_json(folder / "exit.json")
    code = ended.get("code") if ended.get("attempt") == status.attempt else None
    name = signal.Signals(-code).name if isinstance(code, int) and -code in set(signal.Signals) else ""
    counts = processes.oom_kills()
    memory = any(counts.get(file, 0) > count for file, count in (status.oom_kills or {}).items())
    if read_json(folder / "stop.json").get("attempt") == status.attempt:
        return "stopped", "Stopped on request."
    if name in CRASHES:
        return "failed", f"It crashed inside a library ({name})."
    if isinstance(code, int) and code >= 0:
        return "failed", f"Its process ended with code {code} before it could say why."
    if status.boot and status.boot != processes.boot_id():
        return "killed", "The machine was restarted while it ran."
    if memory and name in ("", "SIGKILL"):
        return "killed", "Killed by the system, probably because memory ran out."
    if name:
        return "killed", f"Killed from outside ({name}); nothing says that memory ran out."
    if not status.pid:
        return "failed", "It was never started: the program that should have done it was ended first."
    return "killed", "Killed by the system or by a person; nothing tells which."
