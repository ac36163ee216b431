"""The task `quantize`: a model in low bit, in one or more formats, into home/models.

Promises that a path is taken from a console alone, that every folder is whole or not there, and that what went wrong is
a sentence. Knows nothing of how formats are stored.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nibble import library, screen
from nibble.bigdl.convert import convert
from nibble.bigdl.folders import saved_format
from nibble.checkpoint import is_gguf, read_config
from nibble.config import Settings, check_keys, load_settings
from nibble.errors import ModelError, NibbleError
from nibble.lowbit.formats import ALIASES, Format, resolve
from nibble.publish import MANIFEST
from nibble.quality import SHORT, Limits, Proposal, Subject, compare, keep, pick
from nibble.quality.measuring import Conditions
from nibble.quality.text import read_text
from nibble.tasks import Report, download

KEYS = [
    "model", "low_bit", "out", "skip", "overrides", "evaluate", "text", "pick", "device", "home", "config", "paths",
    "resume",
]  # fmt: skip
"""What a spec may say; only `model` must be there: a name, a hub's org/name or, where `paths`, a folder or GGUF file.
`low_bit`: formats, one folder each; none keeps the forms that the source has. `out`: a name (default MODEL-FORMAT, and
OUT-FORMAT where there are several). `skip`, `overrides`: as `LowBitConfig`. `evaluate`: measure what was lost. `text`:
a file to measure on. `device`: where that is done. `pick`: {"max_kl": nats, "memory_bytes": n}, either of them: choose
the smallest form within these limits, instead of `low_bit`. `text`, `home`, `config` and `paths` are never a visitor's
to choose."""

REMOTE = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+|https://\S+")
"""A model on a hub."""

MAX_KL = 0.05
"""Nats a token that a picked form may lose where only the memory is limited."""

FULL = (errno.ENOSPC, errno.EDQUOT)

QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""Environment of the libraries: their progress bars would fill the log."""


@dataclass(frozen=True)
class Order:
    """A spec, checked."""

    model: str
    low_bit: tuple[str, ...] = ()
    out: str = ""
    skip: tuple[str, ...] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)
    evaluate: bool = True
    text: Path | None = None
    pick: Limits | None = None
    paths: bool = False


