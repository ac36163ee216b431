"""The command that starts a run on several devices, or on several machines; each starts it for itself.

Promises text to show, never to run. Imports no torch.
"""

from __future__ import annotations

import shlex
from pathlib import Path

TASK = "nibble.tasks.finetune"
PORT = 29500


def launch_command(
    run_yaml: Path | str, devices: int = 2, *, machines: int = 1, machine: int = 0, address: str = "", port: int = PORT
) -> str:
    """The line that starts a recipe or a job's run.yaml on several devices.

    Args:
        run_yaml: the file, at the same place on each machine.
        devices: processes on each machine, one a device.
        machines: how many take part. More than one need `address`, and the base and the data on each.
        machine: which of them this line is for, from 0; the first one writes the adapter.
        address: of the first machine, as the others reach it.
        port: a free one there.
    """
    words = ["torchrun", f"--nproc-per-node={devices}"]
    if machines > 1:
        words += [f"--nnodes={machines}", f"--node-rank={machine}"]
        words += [f"--master-addr={address or 'FIRST-MACHINE'}", f"--master-port={port}"]
    else:
        words += ["--standalone"]
    return shlex.join([*words, "-m", TASK, str(run_yaml)])
