"""`nibble merge ADAPTER`: a model out of an adapter and its base into home/models, and what is proven of it."""

from __future__ import annotations

import argparse
import json

from nibble.config import Settings
from nibble.jobs import run_foreground

SETTINGS = ["home", "device"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's own flags."""
    parser.add_argument("adapter", metavar="ADAPTER", help="an adapter's name (see `nibble models`), or its folder")
    parser.add_argument("--out", metavar="NAME", default="", help="the model's name here (default: ADAPTER-merged)")
    parser.add_argument("--low-bit", metavar="B[,B…]", default="", help="formats that it is kept in besides")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace, settings: Settings) -> None:
    """Merge, and say what is proven and how to chat with it."""
    spec = {
        "adapter": arguments.adapter, "out": arguments.out,
        "low_bit": [name for name in arguments.low_bit.split(",") if name.strip()],
        "device": settings.device, "home": str(settings.home_folder), "config": arguments.config or "", "paths": True,
    }  # fmt: skip
    device = "cpu" if settings.device == "auto" else settings.device
    result = run_foreground("merge", spec, home=settings.home_folder, exclusive=device)
    if arguments.json:
        print(json.dumps(result, ensure_ascii=False, indent=2))
        return
    for line in result["report"]["sentences"]:
        print(line)
    print("")
    for model in result["models"]:
        scale, unit = (1e9, "GB") if model["bytes"] >= 1e9 else (1e6, "MB")
        print(f"{model['name']}: {model['format']}, {model['bytes'] / scale:.1f} {unit}")
    print(f'Chat with it:   python -m nibble ask --model {result["models"][-1]["name"]} "Hello"')
