"""A spec of the task `finetune` with every name in it looked up, so that what cannot be is refused at once.

Promises that a path is taken from a console alone. Imports no torch. Knows nothing of what is in the files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nibble import library, publish, screen
from nibble.config import load_settings
from nibble.data import store
from nibble.errors import ModelError
from nibble.training.recipe import Recipe, from_spec

ENVIRONMENT = {
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "GOMP_SPINCOUNT": "5000",
}
"""Of the libraries, unless set already. Progress bars would fill the log. Threads that spin long while they wait for
each other make a step ten times slower as soon as anything else wants a core (measured: 0.2 to 0.7 s against 5 to 7);
those that do not spin at all cost a tenth where nothing does. 5,000 turns are some ten microseconds."""


@dataclass(frozen=True)
class Order:
    """What is to be trained on what."""

    recipe: Recipe
    name: str
    """Of the adapter."""
    home: Path
    base: Path
    called: str
    """The base's name here."""
    data: Path
    device: str
    """auto, cpu, xpu or cuda."""
    trusted: bool
    """Whether Python code in the base's folder may run."""
    dry: bool
    resume: bool

    @property
    def target(self) -> Path:
        """Where the adapter goes."""
        return self.home / library.ADAPTERS / self.name


def prepare_libraries() -> None:
    """Set `ENVIRONMENT`; in time only before torch is imported."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)


def order_from(spec: Mapping[str, Any]) -> Order:
    """The order that a spec describes.

    Raises:
        NibbleError: a setting that cannot be, a name that leads nowhere, a base that must not be loaded, or an
            adapter's name that is taken.
    """
    recipe = from_spec(spec)
    settings = load_settings({"home": spec.get("home") or None}, Path(spec["config"]) if spec.get("config") else None)
    home, paths = settings.home_folder, bool(spec.get("paths"))
    base = library.find(recipe.model, home, paths=paths)
    called = library.GUIDE if base == library.GUIDE_FOLDER else base.name
    trusted = called in settings.trust_remote_code
    screen.check(base, trust_remote_code=trusted)
    order = Order(
        recipe, name_of(recipe, called), home, base, called, store.find(recipe.data, home, paths=paths),
        str(spec.get("device") or settings.device), trusted, bool(spec.get("dry_run")), bool(spec.get("resume")),
    )  # fmt: skip
    if not order.dry:
        refuse_taken(order.name, home)
    return order


def name_of(recipe: Recipe, called: str) -> str:
    """The adapter's name: the one that was given, or one made of the base's and the data set's.

    Raises:
        ModelError: it cannot be an adapter's name.
    """
    made = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{called}-{Path(recipe.data).stem}").strip(".-_")[:120]
    name = recipe.out or made
    if not library.NAME.fullmatch(name) or name == library.GUIDE:
        raise ModelError(f"{name!r} cannot be an adapter's name.", "Use letters, digits, dots, dashes and underscores.")
    return name


def refuse_taken(name: str, home: Path) -> None:
    """Refuse a name that a model has, or under which something lies that is not an adapter of ours.

    Raises:
        ModelError: either of them.
    """
    if (home / library.MODELS / name).exists():
        raise ModelError(f"A model here is called {name}.", "Give the adapter another name: out.")
    folder = home / library.ADAPTERS / name
    if folder.exists() and not (folder / publish.MANIFEST).exists() and any(folder.iterdir()):
        raise ModelError(f"{folder} exists and is not an adapter that Nibble has made.", "Give another name: out.")
