"""`nibble evaluate MODEL`: what it loses in each format, as a table or as JSON."""

from __future__ import annotations

import argparse
import json

from nibble.config import Settings
from nibble.jobs import run_foreground
from nibble.quality.table import lines, worst_layers

SETTINGS = ["home", "device"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's own flags."""
    parser.add_argument("model", metavar="MODEL", help="a model's name, or a folder")
    parser.add_argument("--low-bit", metavar="B[,B...]", default="", help="formats (default: all; a packed one's own)")
    parser.add_argument("--against", metavar="MODEL", default="", help="full-precision model to compare with")
    parser.add_argument("--text", metavar="FILE", default="", help="a text of your own: *.txt")
    parser.add_argument("--tokens", metavar="N", type=int, default=0, help="tokens of it to predict (default: 4096)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace, settings: Settings) -> None:
    """Measure, keep and print."""
    spec = {key: getattr(arguments, key) for key in ("model", "against", "text", "tokens", "config")}
    spec |= {"low_bit": [name.strip() for name in arguments.low_bit.split(",") if name.strip()]}
    spec |= {"home": str(settings.home_folder), "device": settings.device, "paths": True}
    # Beside another job on the same device the measured speed would be nobody's: this waits for it.
    device = "cpu" if settings.device == "auto" else settings.device
    wanted = {key: value for key, value in spec.items() if value}
    found = run_foreground("evaluate", wanted, home=settings.home_folder, exclusive=device)
    if arguments.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    print("\n".join([*lines(found), "", *worst_layers(found)]).rstrip())
