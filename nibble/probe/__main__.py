"""`python -m nibble.probe --home H`: measure this machine and keep the figures in H/machine.json."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nibble.probe.machine import keep
from nibble.probe.measure import measure


def main() -> int:
    """Measure and write; the exit code is 0 when that was done."""
    parser = argparse.ArgumentParser(prog="python -m nibble.probe", description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="Nibble's home folder")
    keep(measure(), parser.parse_args().home)
    return 0


if __name__ == "__main__":
    sys.exit(main())
