"""`nibble models`: the models on this machine, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from nibble.config import Settings
from nibble.engines.bigdl import models
from nibble.library import ModelCard

SETTINGS = ["home"]

COLUMNS = ("name", "family", "parameters", "format", "size", "context", "problem")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's own flags."""
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def run(arguments: argparse.Namespace, settings: Settings) -> None:
    """Print what is there."""
    cards = models(settings)
    if arguments.json:
        print(json.dumps([asdict(card) | {"folder": str(card.folder)} for card in cards], indent=2, ensure_ascii=False))
        return
    rows = [COLUMNS, *(_row(card) for card in cards)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\nhome: {settings.home_folder}")


def _row(card: ModelCard) -> tuple[str, ...]:
    if card.problem:
        return (card.name, "-", "-", "-", "-", "-", card.problem)
    size = f"{card.size_bytes / 1e6:.1f} MB" if card.size_bytes < 1e9 else f"{card.size_bytes / 1e9:.2f} GB"
    millions = f"{card.parameters / 1e6:.1f} M" if card.parameters < 1e9 else f"{card.parameters / 1e9:.2f} B"
    return (card.name, card.family, millions, card.format, size, f"{card.context:,}", "")
