"""The task `evaluate`: what a model loses in each format, measured and kept.

Promises that a path is taken from a console alone. Imports no torch: models are loaded by child processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nibble import library, publish
from nibble.config import Settings, check_keys, load_settings
from nibble.errors import ModelError
from nibble.lowbit.formats import FORMATS, resolve
from nibble.quality import TOKENS, keep, measure
from nibble.quality.measuring import folder_name, is_packed
from nibble.screen import check
from nibble.tasks import Report

KEYS = ["model", "low_bit", "against", "text", "tokens", "device", "home", "config", "paths", "resume"]
"""What a spec may say; only `model` must be there. `low_bit`: formats; none is all of them for a dense model, and its
own for a packed one. `against`: a dense model to compare with. `text`: a file. `tokens`: to predict. `text`, `home`,
`config` and `paths` are never a visitor's to choose."""


def run(spec: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Measure a model and keep the report.

    Args:
        spec: see KEYS.
        report: told the stage `evaluate`.

    Returns:
        As `nibble.quality.measure`.

    Raises:
        NibbleError: a model, format or text that cannot be used.
    """
    check_keys(spec, KEYS, "evaluate")
    settings = load_settings({"home": spec.get("home") or None}, Path(spec["config"]) if spec.get("config") else None)
    home, paths = settings.home_folder, bool(spec.get("paths"))
    folder = library.find(str(spec.get("model") or ""), home, paths=paths)
    check(folder, trust_remote_code=folder_name(folder) in settings.trust_remote_code)
    card = library.inspect(folder, folder_name(folder))
    packed = is_packed(card)
    wanted = [resolve(name).name for name in spec.get("low_bit") or ()]
    found = measure(
        folder, wanted or ([] if packed else [row.name for row in FORMATS.values() if row.quantized]),
        text=Path(spec["text"]).expanduser() if spec.get("text") and paths else None,
        tokens=int(spec.get("tokens") or TOKENS), against=_against(spec, folder, packed, settings),
        device=str(spec.get("device") or settings.device), trusted=settings.trust_remote_code, report=report,
    )  # fmt: skip
    # Another folder of the same name, given by its path, is not the model that is called so here.
    if folder.resolve() in (library.GUIDE_FOLDER, (home / "models" / card.name).resolve()):
        keep(card.name, home, found, folder if packed else None)
    return found


def _against(spec: Mapping[str, Any], folder: Path, packed: bool, settings: Settings) -> Path | None:
    """The model to compare with: the one named or, for a packed one, that which it was made from, if it is here."""
    home = settings.home_folder
    if spec.get("against"):
        return library.find(str(spec["against"]), home, paths=bool(spec.get("paths")))
    source = str(publish.read_manifest(folder).get("source") or "") if packed else ""
    try:
        original = library.find(source, home)
        return None if is_packed(library.inspect(original)) else original
    except ModelError:
        return None
