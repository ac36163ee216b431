"""`nibble models`: the models and adapters on this machine, or what a model takes in each format; a table, or JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nibble import adapters, estimate, library, probe
from nibble.config import Settings
from nibble.engines.bigdl import models
from nibble.errors import DeviceError, NibbleError
from nibble.estimate import Estimate
from nibble.library import ModelCard
from nibble.probe import Machine
from nibble.quality.kept import kept

SETTINGS = ["home", "low_bit", "device"]

COLUMNS = ("name", "family", "parameters", "format", "size", "context", "memory", "tokens/s", "KL", "problem")
ADAPTER_COLUMNS = ("adapter", "base", "kind", "parameters", "size", "problem")
FORMAT_COLUMNS = ("format", "on disk", "memory", "at its peak", "tokens/s", "fits now")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's own flags."""
    parser.add_argument("name", metavar="NAME", nargs="?", default="", help="a model's name, or a folder")
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def run(arguments: argparse.Namespace, settings: Settings) -> None:
    """Print what is there, or what the model named will take."""
    if arguments.name:
        _one(arguments.name, settings, as_json=arguments.json)
    else:
        _all(settings, as_json=arguments.json)


def _one(name: str, settings: Settings, *, as_json: bool) -> None:
    folder = library.find(name, settings.home_folder, paths=True)
    rows = estimate.estimates(folder, _measured(settings))
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    print(f"{name}, with a conversation of {estimate.CONTEXT:,} tokens (estimates)\n")
    _table([FORMAT_COLUMNS, *map(_format_row, rows)])


def _measured(settings: Settings) -> Machine:
    """This machine, measured now where it was not."""
    home = settings.home_folder
    machine = probe.known(home)
    if machine is None:
        print("Measuring this machine, once ...", file=sys.stderr)
        try:
            machine = probe.ensure(home)
        except DeviceError as error:
            print(f"{error} Memory is estimated without it.", file=sys.stderr)
            machine = probe.unmeasured()
    return machine.on(settings.device)


def _all(settings: Settings, *, as_json: bool) -> None:
    machine = (probe.known(settings.home_folder) or probe.unmeasured()).on(settings.device)
    cards = [(card, _estimate(card, machine, settings), _quality(card, settings)) for card in models(settings)]
    if as_json:
        facts = [
            asdict(card) | {"folder": str(card.folder), "estimate": told and asdict(told), "quality": lost}
            for card, told, lost in cards
        ]
        facts += [
            asdict(card) | {"folder": str(card.folder), "base": _base(card), "estimate": None, "quality": None}
            for card in library.adapters(settings.home_folder)
        ]
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    _table([COLUMNS, *(_row(*entry) for entry in cards)])
    if found := library.adapters(settings.home_folder):
        print()
        _table([ADAPTER_COLUMNS, *map(_adapter_row, found)])
    print(f"\nhome: {settings.home_folder}")


def _estimate(card: ModelCard, machine: Machine, settings: Settings) -> Estimate | None:
    """Of the format that the model would be loaded in; None where its files do not tell."""
    if card.problem:
        return None
    try:
        return estimate.estimates(card.folder, machine, formats=[settings.low_bit])[0]
    except NibbleError:
        return None


def _quality(card: ModelCard, settings: Settings) -> dict[str, Any] | None:
    """What the model has lost in the format that it would be loaded in, where that was measured."""
    rows = (kept(card.name, settings.home_folder) or {}).get("formats", [])
    wanted = [name for name in (card.format, settings.low_bit) if any(row.get("format") == name for row in rows)]
    return next((row for row in rows if wanted and row.get("format") == wanted[-1]), None)


def _row(card: ModelCard, told: Estimate | None, lost: dict[str, Any] | None) -> tuple[str, ...]:
    if card.problem:
        return (card.name, *["-"] * (len(COLUMNS) - 2), card.problem)
    kl = (lost or {}).get("kl_mean")
    return (
        card.name, card.family, _count(card.parameters), card.format, _size(card.size_bytes), f"{card.context:,}",
        _size(told.steady_bytes) if told else "-", _speed(told), f"{kl:.4f}" if isinstance(kl, float) else "-", "",
    )  # fmt: skip


def _adapter_row(card: ModelCard) -> tuple[str, ...]:
    if card.problem:
        return (card.name, *["-"] * (len(ADAPTER_COLUMNS) - 2), card.problem)
    return (card.name, _base(card), card.format, _count(card.parameters), _size(card.size_bytes), "")


def _base(card: ModelCard) -> str:
    """The model that an adapter was trained on."""
    try:
        return adapters.read(card.folder).base or "-"
    except NibbleError:
        return "-"


def _format_row(row: Estimate) -> tuple[str, ...]:
    sizes = (row.disk_bytes, row.steady_bytes, row.peak_bytes)
    return (row.format, *map(_size, sizes), _speed(row), "yes" if row.fits else "no")


def _speed(row: Estimate | None) -> str:
    return f"{row.tokens_per_s:.1f}" if row and row.tokens_per_s else "-"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters < 1e9 else f"{parameters / 1e9:.2f} B"


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
