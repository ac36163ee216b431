"""A model that learns in milliseconds, its data, and a warm process whose forked trainers are killed; prints JSON.

`python -m tests.support.learning kills GUIDE WORK N SEED`: N runs of one spec are each killed at a random moment and
resumed, and each must end with the unbroken run's adapter, byte for byte. `... pair GUIDE WORK 2 0`: two processes
share a run, and one does it alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from nibble import jobs, publish
from nibble.jobs.control import make_folder
from nibble.jobs.folder import Status, new_run, write_json
from nibble.jobs.work import work
from nibble.tasks import finetune as finetune_task
from nibble.training import checkpoints, session  # noqa: F401 - forked trainers find it imported

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

SHAPE = {
    "vocab_size": 6144, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip

TOLD = {"max_steps": 12, "save_steps": 3, "logging_steps": 2, "warmup_steps": 2, "batch_size": 2, "eval_share": 0.1}
"""What every run here is told unless a test says otherwise."""


def write_model(folder: Path, guide: Path, name: str = "Qwen2Config", **more: Any) -> Path:
    """A random model with the guide's tokenizer."""
    config = getattr(transformers, name)(**{**SHAPE, **more}, eos_token_id=2, pad_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for file in TOKENIZER:
        shutil.copyfile(guide / file, folder / file)
    return folder


def write_data(path: Path, rows: int = 30) -> Path:
    """Short texts of different lengths."""
    dice = random.Random(7)
    words = ["model", "data", "learn", "chat", "small", "byte", "quiet", "river", "tool", "note"]
    lines = [json.dumps({"text": " ".join(dice.choices(words, k=dice.randint(2, 9)))}) for _ in range(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def finetune(home: Path, *, keep: bool = True, **spec: Any) -> dict[str, Any]:
    """The task to its end, in this process."""
    given = {"home": str(home), "device": "cpu", "paths": True, **spec}
    return jobs.run_foreground("finetune", given, home=home, keep=keep, stream=io.StringIO())


def learn(home: Path, *, keep: bool = True, **spec: Any) -> dict[str, Any]:
    """The tiny model on the short texts of a home that `furnish` has filled."""
    given = {**TOLD, "model": "tiny", "data": str(home / "texts.jsonl"), "out": "learnt", "dtype": "float32", **spec}
    return finetune(home, keep=keep, **given)


def furnish(home: Path, guide: Path, name: str = "Qwen2Config", **more: Any) -> Path:
    """A home with the tiny model and its texts."""
    write_model(home / "models" / "tiny", guide, name, **more)
    write_data(home / "texts.jsonl")
    return home


def digest(folder: Path) -> str:
    """Of an adapter's weights."""
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


class Trainer:
    """One job's folder, whose process is forked from this warm one."""

    def __init__(self, home: Path, spec: Mapping[str, Any]) -> None:
        given = {**TOLD, "model": "tiny", "data": str(home / "texts.jsonl"), "dtype": "float32", **spec}
        run = new_run("finetune", {**given, "home": str(home), "device": "cpu", "paths": True}, None)
        self.folder, lock = make_folder(run, home)
        lock.close()
        self.attempt, self.pid = 0, 0

    def start(self) -> None:
        """Begin, or go on."""
        self.attempt += 1
        write_json(self.folder / "status.json", asdict(Status(attempt=self.attempt)))
        self.pid = os.fork()
        if self.pid == 0:
            with (self.folder / "log.txt").open("ab") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os._exit(work(self.folder))

    def step(self) -> float:
        """Steps done, as its status says."""
        status = json.loads((self.folder / "status.json").read_text())["progress"]
        return status["done"] if status["stage"] == "train" else -1

    def ended(self) -> int | None:
        """Its exit code; None while it works."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def kill(self) -> bool:
        """SIGKILL; whether it was still alive."""
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        return os.WIFSIGNALED(status)

    def finish(self) -> None:
        """Wait for its good end."""
        _, status = os.waitpid(self.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, (self.folder / "log.txt").read_text()[-3000:]


def kills(home: Path, count: int, seed: int) -> Counter[str]:
    """Kill `count` runs at random moments, resume each to its end, and compare; what happened."""
    dice, ends = random.Random(seed), Counter[str]()
    whole = Trainer(home, {"out": "whole"})
    whole.start()
    began = time.monotonic()
    while whole.step() < 1:
        time.sleep(0.002)
    first = time.monotonic() - began
    whole.finish()
    reach = time.monotonic() - began
    wanted = digest(home / "adapters" / "whole")
    number = 0
    while ends["killed"] < count:
        number += 1
        trainer = Trainer(home, {"out": f"broken-{number}"})
        trainer.start()
        # From just before the first step until after the last one: at steps, in saves, while it publishes.
        time.sleep(0.9 * first + dice.random() * (reach - 0.9 * first))
        if not trainer.kill():
            # The machine has become faster than it was: the moments must lie within a run.
            ends["had ended"] += 1
            reach = max(0.95 * reach, 1.2 * first)
            continue
        ends["killed"] += 1
        ends["with a checkpoint" if checkpoints.latest(trainer.folder) else "without one"] += 1
        ends["in a save"] += any(".tmp-" in path.name for path in trainer.folder.rglob("*"))
        trainer.start()
        trainer.finish()
        equal = digest(home / "adapters" / f"broken-{number}") == wanted
        ends["equal" if equal else "different"] += 1
    return ends


def pair(home: Path, count: int, seed: int) -> dict[str, Any]:
    """Losses of a run that `count` processes share, and of the same run in one; each as its log says."""
    told = {**TOLD, "model": "tiny", "data": str(home / "texts.jsonl"), "dtype": "float32", "dropout": 0.0}
    told |= {"logging_steps": 1, "accumulation": 2, "batch_size": 4, "max_steps": 6, "home": str(home), "device": "cpu"}
    found = {}
    for world in (1, count):
        recipe = home / f"run-{world}.yaml"
        recipe.write_text(yaml.safe_dump({**told, "out": f"by-{world}"}), encoding="utf-8")
        port = free_port()
        children = [_rank(recipe, rank, world, port) for rank in range(world)]
        for child in children:
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0, (home / f"rank-{world}.txt").read_text()[-3000:]
        found[str(world)] = publish.read_manifest(home / "adapters" / f"by-{world}")["losses"]
        job = jobs.list_jobs(home)[0]
        rows = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
        found[f"{world} rows"] = [[row.get("loss", 0.0), row.get("eval_loss", 0.0)] for row in rows]
    found["runs"] = len(jobs.list_jobs(home))
    return found


def _rank(recipe: Path, rank: int, world: int, port: int) -> int:
    """A process of those that share a run, as torchrun starts it."""
    child = os.fork()
    if child:
        return child
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    if world > 1:
        os.environ |= {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    with (recipe.parent / f"rank-{world}.txt").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os._exit(finetune_task.main([str(recipe)]))


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> None:
    action, guide, place, number, seed = sys.argv[1:]
    torch.set_num_threads(1)
    home = furnish(Path(place), Path(guide))
    print(json.dumps({"kills": kills, "pair": pair}[action](home, int(number), int(seed))))


if __name__ == "__main__":
    main()
