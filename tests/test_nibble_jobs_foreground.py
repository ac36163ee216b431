"""The console's way: the work in the very process, to its end; and `nibble jobs`."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nibble import jobs
from nibble.__main__ import main
from nibble.errors import JobError, NibbleError
from nibble.jobs.work import take_device
from tests.support import scripted_task
from tests.support.waiting import until

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[1]

PROGRAM = """
import sys
from pathlib import Path
from nibble import jobs
from tests.support import scripted_task
script = [["spawn", "session"], ["note", "spawned"], ["sleep", 60]]
jobs.run_foreground(scripted_task, {"script": script}, home=Path(sys.argv[1]), keep=True, exclusive="cpu")
"""


@pytest.fixture(autouse=True)
def nothing_stays(home: Path) -> Iterator[None]:
    yield
    for job in jobs.list_jobs(home):
        jobs.stop(job.id, home, grace_s=0)


def foreground(home: Path, *script: Any, **named: Any) -> tuple[dict[str, Any], str]:
    """The result, and what was shown."""
    shown = io.StringIO()
    result = jobs.run_foreground(scripted_task, {"script": list(script)}, home=home, stream=shown, **named)
    return result, shown.getvalue()


def test_the_work_is_done_here_and_shown(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result, shown = foreground(home, ["note", "at first"], ["tick", 3, 0.0])
    assert result == {"resumed": False, "folder": "None"}
    lines = shown.splitlines()
    assert lines[0] == "at first"
    assert lines[-1].startswith("ticking 3/3 steps · 100 %") and lines[-1].endswith("step 3 · loss 0.3333")
    assert jobs.list_jobs(home) == []
    assert capfd.readouterr().out == "line 1\nline 2\nline 3\n"


def test_a_run_that_is_kept_is_a_job_like_any_other(home: Path) -> None:
    result, _ = foreground(home, ["note", "hello"], ["tick", 3, 0.0], keep=True)
    [job] = jobs.list_jobs(home)
    assert (job.state, job.status.result, job.status.pid) == ("done", result, os.getpid())
    assert len(job.metrics()) == 3 and job.log() == "hello\n"
    assert os.environ.get("NIBBLE_JOB") is None


def test_errors_stay_sentences(home: Path) -> None:
    with pytest.raises(NibbleError, match="No room. Make some."):
        foreground(home, ["refuse", "No room.", "Make some."], keep=True)
    with pytest.raises(JobError, match="ValueError: bad") as raised:
        foreground(home, ["throw", "ValueError", "bad"], keep=True)
    assert isinstance(raised.value.__cause__, ValueError)
    states = [(job.state, job.cause) for job in jobs.list_jobs(home)]
    assert states == [("failed", "ValueError: bad"), ("failed", "No room. Make some.")]


def test_one_device_serves_jobs_and_the_console_in_turn(home: Path) -> None:
    job = jobs.start(scripted_task, {"script": [["wait_for", "go"]]}, home=home, exclusive="cpu")
    until(lambda: jobs.find(job.id, home).state == "running")
    threading.Timer(0.3, (job.folder / "go").touch).start()
    _, shown = foreground(home, ["tick", 1, 0.0], exclusive="cpu")
    assert shown.startswith(f"Waits for cpu, which {job.id} holds.\n")
    with contextlib.ExitStack() as held:
        held.callback(take_device(home, "cpu", "work in a console", print).close)
        with pytest.raises(JobError, match="cpu is taken by work in a console"):
            jobs.start(scripted_task, {"script": []}, home=home, exclusive="cpu", queue=False)
    # It has let go of the device again, though this process lives on.
    second = jobs.start(scripted_task, {"script": []}, home=home, exclusive="cpu")
    until(lambda: jobs.find(second.id, home).state == "done")


@pytest.mark.parametrize(("number", "state"), [(signal.SIGINT, "stopped"), (signal.SIGTERM, "killed")])
def test_a_signal_ends_it_whole(number: int, state: str, home: Path) -> None:
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, str(home)], cwd=ROOT, stderr=subprocess.PIPE)
    until(lambda: (found := jobs.list_jobs(home)) and found[0].status.note == "spawned")
    children = psutil.Process(program.pid).children(recursive=True)
    assert len(children) == 1
    program.send_signal(number)
    program.communicate()
    assert jobs.list_jobs(home)[0].state == state
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_it_can_be_stopped_and_resumed_from_elsewhere(home: Path) -> None:
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, str(home)], cwd=ROOT, stderr=subprocess.PIPE)
    until(lambda: (found := jobs.list_jobs(home)) and found[0].status.note == "spawned")
    threading.Thread(target=program.communicate, daemon=True).start()
    [job] = jobs.list_jobs(home)
    assert jobs.stop(job.id, home).state == "stopped"
    assert jobs.resume(job.id, home).live
    until(lambda: jobs.find(job.id, home).status.note == "spawned")


def test_the_line_on_a_terminal_is_drawn_over_itself(home: Path) -> None:
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as stream:
        jobs.run_foreground(scripted_task, {"script": [["tick", 3, 0.0], ["note", "a note"]]}, home=home, stream=stream)
    read = b""
    # Linux ends the reading of a terminal that nobody has open with an error.
    with contextlib.suppress(OSError):
        while part := os.read(leader, 10_000):
            read += part
    os.close(leader)
    shown = read.decode()
    assert shown.count("\n") == 2 and "a note\x1b[K\r\n" in shown
    assert shown.startswith("\rticking 1/3 steps")


def test_the_console_lists_stops_resumes_and_shows_logs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = jobs.start(scripted_task, {"script": [["print", "in the log"], ["progress", 1, 4], ["sleep", 60]]}, home=home)
    until(lambda: jobs.find(job.id, home).progress.done)
    assert main(["jobs"]) == 0
    assert f"{job.id}  running" in capsys.readouterr().out
    assert main(["jobs", "--json"]) == 0
    [listed] = json.loads(capsys.readouterr().out)
    assert (listed["id"], listed["state"], listed["progress"]["done"]) == (job.id, "running", 1)
    assert main(["jobs", "log", job.id[-4:]]) == 0
    assert capsys.readouterr().out == "in the log\n"
    assert main(["jobs", "stop", job.id]) == 0
    assert capsys.readouterr().out == f"{job.id}: stopped. Stopped on request.\n"
    assert main(["jobs", "resume", job.id, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["attempt"] == 2
    for wrong in (["jobs", "stop"], ["jobs", "stop", "nothing"], ["jobs", "resume", job.id]):
        assert main(wrong) == 1
        assert "Traceback" not in capsys.readouterr().err
