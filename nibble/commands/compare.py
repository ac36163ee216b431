"""`nibble compare ADAPTER_OR_RUN`: base, tuned and checkpoints side by side, as a table, as JSON, or as a page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nibble import jobs, library
from nibble.comparing.page import render
from nibble.comparing.table import lines
from nibble.config import Settings
from nibble.errors import ModelError, NibbleError
from nibble.jobs import run_foreground

SETTINGS = ["home", "device"]

NUMBERS = (
    ("max-new-tokens", int, "longest answer (default: 64)"),
    ("seed", int, "the same for all (default: 42)"),
    ("temperature", float, "0 is greedy (default: the model's own)"),
    ("top-p", float, "sample among the most likely tokens that add up to this"),
    ("top-k", int, "sample among this many most likely tokens"),
    ("repetition-penalty", float, "above 1, words used before become less likely"),
    ("tokens", int, "tokens of neutral text to predict (default: 2048)"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's own flags."""
    parser.add_argument(
        "subject", metavar="ADAPTER_OR_RUN", help="an adapter's name or folder, a run's id, or a model alone"
    )
    parser.add_argument(
        "--checkpoints", metavar="all|100,200", default="", help="checkpoints of the run too (default: none)"
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", action="append", default=[], help="a prompt; may be repeated (default: three)"
    )
    for name, kind, prose in NUMBERS:
        parser.add_argument(f"--{name}", metavar="N", type=kind, help=prose)
    parser.add_argument("--low-bit", metavar="B", default="", help="format of a model alone (default: the setting's)")
    parser.add_argument("--text", metavar="FILE", default="", help="measure what was forgotten on this: *.txt")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the report there as one page")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace, settings: Settings) -> None:
    """Compare, print, and say where the report lies."""
    kind = _kind(arguments.subject, settings.home_folder)
    spec: dict[str, Any] = {kind: arguments.subject, "prompts": arguments.prompt}
    spec |= {name.replace("-", "_"): getattr(arguments, name.replace("-", "_")) for name, _, _ in NUMBERS}
    spec |= {key: getattr(arguments, key) for key in ("checkpoints", "low_bit", "text", "config")}
    spec |= {"home": str(settings.home_folder), "device": settings.device, "paths": True}
    spec = {key: value for key, value in spec.items() if value not in (None, "", [])}
    device = "cpu" if settings.device == "auto" else settings.device
    found = run_foreground("compare", spec, home=settings.home_folder, exclusive=device, keep=True)
    if arguments.html:
        try:
            arguments.html.write_text(render(found), encoding="utf-8", errors="replace")
        except OSError as error:
            raise NibbleError(f"{arguments.html} cannot be written: {error.strerror}.", "Name another file.") from None
    if arguments.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    print("\n".join(lines(found)))
    if arguments.html:
        print(f"\nThe report: {arguments.html}")


def _kind(subject: str, home: Path) -> str:
    """Whether a name means an adapter, a run or a model; an adapter goes first.

    Raises:
        ModelError: none of them.
    """
    try:
        library.find_adapter(subject, home)
        return "adapter"
    except ModelError:
        pass
    try:
        jobs.find(subject, home)
        return "run"
    except NibbleError:
        pass
    try:
        folder = library.find(subject, home, paths=True)
    except ModelError:
        known = ", ".join(card.name for card in library.adapters(home)) or "none yet; fine-tune one"
        raise ModelError(f"There is no adapter, run or model {subject[:200]!r}.", f"Adapters here: {known}.") from None
    return "adapter" if (folder / "adapter_config.json").exists() else "model"
