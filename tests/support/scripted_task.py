"""A task for tests: it does what its spec's `script` says, a list of [action, argument, ...]."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nibble.errors import NibbleError
from nibble.tasks import Report

SLEEP = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(120)"


def run(spec: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Follow the script; the result tells what the spec said of resuming."""
    for action, *arguments in spec["script"]:
        ACTIONS[action](report, *arguments)
    return {"resumed": spec.get("resume", False), "folder": str(report.folder)}


def tick(report: Report, count: int, pause: float) -> None:
    """Steps that are counted, measured and logged."""
    for step in range(1, count + 1):
        report.progress(step, count, "steps", "ticking")
        report.metric(step=step, loss=1 / step)
        print("line", step)
        time.sleep(pause)


def tick_until(report: Report, name: str) -> None:
    """Steps until a file of this name lies in the run's folder."""
    step = 0
    while not (Path(report.folder or ".") / name).exists():
        step += 1
        report.progress(step, 0, "steps", "ticking")
        report.metric(step=step)
        print("line", step)
        time.sleep(0.01)


def set_clock(report: Report, seconds: float) -> None:
    """From now on the wall clock is this far off."""
    true_time = time.time
    time.time = lambda: true_time() + seconds


def wait_for(report: Report, name: str) -> None:
    """Until a file of this name lies in the run's folder, or at this path."""
    while not (Path(report.folder or ".") / name).exists():
        time.sleep(0.02)


def once(report: Report, name: str, action: str, *arguments: Any) -> None:
    """Do it in the first attempt only."""
    assert report.folder is not None
    if not (report.folder / name).exists():
        (report.folder / name).touch()
        ACTIONS[action](report, *arguments)


def spawn(report: Report, kind: str) -> None:
    """A child that hears no SIGTERM: in this session, in one of its own, or orphaned in one of its own."""
    code = SLEEP
    if kind == "orphan":
        code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True)"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=kind == "session")
    if kind == "orphan":
        process.wait()


def fork(report: Report) -> None:
    """A child by fork alone, which goes on when this process dies."""
    if os.fork() == 0:
        time.sleep(120)
        os._exit(0)


def save_slowly(report: Report, seconds: float) -> None:
    """Work that, when stopped, takes its time to leave a checkpoint."""
    assert report.folder is not None
    try:
        time.sleep(120)
    finally:
        time.sleep(seconds)
        (report.folder / "checkpoint").touch()


def deaf(report: Report) -> None:
    """Listen to no SIGTERM from now on."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def stubborn(report: Report) -> None:
    """A library that catches everything and goes on."""
    report.note("on")
    for _ in range(2):
        try:
            time.sleep(60)
        except BaseException:  # noqa: BLE001
            report.note("caught")


def full_disk(report: Report) -> None:
    """From now on no file can be made in this process."""

    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    Path.write_bytes = refuse  # type: ignore[method-assign, assignment]


def long_log(report: Report, megabytes: int) -> None:
    """Print a lot."""
    block = ("x" * 99 + "\n") * 10_000
    for _ in range(megabytes):
        sys.stdout.write(block)
    print("the end")


def refuse(report: Report, message: str, hint: str) -> None:
    raise NibbleError(message, hint)


def throw(report: Report, kind: str, text: str) -> None:
    raise {"ValueError": ValueError, "MemoryError": MemoryError, "SystemExit": SystemExit}[kind](text)


ACTIONS: dict[str, Any] = {
    "tick": tick,
    "tick_until": tick_until,
    "set_clock": set_clock,
    "sleep": lambda report, seconds: time.sleep(seconds),
    "wait_for": wait_for,
    "once": once,
    "spawn": spawn,
    "fork": fork,
    "save_slowly": save_slowly,
    "deaf": deaf,
    "stubborn": stubborn,
    "full_disk": full_disk,
    "long_log": long_log,
    "refuse": refuse,
    "throw": throw,
    "signal": lambda report, number: os.kill(os.getpid(), number),
    "exit": lambda report, code: os._exit(code),
    "note": lambda report, text: report.note(text),
    "progress": lambda report, *numbers: report.progress(*numbers),
    "print": lambda report, text: print(text),
}
