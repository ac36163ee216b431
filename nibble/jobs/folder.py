"""The folder of a run, home/runs/<id>, and its files.

    run.yaml        what to do; written once, never changed
    status.json     what the working process last told; replaced whole
    metrics.jsonl   one row of numbers a line; only appended to
    log.txt         whatever the process printed; only appended to
    run.lock        locked as long as a process works in the folder
    stop.json, exit.json   that a stop was asked for, and how the process ended where its parent saw it

Promises that a file is whole or told to be torn, that nothing secret is written, and that reading takes no lock.
Knows nothing of tasks and processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from nibble.config import MAX_BYTES, check_keys, read_yaml
from nibble.errors import ConfigError, JobError
from nibble.jobs.processes import Identity
from nibble.jobs.progress import Progress

State = Literal["waiting", "running", "done", "failed", "stopped", "killed"]
LIVE: tuple[State, ...] = ("waiting", "running")
FINAL: tuple[State, ...] = ("done", "failed", "stopped", "killed")

JOB_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[a-z0-9_]{1,40}-[0-9a-f]{4}")
DEVICE = re.compile(r"[a-z0-9][a-z0-9._:-]{0,63}")
"""A name under which jobs exclude each other."""

SECRET_KEY = re.compile(
    r"(.*[_-])?(password|passwd|secret|api_?key|credentials?)|((hf|hub|auth|access|api)[_-])*token", re.IGNORECASE
)
SECRET_VALUE = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
"""What must not lie in a file that a person may pass on: names that say so, and the form of Hugging Face's tokens."""


@dataclass(frozen=True)
class Run:
    """What run.yaml says."""

    task: str
    spec: dict[str, Any]
    exclusive: str | None
    """Of the jobs that name the same one, a device as a rule, a single one works at a time."""
    created: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class Status:
    """What status.json says: the latest words of the working process, or of the one that starts it."""

    state: State = "waiting"
    attempt: int = 1
    """1, and one more with each resume."""
    cause: str = ""
    pid: int = 0
    """0 until the working process has written for itself."""
    ticks: int = 0
    boot: str = ""
    started: float | None = None
    """Seconds since 1970 at which the work began, after any waiting; `ended` likewise."""
    ended: float | None = None
    elapsed_s: float = 0.0
    """How long this attempt has worked, up to the latest word; by a clock that cannot be set."""
    progress: Progress = Progress()
    note: str = ""
    result: dict[str, Any] | None = None
    oom_kills: dict[str, int] | None = None
    """The kernel's counts when the attempt began."""

    @property
    def identity(self) -> Identity:
        """The working process."""
        return Identity(self.pid, self.ticks, self.boot)


def runs_folder(home: Path) -> Path:
    """Where the runs lie."""
    return home.resolve() / "runs"


def locks_folder(home: Path) -> Path:
    """Where the locks lie that jobs share; made where it is missing.

    Raises:
        JobError: it cannot be made.
    """
    folder = runs_folder(home) / ".locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"{folder} cannot be made: {error.strerror}.", "Check the folder that `home` names.") from None
    return folder


def device_lock(home: Path, exclusive: str) -> Path:
    """The lock of a device; its text names the holder."""
    return locks_folder(home) / f"device-{exclusive}"


def new_id(task: str) -> str:
    """An id that sorts by time and says what it is, such as 20261120-161502-quantize-ab12."""
    word = re.sub(r"[^a-z0-9_]", "_", task.rpartition(".")[2].lower())[:40]
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{word}-{secrets.token_hex(2)}"


def new_run(task: str, spec: Mapping[str, Any], exclusive: str | None) -> Run:
    """A run whose spec is as it will be read back.

    Raises:
        JobError: the spec holds a secret or something that YAML cannot keep, or a name is not one.
    """
    if exclusive is not None and not DEVICE.fullmatch(exclusive):
        raise JobError(f"{exclusive!r} is not the name of a device.", "Such a name is cpu, xpu or cuda.")
    refuse_secrets(spec, "spec")
    return Run(task, dict(_plain(spec, "spec")), exclusive, time.time())


