"""What `ask` and `chat` share: the flags of the model and of sampling, and the engine that they open."""

from __future__ import annotations

import argparse
from dataclasses import fields

from nibble.config import Settings
from nibble.engines.base import Engine, LoadSpec, Sampling
from nibble.engines.bigdl import judge, make_worker
from nibble.errors import ConfigError, NibbleError
from nibble.library import NAME, find
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


def load_engine(settings: Settings) -> Engine:
    """The model that the settings name, loaded in this process, or in BigDL-LLM's where that is the engine.

    Raises:
        NibbleError: no such model, or one that cannot be loaded.
    """
    # Looked up before torch is imported: a wrong name answers at once.
    folder = find(settings.model, settings.home_folder, paths=True)
    trusted = folder.name in settings.trust_remote_code
    if settings.engine == "bigdl":
        name = settings.model if NAME.fullmatch(settings.model) else folder.name
        judge(folder, name, trusted=trusted, settings=settings)
        spec = LoadSpec(str(folder.resolve()), settings.low_bit, settings.device, name, trust_remote_code=trusted)
        worker = make_worker(spec, settings)
        worker.load()
        return worker
    check(folder, trust_remote_code=trusted)
    refuse_bombs(templates(folder))
    from nibble.engines.local import LocalEngine

    return LocalEngine.load(folder, low_bit=settings.low_bit, device=settings.device, trust_remote_code=trusted)
