"""Jobs from start to end, as real processes: their states, their trees, and that one is not two."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from nibble import jobs
from nibble.errors import JobError
from nibble.jobs import Job
from nibble.jobs.processes import JOB_VARIABLE
from tests.support import scripted_task
from tests.support.waiting import until

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[1]


def start(home: Path, *script: Any, **named: Any) -> Job:
    return jobs.start(scripted_task, {"script": list(script)}, home=home, **named)


def ended(job: Job, home: Path) -> Job:
    """The job once it neither waits nor runs."""
    until(lambda: not jobs.find(job.id, home).live)
    return jobs.find(job.id, home)


def running(job: Job, home: Path) -> Job:
    """The job once its task is at work."""
    until(lambda: jobs.find(job.id, home).state == "running")
    return jobs.find(job.id, home)


def members(job: Job) -> list[psutil.Process]:
    """Every living process that belongs to a job."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(JOB_VARIABLE) == str(job.folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(autouse=True)
def nothing_stays(home: Path) -> Iterator[None]:
    """Every job of a test is ended with it."""
    yield
    for job in jobs.list_jobs(home):
        jobs.stop(job.id, home, grace_s=0)


def test_a_job_runs_to_its_end(home: Path) -> None:
    job = start(home, ["note", "half a \ud800"], ["note", "two\nlines"], ["tick", 5, 0.01], exclusive="cpu")
    assert job.live
    job = ended(job, home)
    assert (job.state, job.cause, job.status.note) == ("done", "", "two lines")
    assert job.status.result == {"resumed": False, "folder": str(job.folder)}
    assert job.progress.fraction == 1.0
    assert [row["step"] for row in job.metrics()] == [1, 2, 3, 4, 5]
    assert job.log().splitlines() == ["half a \\ud800", "two lines", *(f"line {n}" for n in range(1, 6))]
    assert job.created <= job.status.started <= job.status.ended
    assert json.loads(json.dumps(job.as_dict()))["progress"]["text"].startswith("ticking 5/5 steps · 100 %")


def test_a_job_is_a_session_of_its_own_with_no_pipe_to_anyone(home: Path) -> None:
    job = running(start(home, ["sleep", 60]), home)
    assert os.getsid(job.status.pid) == job.status.pid != os.getsid(0)
    targets = {n: str(Path(f"/proc/{job.status.pid}/fd/{n}").readlink()) for n in (0, 1, 2)}
    assert targets == {0: "/dev/null", 1: str(job.folder / "log.txt"), 2: str(job.folder / "log.txt")}


@pytest.mark.parametrize(
    ("script", "state", "words"),
    [
        (["refuse", "The disk is full.", "Make room."], "failed", "The disk is full. Make room."),
        (["throw", "ValueError", "bad\nvery bad"], "failed", "ValueError: bad"),
        (["throw", "MemoryError", ""], "failed", "Memory ran out"),
        (["throw", "SystemExit", "3"], "failed", "SystemExit: 3"),
        (["exit", 7], "failed", "code 7"),
        (["signal", signal.SIGSEGV], "failed", "crashed inside a library (SIGSEGV)"),
        (["signal", signal.SIGKILL], "killed", "Killed from outside (SIGKILL)"),
        (["signal", signal.SIGTERM], "killed", "Ended from outside (SIGTERM)"),
        (["no such action"], "failed", "KeyError"),
    ],
)
def test_an_end_is_told_in_a_sentence(script: list[Any], state: str, words: str, home: Path) -> None:
    job = start(home, ["print", "last words"], script)
    job = ended(job, home)
    # How the process ended is known a moment after that it has.
    until(lambda: words in jobs.find(job.id, home).cause)
    job = jobs.find(job.id, home)
    assert job.state == state
    assert "\n" not in job.cause
    assert "last words" in job.as_dict()["log_end"] or "last words" in job.log()


def test_a_kill_that_no_parent_saw_is_told_plainly(home: Path) -> None:
    """As after a restart of the server: what ended the process is not known."""
    job = running(start(home, ["sleep", 60]), home)
    os.kill(job.status.pid, signal.SIGKILL)
    until(lambda: (job.folder / "exit.json").exists())
    (job.folder / "exit.json").unlink()
    job = jobs.find(job.id, home)
    assert (job.state, job.cause) == ("killed", "Killed by the system or by a person; nothing tells which.")


def test_the_kernels_count_of_memory_kills_names_the_cause(home: Path) -> None:
    job = running(start(home, ["sleep", 60]), home)
    os.kill(job.status.pid, signal.SIGKILL)
    job = ended(job, home)
    status = json.loads((job.folder / "status.json").read_text())
    assert status["oom_kills"], "this kernel counts no out-of-memory kills"
    status["oom_kills"] = dict.fromkeys(status["oom_kills"], -1)  # one kill fewer than there are now
    (job.folder / "status.json").write_text(json.dumps(status))
    assert jobs.find(job.id, home).cause == "Killed by the system, probably because memory ran out."


