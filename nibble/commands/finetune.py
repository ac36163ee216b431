"""`nibble finetune`: an adapter trained on a base and a data set into home/adapters, in this very process."""

from __future__ import annotations

import argparse
import json
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from nibble.config import Settings, load_settings
from nibble.data import ColumnMap, check
from nibble.data.looking import open_encoder
from nibble.data.store import NotHere
from nibble.jobs import run_foreground
from nibble.jobs.progress import duration, size
from nibble.training.order import order_from, prepare_libraries
from nibble.training.recipe import NAMES, Recipe, from_spec, read_spec

SETTINGS = ["home", "device"]

TOKENS_S = 10.0
"""Time for a look at the tokens of a data set before there is a run."""

ALIASES = {"model": "--base"}
"""Field of the recipe -> the flag's better name on a console; the field's own name works too."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's own flags: one for each field of the recipe."""
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN.yaml", help="a recipe, or the run.yaml of a job")
    for item in fields(Recipe):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        shown = ",".join(default) if isinstance(default, tuple) else default
        names = [f"--{item.name.replace('_', '-')}"]
        names = [ALIASES[item.name], *names] if item.name in ALIASES else names
        prose = f"{item.metadata['prose']} (default: {shown})" if shown not in ("", {}) else item.metadata["prose"]
        options: dict[str, Any] = {"dest": item.name, "default": None, "help": prose.replace("%", "%%")}
        if isinstance(default, bool):
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, **options)
        else:
            parser.add_argument(*names, metavar=item.name.upper(), **options)
    parser.add_argument("--dry-run", action="store_true", help="measure two steps, and keep nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace, settings: Settings) -> None:
    """Train, and say what there is now."""
    prepare_libraries()
    spec = read_spec(arguments.run) if arguments.run else {}
    settings = _as_told(spec, arguments, settings)
    dry = arguments.dry_run or bool(spec.get("dry_run"))
    spec |= {name: getattr(arguments, name) for name in NAMES if getattr(arguments, name) is not None}
    if isinstance(spec.get("columns"), str):
        spec["columns"] = dict(ColumnMap.parse(spec["columns"]).columns)
    recipe = from_spec(spec)
    spec = {**recipe.as_spec(), "model": absolute(recipe.model), "data": absolute(recipe.data)}
    spec |= {"device": settings.device, "home": str(settings.home_folder), "paths": True}
    spec |= {"config": str(Path(arguments.config).resolve())} if arguments.config else {}
    spec |= {"dry_run": True} if dry else {}
    device = "cpu" if settings.device == "auto" else settings.device
    home = settings.home_folder
    judge(spec, home)
    result = run_foreground("finetune", spec, home=home, exclusive=device, keep=not dry)
    if arguments.json:
        print(json.dumps(result, ensure_ascii=False, indent=2))
        return
    print("\n".join(lines(result)))


def _as_told(spec: dict[str, Any], arguments: argparse.Namespace, settings: Settings) -> Settings:
    """The settings, with home and device as a recipe has them where no flag says otherwise."""
    told = {name: spec[name] for name in SETTINGS if spec.get(name) and getattr(arguments, name, None) is None}
    if not told:
        return settings
    return load_settings({**asdict(settings), **told})


def judge(spec: dict[str, Any], home: Path) -> None:
    """Refuse what cannot be trained on before there is a run of it; fetch a data set that is on a hub.

    Raises:
        NibbleError: what is wrong, by its setting, row or column.
    """
    try:
        order = order_from(spec)
    except NotHere as missing:
        run_foreground("download", {"repo": missing.name, "dataset": True, "home": str(home)}, home=home)
        order = order_from(spec)
    mapping = ColumnMap(columns=order.recipe.columns, leave_out=order.recipe.leave_out)
    check(order.data, mapping).require()
    # Tokens take longer: only a set that is read through soon is refused for them here, a longer one by the run.
    encoder = open_encoder(order.base, order.recipe.max_length, trusted=order.trusted)
    found = check(order.data, mapping, encode=encoder.encode, seconds=TOKENS_S)
    if found.complete:
        found.require()


def absolute(name: str) -> str:
    """A path as it reads from every folder; a name as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if "/" in name and path.exists() or path.is_file() else name


def lines(result: dict[str, Any]) -> list[str]:
    """A result for a person."""
    if result.get("dry_run"):
        return [
            f"{result['seconds_per_step']:.2f} s a step, {duration(result['total_s'])} for {result['steps']:,} steps.",
            f"{size(result['peak_memory_bytes'])} of memory at most.",
            f"{result['samples']:,} samples, {result['trained_tokens']:,} tokens trained in a pass; "
            f"{result['trainable_parameters']:,} of {result['parameters']:,} weights.",
        ]
    told = [f"{result['name']}: {result['steps']:,} steps, loss {_arrow(result['loss_first'], result['loss_last'])}"]
    if result["eval_loss"] is not None:
        told[0] += f", held out {_arrow(result['eval_loss_before'], result['eval_loss'])}"
    return [*told, f'Chat with it:   python -m nibble ask --model {result["name"]} "Hello"']


def _arrow(before: float | None, after: float | None) -> str:
    return " → ".join("?" if loss is None else f"{loss:.3f}" for loss in (before, after))