def run(spec: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Quantize a model.

    Args:
        spec: see KEYS.
        report: told the stages `download`, `pack` and `evaluate`.

    Returns:
        `models`, a list of `name`, `folder`, `format`, `bytes`, `from_bytes` (the source's), `kept` (weights that the
        source had in this form) and `quality`; `report`, the quality of all together; `pick`, what was proposed.

    Raises:
        NibbleError: a spec, model or format that cannot be used; no room on the disk.
    """
    check_keys(spec, KEYS, "quantize")
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    settings = load_settings({"home": spec.get("home") or None}, Path(spec["config"]) if spec.get("config") else None)
    order = order_from(spec)
    read_text(order.text)  # One that cannot be read is told before hours of work, not after.
    device = str(spec.get("device") or settings.device)
    conditions = Conditions(text=order.text, device=device, trusted=settings.trust_remote_code)
    origin = _origin(order, settings, report)
    proposal = _pick(order, origin, conditions, report) if order.pick else None
    if proposal:
        overrides = dict(proposal.overrides)
        out = order.out or f"{_name(origin)}-picked"
        order = replace(order, low_bit=(proposal.format,), overrides=overrides, out=out)
    try:
        models = _pack(order, origin, settings, report)
        found = _measure(origin, models, conditions, settings, report) if order.evaluate else None
    except OSError as error:
        raise _unwritten(error, settings.home_folder) from error
    rows = {row["name"]: row for row in found["formats"]} if found else {}
    return {
        "models": [model | {"quality": rows.get(model["name"])} for model in models],
        "report": found,
        "pick": proposal.as_dict() if proposal else None,
    }


def order_from(spec: Mapping[str, Any]) -> Order:
    """The order that a spec describes.

    Raises:
        ModelError, FormatError: something in it is not what it must be.
    """
    model = str(spec.get("model") or "").strip()
    if not model:
        raise ModelError("No model is named.", "Name one that is here, or one on a hub: org/name.")
    names = spec.get("low_bit") or ()
    formats = [resolve(name) for name in (names.split(",") if isinstance(names, str) else names)]
    for fmt in formats:
        if not fmt.quantized:
            raise ModelError(
                f"{fmt.name} packs nothing.", "Choose a low-bit format; a model in full precision is loaded as it is."
            )
    out = str(spec.get("out") or "").strip()
    if out == library.GUIDE or (out and not library.NAME.fullmatch(out)):
        raise ModelError(
            f"{out!r} cannot be a model's name here.",
            f"Use letters, digits, dots, dashes and underscores, and not {library.GUIDE}.",
        )
    paths = bool(spec.get("paths"))
    text = Path(spec["text"]).expanduser() if spec.get("text") and paths else None
    overrides = {str(pattern): resolve(name).name for pattern, name in (spec.get("overrides") or {}).items()}
    return Order(
        model, tuple(dict.fromkeys(fmt.name for fmt in formats)), out, tuple(map(str, spec.get("skip") or ())),
        overrides, bool(spec.get("evaluate", True)), text, _limits(spec, formats), paths,
    )  # fmt: skip


def _origin(order: Order, settings: Settings, report: Report) -> Path:
    """The folder or file of the model that is to be quantized; one on a hub is downloaded first."""
    home = settings.home_folder
    file = Path(order.model).expanduser()
    if order.paths and file.suffix == ".gguf" and file.is_file():
        return file.resolve()
    try:
        return library.find(order.model, home, paths=order.paths)
    except ModelError:
        if not REMOTE.fullmatch(order.model):
            raise
    spec = {"repo": order.model, "home": str(home), "hubs": list(settings.hubs)}
    here = home / "models" / download.request_from(spec, settings).target
    if not here.is_dir():
        download.run(spec, _Renamed(report))
    return here


def _limits(spec: Mapping[str, Any], formats: list[Format]) -> Limits | None:
    wanted = spec.get("pick")
    if not wanted:
        return None
    if formats:
        raise ModelError("Either a format is named, or one is to be picked.", "Leave one of the two out.")
    if spec.get("skip") or spec.get("overrides"):
        raise ModelError(
            "What is picked is packed as it was measured, with no layer kept or changed by hand.",
            "Leave the layers out, or name a format yourself.",
        )
    check_keys(wanted, ["max_kl", "memory_bytes"], "pick")
    loss = wanted.get("max_kl")
    return Limits(MAX_KL if loss is None else float(loss), int(wanted.get("memory_bytes") or 0))


def _pick(order: Order, origin: Path, conditions: Conditions, report: Report) -> Proposal:
    """The smallest form within the limits.

    Raises:
        ModelError: there is none.
    """
    if not _in_full(origin):
        raise ModelError(
            f"{_name(origin)} is not in full precision, so what a format loses cannot be told.", "Name a format."
        )
    screen.check(origin, trust_remote_code=_name(origin) in conditions.trusted)
    assert order.pick is not None
    proposal = pick(origin, order.pick, replace(conditions, tokens=SHORT.tokens), report)
    if not proposal.holds:
        raise ModelError(proposal.why, "Allow more memory or a larger loss, or name a format yourself.")
    report.note(proposal.why)
    return proposal


class _Renamed:
    """A report whose every stage is called `download`."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.note = report.note

    def progress(self, done: float, total: float, unit: str = "", stage: str = "") -> None:
        """As `nibble.tasks.Report`."""
        self._report.progress(done, total, unit, "download")


def _pack(order: Order, origin: Path, settings: Settings, report: Report) -> list[dict[str, Any]]:
    if origin.is_dir() and (origin / "config.json").exists() and saved_format(read_config(origin)):
        return [_convert(order, origin, settings, report)]
    # These import torch; a refusal above needs none.
    from nibble.packing import Packing, pack, plan
    from nibble.sources import open_source

    name = _name(origin)
    source = open_source(origin, trusted=name in settings.trust_remote_code)
    packings = [Packing(low_bit, order.skip, order.overrides) for low_bit in order.low_bit or ("",)]
    formats = order.low_bit or (plan(source, packings[0]).config.low_bit,)
    folders = _folders(order, name, formats, settings, origin)
    _void(folders, settings.home_folder)
    written = pack(source, dict(zip(folders, packings, strict=True)), report)
    if source.kind != "safetensors" and not all(packed.kept for packed in written):
        report.note(
            f"{name} was packed already, and another format loses a second time; without one it stays as it is."
        )
    before = sum(stored.nbytes for stored in source.tensors.values())
    return [_told(packed.folder, packed.format, packed.nbytes, before, packed.kept) for packed in written]


def _told(folder: Path, name: str, size: int, before: int, kept: int) -> dict[str, Any]:
    """What the result says of one model."""
    return {
        "name": folder.name, "folder": str(folder), "format": name, "bytes": size, "from_bytes": before, "kept": kept,
    }  # fmt: skip


def _folders(order: Order, name: str, formats: tuple[str, ...], settings: Settings, origin: Path) -> list[Path]:
    """Where each format goes.

    Raises:
        ModelError: onto the model itself, or onto a name whose own code may run.
    """
    stem = order.out or name
    names = [stem] if order.out and len(formats) == 1 else [f"{stem}-{fmt}" for fmt in formats]
    download.refuse_trust(names, name, settings.trust_remote_code)
    for each in names:
        if not library.NAME.fullmatch(each):
            raise ModelError(f"{each!r} cannot be a model's name here.", "Choose another name: --out NAME.")
    folders = [settings.home_folder / "models" / each for each in names]
    # A GGUF file may lie within the folder, and either may be reached through a link.
    if any(origin.resolve().is_relative_to(folder.resolve()) for folder in folders):
        raise ModelError(
            f"{origin.name} would be replaced by its own low-bit form.", "Choose another name: --out NAME."
        )
    return folders


def _void(folders: list[Path], home: Path) -> None:
    """Forget what was measured of the models that are to be replaced; a kill later leaves no figures of another."""
    for folder in folders:
        # A folder that is not ours will be refused, and keeps its report.
        if (folder / MANIFEST).exists() or not folder.exists():
            library.drop_report(folder.name, home)


def _convert(order: Order, origin: Path, settings: Settings, report: Report) -> dict[str, Any]:
    """A folder of BigDL-LLM or IPEX-LLM: taken as it is stored."""
    saved = saved_format(read_config(origin))
    name = ALIASES.get(saved, saved)
    if order.low_bit not in ((), (name,)) or order.skip or order.overrides:
        raise ModelError(
            f"{origin.name} was packed as {saved} by BigDL-LLM or IPEX-LLM, and packing it again would lose twice.",
            "Convert it as it is, without a format; or quantize the full-precision model that it was made from.",
        )
    [folder] = _folders(order, origin.name, (name,), settings, origin)
    _void([folder], settings.home_folder)
    result = convert(origin, folder, lambda done, total: report.progress(done, total, "B", "pack"))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    before = sum(file.stat().st_size for file in origin.glob("*.bin"))
    return _told(folder, result.format, size, before, 0)


def _measure(
    origin: Path, models: list[dict[str, Any]], conditions: Conditions, settings: Settings, report: Report
) -> dict[str, Any] | None:
    """What the new models lost, beside the original where that is in full precision; kept with each of them.

    None where it could not be measured: the models are there all the same.
    """
    folders = [Path(model["folder"]) for model in models]
    reference = origin if _in_full(origin) else None
    try:
        found = compare([Subject(folder) for folder in folders], reference, conditions, report)
    except NibbleError as error:
        report.note(f"What was lost could not be measured. {error}")
        return None
    found["model"] = _name(origin)
    for folder, row in zip(folders, found["formats"], strict=True):
        keep(folder.name, settings.home_folder, found | {"model": folder.name, "formats": [row]}, folder)
    if origin in (library.GUIDE_FOLDER, settings.home_folder / "models" / origin.name):
        keep(found["model"], settings.home_folder, found)
    return found


def _in_full(origin: Path) -> bool:
    """Whether it is a folder in full precision."""
    if not (origin / "config.json").exists():
        return False
    config = read_config(origin)
    return not screen.packing(origin, config) and not saved_format(config) and not is_gguf(origin)


def _name(origin: Path) -> str:
    """What to call the model in a folder, or in a GGUF file."""
    if origin == library.GUIDE_FOLDER:
        return library.GUIDE
    return origin.stem if origin.is_file() else origin.name


def _unwritten(error: OSError, home: Path) -> ModelError:
    if error.errno in FULL:
        return ModelError(
            "The disk became full while the model was written; what is there is whole.",
            f"Make room in {home}, then start again.",
        )
    return ModelError(f"Writing failed: {error.strerror or error}.", f"Check {home} and its permissions.")