@pytest.mark.parametrize("kind", ["plain", "session", "orphan"])
def test_stop_ends_the_whole_tree(kind: str, home: Path) -> None:
    job = start(home, ["spawn", kind], ["fork"], ["note", "spawned"], ["sleep", 120])
    until(lambda: jobs.find(job.id, home).status.note == "spawned")
    until(lambda: len(members(job)) == 3)
    job = jobs.stop(job.id, home)
    assert (job.state, job.cause) == ("stopped", "Stopped on request.")
    assert members(job) == []


def test_a_stopped_task_may_save_and_a_deaf_one_is_killed(home: Path) -> None:
    saving = start(home, ["note", "on"], ["save_slowly", 0.3])
    deaf = start(home, ["deaf"], ["note", "on"], ["sleep", 120])
    for job in (saving, deaf):
        until(lambda job=job: jobs.find(job.id, home).status.note == "on")
    assert jobs.stop(saving.id, home).state == "stopped"
    assert (saving.folder / "checkpoint").exists()
    assert jobs.stop(deaf.id, home, grace_s=0.2).state == "stopped"
    assert members(deaf) == []


@pytest.mark.full
def test_a_job_whose_stopper_dies_ends_itself(home: Path) -> None:
    job = start(home, ["stubborn"])
    until(lambda: jobs.find(job.id, home).status.note == "on")
    os.kill(jobs.find(job.id, home).status.pid, signal.SIGTERM)
    until(lambda: jobs.find(job.id, home).status.note == "caught")
    assert ended(job, home).cause == "Killed from outside (SIGALRM); nothing says that memory ran out."


def test_a_job_is_stopped_at_any_moment_of_its_start(home: Path) -> None:
    for step in range(12):
        job = start(home, ["sleep", 60], ["progress", step, 12])
        time.sleep(step * 0.02)
        assert jobs.stop(job.id, home).state == "stopped"
        assert members(job) == []


def test_what_outlives_a_killed_job_can_be_stopped(home: Path) -> None:
    job = start(home, ["spawn", "session"], ["note", "spawned"], ["signal", signal.SIGKILL])
    assert ended(job, home).state == "killed"
    assert len(members(job)) == 1
    assert jobs.stop(job.id, home).state == "killed"
    assert members(job) == []


def test_nothing_outlives_a_job_that_ends_by_itself(home: Path) -> None:
    for last in (["note", "fine"], ["refuse", "no", ""]):
        job = ended(start(home, ["spawn", "orphan"], ["fork"], last), home)
        assert job.state in ("done", "failed")
        until(lambda job=job: members(job) == [])


def test_one_device_one_job_and_the_next_waits(home: Path) -> None:
    first = running(start(home, ["wait_for", "go"], exclusive="cpu"), home)
    second = start(home, ["tick", 1, 0.0], exclusive="cpu")
    until(lambda: jobs.find(second.id, home).status.pid)
    other = ended(start(home, ["tick", 2, 0.0], exclusive="cuda"), home)
    assert other.state == "done"
    waiting = jobs.find(second.id, home)
    assert (waiting.state, waiting.cause) == ("waiting", f"Waits for cpu, which {first.id} holds.")
    with pytest.raises(JobError, match=f"cpu is taken by {first.id}"):
        start(home, ["tick", 3, 0.0], exclusive="cpu", queue=False)
    (first.folder / "go").touch()
    assert ended(second, home).state == "done"
    assert ended(first, home).status.ended <= jobs.find(second.id, home).status.started


def test_a_killed_holder_frees_its_device_though_its_children_live(home: Path) -> None:
    first = start(home, ["fork"], ["spawn", "session"], ["note", "on"], ["sleep", 60], exclusive="cpu")
    until(lambda: jobs.find(first.id, home).status.note == "on")
    second = start(home, ["tick", 1, 0.0], exclusive="cpu")
    os.kill(jobs.find(first.id, home).status.pid, signal.SIGKILL)
    assert ended(second, home).state == "done"
    assert len(members(first)) == 2


def test_a_waiting_job_can_be_stopped(home: Path) -> None:
    first = running(start(home, ["sleep", 60], exclusive="cpu"), home)
    second = start(home, ["tick", 1, 0.0], exclusive="cpu")
    until(lambda: jobs.find(second.id, home).status.pid)
    assert jobs.stop(second.id, home).state == "stopped"
    assert jobs.find(first.id, home).state == "running"


def test_a_hundred_starts_at_once_are_one_process(home: Path) -> None:
    def attempt(_: int) -> str:
        try:
            return start(home, ["sleep", 60], exclusive="cpu").id
        except JobError as error:
            return str(error)

    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(attempt, range(100)))
    found = jobs.list_jobs(home)
    assert len(found) == 1
    assert answers.count(found[0].id) == 1
    assert sum(f"already {state}: {found[0].id}" in text for text in answers for state in jobs.LIVE) == 99
    assert [process.pid for process in members(running(found[0], home))] == [jobs.find(found[0].id, home).status.pid]


