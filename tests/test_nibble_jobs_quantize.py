"""A quantize job outlives the server that started it; whoever looks next finds it as it is, one process, to its end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nibble import jobs, publish
from nibble.lowbit import FORMATS
from tests.test_nibble_jobs_server import ROOT, processes_of

PACKED = [name for name, row in FORMATS.items() if row.quantized]
FEW = PACKED[:2]

SERVER = """
import json, sys, time
from pathlib import Path
from nibble import jobs
home, spec, task = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
if spec:
    jobs.start(task, spec | {"home": str(home)}, home=home, exclusive="cpu")
while True:
    found = [[job.id, job.state, job.status.pid, job.progress.done] for job in jobs.list_jobs(home)]
    sys.stdout.write(json.dumps(found) + "\\n")
    sys.stdout.flush()
    time.sleep(0.01)
"""
"""A page's server, as far as jobs are concerned: it may start one, then shows all of them again and again."""


class Server:
    """The program above, in a process of its own."""

    def __init__(self, home: Path, spec: dict[str, Any] | None = None, task: str = "quantize") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(home), json.dumps(spec or {}), task], cwd=ROOT, text=True,
            start_new_session=True, stdout=subprocess.PIPE,
        )  # fmt: skip

    def job(self) -> tuple[str, str, int, float]:
        """Id, state, process and progress of the one job, as it is shown now."""
        assert self.process.stdout
        [row] = json.loads(self.process.stdout.readline())
        return tuple(row)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(autouse=True)
def nothing_stays(home: Path) -> Iterator[None]:
    yield
    for job in jobs.list_jobs(home):
        jobs.stop(job.id, home, grace_s=0)


def write_model(folder: Path, layers: int) -> None:
    """A random model of 5 million weights and 3 million a layer."""
    config = transformers.Qwen2Config(
        vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


@pytest.mark.parametrize(
    ("kills", "formats"), [(3, FEW), pytest.param(20, PACKED, marks=[pytest.mark.full, pytest.mark.timeout(900)])]
)
def test_a_server_is_killed_again_and_again_while_a_model_is_quantized(
    kills: int, formats: list[str], home: Path
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    dice = random.Random(seed)
    write_model(home / "models" / "big", layers=8 + kills // 4)
    server = Server(home, {"model": "big", "low_bit": formats, "evaluate": False})
    while server.job()[1] != "running":
        pass
    job_id, _, pid, done = server.job()
    # A fast machine must not finish the job while it is looked at; a process that is held still is alive.
    os.kill(pid, signal.SIGSTOP)
    folder = jobs.find(job_id, home).folder
    for _ in range(kills):
        os.kill(pid, signal.SIGCONT)
        time.sleep(dice.random() * 0.05)
        server.kill()
        os.kill(pid, signal.SIGSTOP)
        server = Server(home)
        found, state, worker, now = server.job()
        assert (found, state, worker) == (job_id, "running", pid)
        assert processes_of(folder) == [pid]
        assert now >= done
        done = now
    os.kill(pid, signal.SIGCONT)
    while server.job()[1] == "running":
        pass
    assert server.job()[:3] == (job_id, "done", pid)
    server.kill()
    assert processes_of(folder) == []
    assert [model["format"] for model in jobs.find(job_id, home).status.result["models"]] == formats
    for name in formats:
        publish.verify(home / "models" / f"big-{name}", contents=True)
    assert not list((home / "models").glob(".*.tmp-*"))


def test_a_job_that_is_killed_leaves_nothing_and_can_be_resumed(home: Path) -> None:
    write_model(home / "models" / "big", layers=12)
    job = jobs.start("quantize", {"model": "big", "low_bit": FEW, "home": str(home), "evaluate": False}, home=home)
    while jobs.find(job.id, home).progress.done < 1:
        time.sleep(0.005)
    assert jobs.stop(job.id, home, grace_s=0).state in ("killed", "stopped")
    assert [path.name for path in (home / "models").iterdir() if not path.name.startswith(".")] == ["big"]
    jobs.resume(job.id, home)
    while jobs.find(job.id, home).live:
        time.sleep(0.1)
    assert jobs.find(job.id, home).state == "done"
    assert not list((home / "models").glob(".*.tmp-*"))
