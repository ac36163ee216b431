"""The task `merge`: a model out of an adapter and its base, proven, into home/models; in low bit too where asked.

Promises that a path is taken from a console alone, that a merge which is refused or fails leaves no folder, and that
what went wrong is a sentence. Knows nothing of how it is proven.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nibble import adapters, library
from nibble.config import Settings, check_keys, load_settings
from nibble.errors import ModelError, NibbleError
from nibble.lowbit.formats import resolve
from nibble.merging import base
from nibble.publish import MANIFEST
from nibble.tasks import Report, download
from nibble.tasks.quantize import FULL, QUIET

KEYS = ["adapter", "out", "low_bit", "device", "home", "config", "paths", "resume"]
"""What a spec may say; only `adapter` must be there: a name in home/adapters or, where `paths`, a folder. `out`: a name
(default ADAPTER-merged). `low_bit`: formats that it is packed in besides, as OUT-FORMAT. `device`: where answers are
compared. `home`, `config` and `paths` are never a visitor's to choose. A merge that was cut begins anew."""


def run(spec: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Merge an adapter into its base.

    Args:
        spec: see KEYS.
        report: told the stages `merge`, `prove`, `logits` and `pack`.

    Returns:
        `name`, `folder`; `report`, as merge_report.json has it; `models`, a list of `name`, `folder`, `format` and
        `bytes`, the merged one first.

    Raises:
        NibbleError: an adapter that is broken, empty, or of another base; a merge that changes nothing or cannot be
            proven; no room on the disk.
    """
    check_keys(spec, KEYS, "merge")
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    settings = load_settings({"home": spec.get("home") or None}, Path(spec["config"]) if spec.get("config") else None)
    home, paths = settings.home_folder, bool(spec.get("paths"))
    name = str(spec.get("adapter") or "").strip()
    if not name:
        raise ModelError("No adapter is named.", "`nibble models` lists what there is.")
    formats = _formats(spec.get("low_bit"))
    adapter = adapters.read(library.find_adapter(name, home, paths=paths))
    report.progress(0, 0, "", "merge")
    found = base.find(adapter, home, paths=paths)
    out = str(spec.get("out") or "").strip() or f"{adapter.name}-merged"
    folder, packed = _folders(out, formats, found, adapter, settings)
    # It imports torch; a refusal above needs none.
    from nibble.merging import session

    try:
        proven = session.run(
            session.Job(adapter, found, folder, packed, str(spec.get("device") or settings.device), report)
        )
    except OSError as error:
        raise _unwritten(error, home) from error
    for each in (folder, *packed):
        library.drop_report(each.name, home)
    card = library.inspect(folder)
    dense = {"name": card.name, "folder": str(folder), "format": card.format, "bytes": card.size_bytes}
    rows = [{key: row[key] for key in dense} for row in proven["low_bit"]]
    return {"name": folder.name, "folder": str(folder), "report": proven, "models": [dense, *rows]}


def _formats(wanted: Any) -> list[str]:
    """The formats that are asked for, by their own names.

    Raises:
        FormatError, ModelError: one of them is none, or packs nothing.
    """
    names = wanted.split(",") if isinstance(wanted, str) else wanted or ()
    formats = [resolve(str(name).strip()) for name in names if str(name).strip()]
    for fmt in formats:
        if not fmt.quantized:
            raise ModelError(
                f"{fmt.name} packs nothing.", "The merged model is kept as its base is stored; name low-bit formats."
            )
    return list(dict.fromkeys(fmt.name for fmt in formats))


def _folders(
    out: str, formats: list[str], found: base.Base, adapter: adapters.Adapter, settings: Settings
) -> tuple[Path, dict[Path, str]]:
    """Where the model goes, and where its low-bit forms go.

    Raises:
        ModelError: a name that cannot be, or that of the base.
    """
    names = [out, *(f"{out}-{fmt}" for fmt in formats)]
    for name in names:
        if name == library.GUIDE or not library.NAME.fullmatch(name):
            raise ModelError(
                f"{name!r} cannot be a model's name here.",
                f"Use letters, digits, dots, dashes and underscores, and not {library.GUIDE}: --out NAME.",
            )
        if library.has_adapter(name, settings.home_folder):
            raise ModelError(f"An adapter here is called {name}.", "Name another: --out NAME.")
    download.refuse_trust(names, adapter.name, settings.trust_remote_code)
    folders = [settings.home_folder / library.MODELS / name for name in names]
    kept = {place.resolve() for place in (found.folder, found.trained_on)}
    for folder in folders:
        if folder.resolve() in kept:
            raise ModelError(f"{folder.name} would be replaced by what is made of it.", "Name another: --out NAME.")
        if folder.exists() and not (folder / MANIFEST).exists() and any(folder.iterdir()):
            raise ModelError(
                f"{folder.name} is not a model that Nibble has saved, and is kept.", "Name another: --out NAME."
            )
    return folders[0], dict(zip(folders[1:], formats, strict=True))


def _unwritten(error: OSError, home: Path) -> NibbleError:
    if error.errno in FULL:
        return ModelError(
            "The disk became full while the merged model was written; there is no new folder.",
            f"Make room in {home}, then merge again.",
        )
    return ModelError(f"Writing failed: {error.strerror or error}.", f"Check {home} and its permissions.")
