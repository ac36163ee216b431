"""A fine-tune job outlives the server, keeps what was learnt when it is stopped, and goes on where it was."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nibble import jobs, publish
from nibble.jobs import Job
from nibble.training import checkpoints
from tests.support.learning import TOLD, digest, furnish, learn
from tests.test_nibble_jobs_quantize import Server
from tests.test_nibble_jobs_server import processes_of


@pytest.fixture(autouse=True)
def nothing_stays(home: Path) -> Iterator[None]:
    yield
    for job in jobs.list_jobs(home):
        jobs.stop(job.id, home, grace_s=0)


@pytest.fixture
def learning(home: Path, guide_model: Path) -> Path:
    """A home with a tiny model and its texts."""
    return furnish(home, guide_model)


def spec_of(home: Path, **more: object) -> dict:
    """What a job with the tiny model is told."""
    told = {**TOLD, "model": "tiny", "data": str(home / "texts.jsonl"), "dtype": "float32", "home": str(home)}
    return {**told, "device": "cpu", "paths": True, **more}


def until(home: Path, job_id: str, step: int) -> Job:
    """The job, once it has done so many steps or ended."""
    while True:
        job = jobs.find(job_id, home)
        if not job.live or (job.progress.stage == "train" and job.progress.done >= step):
            return job
        time.sleep(0.005)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=[pytest.mark.full, pytest.mark.timeout(900)])])
def test_a_server_is_killed_again_and_again_while_a_model_learns(kills: int, learning: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    dice = random.Random(seed)
    server = Server(learning, spec_of(learning, max_steps=400 * kills, save_steps=100, out="learnt"), "finetune")
    while server.job()[3] < 1:
        pass
    job_id, _, pid, done = server.job()
    folder = jobs.find(job_id, learning).folder
    for _ in range(kills):
        time.sleep(dice.random() * 0.05)
        server.kill()
        # A fast machine must not finish the job while Python starts; a process that is held still is alive.
        os.kill(pid, signal.SIGSTOP)
        server = Server(learning, task="finetune")
        found, state, worker, now = server.job()
        assert (found, state, worker) == (job_id, "running", pid)
        assert processes_of(folder) == [pid]
        os.kill(pid, signal.SIGCONT)
        assert now >= done
        while server.job()[3] <= now:
            assert server.job()[1] == "running"
        done = now
    server.kill()
    assert jobs.stop(job_id, learning).state == "stopped"
    assert processes_of(folder) == []
    said = publish.read_manifest(learning / "adapters" / "learnt")
    assert said["partial"] and said["steps"] >= done


def test_a_stopped_job_keeps_what_it_learnt_and_goes_on_to_the_same_end(learning: Path) -> None:
    spec = spec_of(learning, max_steps=80, save_steps=50)
    job = jobs.start("finetune", {**spec, "out": "stopped"}, home=learning)
    until(learning, job.id, 5)
    stopped = jobs.stop(job.id, learning)
    assert (stopped.state, stopped.cause) == ("stopped", "Stopped on request.")
    said = publish.read_manifest(learning / "adapters" / "stopped")
    publish.verify(learning / "adapters" / "stopped", contents=True)
    assert said["partial"] and 5 <= said["steps"] < 80 and said["run"] == job.id
    kept = checkpoints.latest(job.folder)
    assert kept is not None and kept.step == said["steps"]
    assert digest(kept.folder) == digest(learning / "adapters" / "stopped")

    jobs.resume(job.id, learning)
    ended = until(learning, job.id, 10**6)
    assert ended.state == "done", ended.log()
    assert ended.status.result["steps"] == 80
    assert f"The run goes on from step {kept.step}." in ended.status.result["notes"]
    assert not publish.read_manifest(learning / "adapters" / "stopped")["partial"]
    learn(learning, max_steps=80, save_steps=50, out="whole")
    assert digest(learning / "adapters" / "stopped") == digest(learning / "adapters" / "whole")
