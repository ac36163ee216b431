"""The task `finetune`: an adapter trained on a base, into home/adapters; or two steps of it, measured and forgotten.

    torchrun --standalone --nproc-per-node=2 -m nibble.tasks.finetune run.yaml      the same on several devices

Promises that whatever cannot be is refused before a model is loaded, that what ends a run is a sentence, and that of
several processes the first alone writes and tells. Knows nothing of how a step is made.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nibble import jobs, tasks
from nibble.config import load_settings
from nibble.data.store import NotHere
from nibble.errors import NibbleError
from nibble.jobs import run_foreground
from nibble.jobs.folder import JOB_ID, read_run, read_status, write_json
from nibble.jobs.work import work
from nibble.tasks import Report
from nibble.training import checkpoints
from nibble.training.order import Order, order_from, prepare_libraries
from nibble.training.recipe import read_spec

FETCHED_S = 3600
"""How long a process waits for the first one to fetch the data."""


def run(spec: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Fine-tune.

    Args:
        spec: the recipe's settings, and keys of `nibble.training.recipe.SPEC`.
        report: told the stages `prepare`, `train` and `save`, or `measure` in a dry run; a row of numbers at each
            `logging_steps` and each evaluation.

    Returns:
        `name`, `folder`, `adapter`, `steps`, `loss_first`, `loss_last`, `eval_loss`, `eval_loss_before`,
        `seconds_per_step`, `peak_memory_bytes`, `stopped_early`, `checkpoints` and `notes`; of a dry run
        `seconds_per_step`, `peak_memory_bytes`, `total_s`, `steps`, `samples`, `trained_tokens`,
        `trainable_parameters`, `parameters`, `truncated_share`, `free_memory_bytes`, `fits` and `notes`.

    Raises:
        NibbleError: a setting, data set or base that cannot be used; a loss that is no number; too little memory.
    """
    prepare_libraries()
    order = _order(spec, report)
    # It imports torch; a refusal above needs none.
    from nibble.training import session

    with ExitStack() as held:
        folder = report.folder
        if folder is None or order.dry:
            folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="nibble-")))
        return session.run(order, report, folder, leads=leads())


def _order(spec: Mapping[str, Any], report: Report) -> Order:
    """The order of a spec; a data set of a hub that is not here yet is fetched, by the first process alone."""
    try:
        return order_from(spec)
    except NotHere as missing:
        if not leads():
            return _once_fetched(spec)
        from nibble.tasks import download

        wanted = {"repo": missing.name, "dataset": True, "home": spec.get("home"), "config": spec.get("config")}
        download.run(wanted, report)
        return order_from(spec)


def _once_fetched(spec: Mapping[str, Any]) -> Order:
    """The order, once the first process has the data set here; torchrun ends this one where that fails.

    Raises:
        NotHere: the data set did not come, to this machine at least.
    """
    end = time.monotonic() + FETCHED_S
    while True:
        time.sleep(1)
        try:
            return order_from(spec)
        except NotHere:
            if time.monotonic() > end:
                raise


def leads() -> bool:
    """Whether this process is the first of those that share the work, as torchrun and accelerate say."""
    return os.environ.get("RANK", "0") == "0"


class Silent:
    """The report of the other processes."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def progress(self, done: float, total: float, unit: str = "", stage: str = "") -> None:
        """As `nibble.tasks.Report`."""

    def metric(self, **numbers: float) -> None:
        """As `nibble.tasks.Report`."""

    def note(self, text: str) -> None:
        """As `nibble.tasks.Report`."""


def main(argv: Sequence[str] | None = None) -> int:
    """One of several processes that share a run; its exit code.

    A recipe begins a new run. The run.yaml of a job is gone on with in its folder, from its last whole checkpoint.
    """
    parser = argparse.ArgumentParser(prog="python -m nibble.tasks.finetune")
    parser.add_argument("run", type=Path, help="a recipe, or the run.yaml of a job")
    path = parser.parse_args(argv).run.resolve()
    try:
        return _in_place(path.parent) if JOB_ID.fullmatch(path.parent.name) else _anew(path)
    except NibbleError as error:
        sys.stderr.write(f"nibble: {error.message}\n        {error.hint}\n")
        return error.exit_code


def _anew(path: Path) -> int:
    given = read_spec(path)
    home = load_settings({"home": given.get("home")}).home_folder
    spec = {**given, "home": str(home), "paths": True}
    if leads():
        run_foreground("finetune", spec, home=home, keep=True)
    else:
        run(spec, Silent(None))
    return 0


def _in_place(folder: Path) -> int:
    """Go on in a job's folder; every process finds the same checkpoint there."""
    spec = read_run(folder).spec
    if not leads():
        tasks.load("finetune")({**spec, "resume": checkpoints.latest(folder) is not None}, Silent(folder))
        return 0
    if jobs.find(folder.name, folder.parents[1]).live:
        raise NibbleError(f"The run {folder.name} is under way.", f"Stop it first: nibble jobs stop {folder.name}.")
    status = read_status(folder)
    if status is not None and status.pid:
        # What `nibble jobs resume` writes: another attempt, which goes on.
        again = replace(status, state="waiting", attempt=status.attempt + 1, pid=0, cause="", ended=None, result=None)
        write_json(folder / "status.json", asdict(again))
    return work(folder)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # As in nibble.tasks.__main__: no thread of a library may keep a finished process.
    os._exit(code)
