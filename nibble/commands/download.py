"""`nibble download REPO`: a model or a data set from a hub, in this very process, with one line of progress."""

from __future__ import annotations

import argparse
from pathlib import Path

from nibble.config import HUBS, Settings
from nibble.jobs import run_foreground

SETTINGS = ["home", "hubs"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's own flags."""
    parser.add_argument("repo", metavar="REPO", help="org/name on the hub, or the address of its page there")
    parser.add_argument("--hub", choices=HUBS, default="", help="ask this hub alone instead of those of the settings")
    parser.add_argument("--revision", metavar="R", default="", help="branch, tag or commit")
    parser.add_argument("--name", metavar="N", default="", help="its name here (default: org__name)")
    parser.add_argument(
        "--file", metavar="F", default="",
        help="one GGUF file instead of the Hugging Face form; of a data set the file or folder to take",
    )  # fmt: skip
    parser.add_argument("--dataset", action="store_true", help="it is a data set, which goes into home/data")


def run(arguments: argparse.Namespace, settings: Settings) -> None:
    """Download it, and say how to go on with it."""
    spec = {key: getattr(arguments, key) for key in ("repo", "hub", "revision", "name", "file", "dataset", "config")}
    spec |= {"home": str(settings.home_folder), "hubs": list(settings.hubs)}
    done = run_foreground("download", {key: value for key, value in spec.items() if value}, home=settings.home_folder)
    print(f"{done['name']}: {done['bytes'] / 1e6:,.1f} MB in {done['folder']}")
    if (settings.home_folder / "data").resolve() in Path(done["folder"]).resolve().parents:
        print(f"Train on it:   python -m nibble finetune --data {done['name']}")
    elif not arguments.file:
        print(f'Chat with it:   python -m nibble ask --model {done["name"]} "Hello"')
