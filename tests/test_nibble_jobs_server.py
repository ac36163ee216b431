"""A job outlives the program that started it, killed at random moments; whoever looks next finds it as it is."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nibble import jobs
from nibble.jobs.processes import JOB_VARIABLE
from tests.support.waiting import until

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[1]

SERVER = """
import json, sys, time
from pathlib import Path
from nibble import jobs
from tests.support import scripted_task
home = Path(sys.argv[1])
sys.stdout.write("ready\\n"); sys.stdout.flush()
if sys.stdin.readline() == "start\\n":
    jobs.start(scripted_task, {"script": [["tick_until", "enough"]]}, home=home, exclusive="cpu")
while True:
    found = jobs.list_jobs(home)
    sys.stdout.write(json.dumps([[job.id, job.state, job.status.pid, job.progress.done] for job in found]) + "\\n")
    sys.stdout.flush()
    for job in found:
        job.log(), job.metrics()
    time.sleep(0.01)
"""
"""A page's server, as far as jobs are concerned: it may start one, then shows all of them again and again."""


class Server:
    """The program above, in a process of its own, as a session of its own."""

    def __init__(self, home: Path, order: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(home)], cwd=ROOT, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.line() == "ready"
        assert self.process.stdin
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().rstrip("\n")

    def shown(self) -> list[list[Any]]:
        return json.loads(self.line())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(autouse=True)
def nothing_stays(home: Path) -> Iterator[None]:
    yield
    for job in jobs.list_jobs(home):
        jobs.stop(job.id, home, grace_s=0)


@pytest.fixture
def dice() -> random.Random:
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    return random.Random(seed)


def processes_of(folder: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(JOB_VARIABLE) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.full)])
def test_a_server_is_killed_again_and_again_while_a_job_runs(kills: int, home: Path, dice: random.Random) -> None:
    server = Server(home, "start")
    until(lambda: (rows := server.shown()) and rows[0][1] == "running")
    [job] = jobs.list_jobs(home)
    attached = 0
    for _ in range(kills):
        time.sleep(dice.random() * 0.05)
        server.kill()
        server = Server(home, "look")
        [[job_id, state, pid, done]] = server.shown()
        assert (job_id, state, pid) == (job.id, "running", job.status.pid)
        assert processes_of(job.folder) == [pid]
        while server.shown()[0][3] <= done:
            pass
        attached += 1
    (job.folder / "enough").touch()
    until(lambda: server.shown()[0][1] == "done")
    server.kill()
    ended = jobs.find(job.id, home)
    lines = (job.folder / "log.txt").read_text().splitlines()
    steps = [row["step"] for row in ended.metrics()]
    assert steps == list(range(1, len(steps) + 1))
    assert lines == [f"line {step}" for step in steps]
    assert attached == kills and processes_of(job.folder) == []


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.full)])
def test_a_server_is_killed_while_it_starts_a_job(kills: int, home: Path, dice: random.Random) -> None:
    """Whatever was reached by then: no job, one that says it never began, or one that runs, in a single process."""
    seen = set()
    for _ in range(kills):
        server = Server(home, "start")
        time.sleep(dice.random() * 0.02)
        server.kill()
        found = [job for job in jobs.list_jobs(home) if job.state not in ("stopped", "failed")]
        for job in found:
            assert job.live, (job.state, job.cause)
            until(lambda job=job: jobs.find(job.id, home).state == "running")
            assert processes_of(job.folder) == [jobs.find(job.id, home).status.pid]
            assert jobs.stop(job.id, home).state == "stopped"
        assert len(found) <= 1
        seen.add(len(found))
    for job in jobs.list_jobs(home):
        assert job.state == "stopped" or "never started" in job.cause
        assert processes_of(job.folder) == []
    jobs.stop(jobs.start("nothing", {}, home=home).id, home)
    assert {path.name for path in (home / "runs").glob(".*")} == {".locks"}
    assert 1 in seen


def test_the_end_of_a_server_by_sigterm_or_a_closed_terminal_leaves_its_jobs(home: Path) -> None:
    server = Server(home, "start")
    until(lambda: (rows := server.shown()) and rows[0][1] == "running")
    os.killpg(server.process.pid, 1)
    server.process.communicate()
    [job] = jobs.list_jobs(home)
    done = job.progress.done
    until(lambda: jobs.find(job.id, home).progress.done > done)
    assert jobs.find(job.id, home).state == "running"
