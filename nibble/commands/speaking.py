"""What `ask` and `chat` share: the flags of the model and of sampling, and the engine that they open."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from nibble.adapters import base_folder, find_model, read
from nibble.config import Settings
from nibble.engines.base import Engine, LoadSpec, Sampling
from nibble.engines.bigdl import judge, make_worker
from nibble.errors import ConfigError, NibbleError
from nibble.library import GUIDE, GUIDE_FOLDER, find, find_adapter
from nibble.prompts.trial import refuse_bombs
from nibble.screen import check, templates

SETTINGS = ["home", "model", "low_bit", "device", "engine"]

NUMBERS: dict[str, type] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "repetition_penalty": float,
    "seed": int,
}
"""Field of Sampling -> type of its flag."""


def add_speaking(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the system prompt and of sampling."""
    parser.add_argument("--adapter", metavar="NAME|DIR", default="", help="an adapter that the model wears")
    parser.add_argument("--system", metavar="TEXT", default="", help="system prompt")
    parser.add_argument("--greedy", action="store_true", help="always the most likely token (temperature 0)")
    for name, kind in NUMBERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper())


def sampling_from(arguments: argparse.Namespace) -> Sampling:
    """Sampling as the flags say; what was not given takes the model's own.

    Raises:
        ConfigError: a number outside its range.
    """
    values = {item.name: getattr(arguments, item.name) for item in fields(Sampling)}
    if arguments.greedy:
        values["temperature"] = 0.0
    try:
        return Sampling(**values)
    except NibbleError as error:
        raise ConfigError(error.message, error.hint) from None


def find_both(settings: Settings, arguments: argparse.Namespace) -> tuple[Path, str]:
    """The folders of the model that the settings name and of the adapter that it wears; the latter may be empty.

    An adapter without a model, or its name in the place of a model's, leads to the model that it belongs to.

    Args:
        settings: what is set.
        arguments: `adapter`, a name or a folder, and `model`, empty where that was left to the settings.

    Raises:
        ModelError: there is no such model or adapter, or the adapter belongs to none that is here.
    """
    home = settings.home_folder
    if arguments.adapter:
        worn = find_adapter(arguments.adapter, home, paths=True)
        model = find(settings.model, home, paths=True) if arguments.model else base_folder(read(worn), home, paths=True)
        return model, str(worn.resolve())
    model, found = find_model(settings.model, home, paths=True)
    return model, str(found.resolve()) if found else ""


def load_engine(settings: Settings, folder: Path) -> Engine:
    """A model loaded in this process, or in BigDL-LLM's where that is the engine.

    Args:
        settings: what is set.
        folder: of the model.

    Raises:
        NibbleError: it cannot be loaded.
    """
    trusted = folder.name in settings.trust_remote_code
    if settings.engine == "bigdl":
        name = GUIDE if folder == GUIDE_FOLDER else folder.name
        judge(folder, name, trusted=trusted, settings=settings)
        spec = LoadSpec(str(folder.resolve()), settings.low_bit, settings.device, name, trust_remote_code=trusted)
        worker = make_worker(spec, settings)
        worker.load()
        return worker
    check(folder, trust_remote_code=trusted)
    refuse_bombs(templates(folder))
    from nibble.engines.local import LocalEngine

    return LocalEngine.load(folder, low_bit=settings.low_bit, device=settings.device, trust_remote_code=trusted)
