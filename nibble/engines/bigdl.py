"""The engine that runs BigDL-LLM / IPEX-LLM itself, seen from the page: a worker in another Python environment.

Promises that nothing of that environment is imported here. Knows nothing of how its child loads and answers
(`nibble.bigdl.child`).
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from nibble import library, screen
from nibble.bigdl import folders
from nibble.config import Settings
from nibble.engines.base import LoadSpec
from nibble.engines.worker import COMMAND, ROOT, WorkerEngine
from nibble.errors import ConfigError
from nibble.library import ModelCard

CHILD = "nibble.bigdl.child"


def interpreter(settings: Settings) -> Path:
    """The Python of BigDL-LLM's environment; a relative path in the settings is one from the checkout.

    Raises:
        ConfigError: there is none.
    """
    # Not resolved: an interpreter of a virtual environment is a link, and knows its environment by the link's place.
    python = ROOT / Path(settings.bigdl_python).expanduser()
    if not python.is_file():
        raise ConfigError(
            f"engine is bigdl, but there is no {python}.",
            "Run `make bigdl`, or name the Python of an environment with ipex-llm or bigdl-llm in bigdl_python.",
        )
    return python


def library_of(python: Path) -> str:
    """Name and version of the library in an interpreter's environment, without importing it.

    Raises:
        ConfigError: it has neither, or does not run.
    """
    for package in ("ipex-llm", "bigdl-llm"):
        code = f"import importlib.metadata; print({package!r}, importlib.metadata.version({package!r}))"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=ROOT)  # noqa: S603
        if done.returncode == 0:
            return done.stdout.strip()
    raise ConfigError(f"{python} has neither ipex-llm nor bigdl-llm.", "Run `make bigdl`.")


def make_worker(spec: LoadSpec, settings: Settings, command: Sequence[str] = ()) -> WorkerEngine:
    """The worker for a model, of the engine in the settings. Nothing is started yet.

    Args:
        spec: the model.
        settings: name the engine, and the Python of BigDL-LLM's environment.
        command: how to start the child, in place of the engine's own.

    Raises:
        ConfigError: the engine is bigdl, and its environment is not there.
    """
    if settings.engine == "nibble" or command:
        return WorkerEngine(spec, command or COMMAND)
    return WorkerEngine(spec, (str(interpreter(settings)), "-m", CHILD))


def judge(folder: Path, name: str, *, trusted: bool, settings: Settings) -> ModelCard:
    """What a folder holds, once it is sure that the engine in the settings may load it.

    Raises:
        ModelError: it cannot or must not be loaded.
        ConfigError: as `interpreter`.
    """
    if settings.engine == "nibble":
        screen.check(folder, trust_remote_code=trusted)
        return library.inspect(folder, name)
    interpreter(settings)
    folders.check(folder, trusted=trusted)
    return folders.card(folder, name)


def models(settings: Settings) -> list[ModelCard]:
    """The models on this machine, each with what keeps the engine in the settings from loading it."""

    def judged(folder: Path, name: str) -> ModelCard:
        return judge(folder, name, trusted=name in settings.trust_remote_code, settings=settings)

    return library.models(settings.home_folder, judged, settings.trust_remote_code)