def _plain(value: Any, place: str) -> Any:
    """The value made of what YAML keeps: mappings with text as keys, lists, text, numbers, true, false, null."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            # An enumeration's member or a NumPy float is written as what it is at bottom.
            return str.__str__(value) if kind is str else kind(value)
    raise JobError(f"{place} is a {type(value).__name__}, which run.yaml cannot keep.", "Give text or a number.")


def refuse_secrets(value: Any, place: str) -> None:
    """Refuse what must not be written to run.yaml.

    Raises:
        JobError: a key named like a password or a token, or a value that looks like one.
    """
    hint = "Secrets are read from the environment (HF_TOKEN), which the job inherits, and are never written down."
    if isinstance(value, Mapping):
        for key, item in value.items():
            if SECRET_KEY.fullmatch(str(key)):
                raise JobError(f"{place} must not hold {key!r}.", hint)
            refuse_secrets(item, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            refuse_secrets(item, place)
    elif isinstance(value, str) and SECRET_VALUE.search(value):
        raise JobError(f"{place} holds what looks like an access token.", hint)


def write_run(folder: Path, run: Run) -> None:
    """Write run.yaml.

    Raises:
        JobError: it would be larger than what is read back, or is no text.
    """
    text = yaml.safe_dump(asdict(run), sort_keys=False, allow_unicode=True)
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise JobError("The spec holds text that is not Unicode.", "Give names and text in UTF-8.") from None
    if len(data) > MAX_BYTES:
        raise JobError(f"The spec has {len(data):,} bytes; 1 MB is the most.", "Put long text into a file.")
    (folder / "run.yaml").write_bytes(data)


def read_run(folder: Path) -> Run:
    """Read run.yaml.

    Raises:
        NibbleError: it is missing, torn or not of this form.
    """
    path = folder / "run.yaml"
    values = read_yaml(path)
    check_keys(values, [item.name for item in fields(Run)], str(path))
    task, spec, exclusive, created = (values.get(name) for name in ("task", "spec", "exclusive", "created"))
    if not (isinstance(task, str) and isinstance(spec, dict) and isinstance(created, (int, float))):
        raise ConfigError(f"{path} lacks task, spec or created.", "Start the work anew.")
    if exclusive is not None and not (isinstance(exclusive, str) and DEVICE.fullmatch(exclusive)):
        raise ConfigError(f"{path}: exclusive is {exclusive!r}.", "It must be the name of a device, such as cpu.")
    return Run(task, spec, exclusive, float(created))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a file by these values at once: a reader sees the old or the new.

    A full disk must not hide how a job ended: where no new file fits, the old one's own blocks are written over.
    """
    text = (json.dumps(values, ensure_ascii=False, default=str) + "\n").encode(errors="backslashreplace")
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.write_bytes(text)
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        with path.open("r+b") as stream:
            stream.write(text.ljust(path.stat().st_size))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where it is missing, torn or no object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_status(folder: Path) -> Status | None:
    """Read status.json; None where it is missing, torn or not of this form."""
    values = read_json(folder / "status.json")
    known = {item.name: values[item.name] for item in fields(Status) if item.name in values}
    try:
        known["progress"] = Progress(**known.get("progress", {}))
        status = Status(**known)
        numbers = (status.pid, status.ticks, status.attempt, status.progress.done + status.progress.total)
    except TypeError:
        return None
    if status.state not in (*LIVE, *FINAL) or not values or not all(isinstance(n, (int, float)) for n in numbers):
        return None
    return status


def tail(path: Path, limit: int) -> str:
    """The last whole lines of a text file, at most `limit` bytes, however long it is; empty where there is none."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - limit))
            data = stream.read(limit)
    except OSError:
        return ""
    if size > limit and b"\n" in data:
        data = data.partition(b"\n")[2]
    return data.decode("utf-8", errors="replace")