@pytest.mark.full
def test_starts_from_many_programs_at_once_are_one_process_each_time(home: Path) -> None:
    code = """
import sys
from pathlib import Path
from nibble import jobs
from nibble.errors import JobError
from tests.support import scripted_task
sys.stdin.readline()
try:
    jobs.start(scripted_task, {"script": [["sleep", 60]]}, home=Path(sys.argv[1]))
except JobError:
    pass
"""
    command = [sys.executable, "-c", code, str(home)]
    for _ in range(5):
        programs = [subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE) for _ in range(20)]
        for program in programs:
            assert program.stdin
            program.stdin.write(b"go\n")
            program.stdin.flush()
        assert {program.wait() for program in programs} == {0}
        live = [job for job in jobs.list_jobs(home) if job.live]
        assert len(live) == 1
        assert len(members(running(live[0], home))) == 1
        jobs.stop(live[0].id, home, grace_s=1)


def test_resume_goes_on_in_the_same_folder(home: Path) -> None:
    job = ended(start(home, ["tick", 3, 0.0], ["once", "tried", "signal", signal.SIGKILL]), home)
    assert job.state == "killed"
    again = ended(jobs.resume(job.id, home), home)
    assert (again.state, again.folder, again.status.attempt) == ("done", job.folder, 2)
    assert again.status.result == {"resumed": True, "folder": str(job.folder)}
    assert [row["step"] for row in again.metrics()] == [1, 2, 3, 1, 2, 3]
    assert again.log().splitlines() == [f"line {n}" for n in (1, 2, 3)] * 2
    with pytest.raises(JobError, match="is done"):
        jobs.resume(job.id, home)


def test_a_hundred_resumes_at_once_are_one_process(home: Path) -> None:
    job = ended(start(home, ["once", "tried", "refuse", "not yet", ""], ["sleep", 60]), home)

    def attempt(_: int) -> bool:
        try:
            return jobs.resume(job.id, home).live
        except JobError:
            return False

    with ThreadPoolExecutor(100) as pool:
        assert sum(pool.map(attempt, range(100))) == 1
    assert running(job, home).status.attempt == 2
    assert len(members(job)) == 1
    assert jobs.stop(job.id, home).state == "stopped"


def test_a_stop_of_an_earlier_attempt_says_nothing_of_this_one(home: Path) -> None:
    job = running(start(home, ["once", "tried", "sleep", 60], ["signal", signal.SIGKILL]), home)
    jobs.stop(job.id, home)
    assert ended(jobs.resume(job.id, home), home).state == "killed"


def test_a_full_disk_does_not_hide_how_a_job_ended(home: Path) -> None:
    job = ended(start(home, ["full_disk"], ["refuse", "No room is left.", ""]), home)
    assert (job.state, job.cause) == ("failed", "No room is left.")


def test_a_long_log_is_shown_by_its_end(home: Path) -> None:
    job = ended(start(home, ["long_log", 30]), home)
    text = job.log()
    assert (job.folder / "log.txt").stat().st_size > 30_000_000
    assert len(text) <= 200_000
    assert text.endswith("the end\n")
    assert set(text.splitlines()[:-1]) == {"x" * 99}


def test_an_endpoint_cannot_name_a_module(home: Path) -> None:
    for name in ("tests.support.scripted", "os.path", "../quantize", "", "a b"):
        with pytest.raises(JobError, match="not the name of a task"):
            jobs.start(name, {}, home=home)
    job = ended(jobs.start("nothing_of_ours", {}, home=home), home)
    assert (job.state, job.cause[:36]) == ("failed", "There is no task 'nothing_of_ours'. ")


@pytest.mark.parametrize(
    "spec",
    [
        {"token": "x"}, {"hub": {"hf_token": "x"}}, {"Password": ""}, {"list": [{"api_key": 1}]},
        {"url": "https://hf_AbCdEfGhIjKlMnOpQrStUv@example.org"},
    ],
)  # fmt: skip
def test_secrets_are_not_written_down(spec: dict[str, Any], home: Path) -> None:
    with pytest.raises(JobError, match="HF_TOKEN"):
        jobs.start(scripted_task, spec, home=home)
    assert jobs.list_jobs(home) == []


def test_a_spec_is_read_back_as_it_was_given(home: Path) -> None:
    spec = {
        "script": [], "max_new_tokens": 3, "eos_token": "</s>", "rate": 1e-5, "no": "no", "text": "1e-5", "none": None,
        "words": "漢字 \U0001f600 \x07 \u2028 'a' \"b\": #", "nested": {"a": [1, 2.5, True, {"b": []}]}, "big": 10**30,
    }  # fmt: skip
    job = jobs.start(scripted_task, spec, home=home)
    assert ended(job, home).spec == spec
    for bad in ({1: 2}, {"x": object()}, {"x": b"bytes"}, {"x": "y" * 1_100_000}):
        with pytest.raises(JobError):
            jobs.start(scripted_task, bad, home=home)
    assert len(jobs.list_jobs(home)) == 1
