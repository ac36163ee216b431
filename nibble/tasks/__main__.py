"""`python -m nibble.tasks run FOLDER`: the process of one job. Started by nibble.jobs; its words go into the log."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nibble.jobs.work import work


def main() -> None:
    """Do the work of one run folder and end, whatever threads the task has left behind."""
    parser = argparse.ArgumentParser(prog="python -m nibble.tasks")
    parser.add_argument("action", choices=["run"])
    parser.add_argument("folder", type=Path, help="a folder of home/runs")
    parser.add_argument("--lock", type=int, metavar="FD", help="descriptor of run.lock, handed over by the starter")
    arguments = parser.parse_args()
    code = work(arguments.folder.resolve(), arguments.lock)
    # A library's thread or exit handler that never ends would keep the device locked.
    os._exit(code)


if __name__ == "__main__":
    main()
