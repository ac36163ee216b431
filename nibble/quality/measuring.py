"""Measures models one after the other, each in a process of its own, and puts the figures into one report.

Promises that a reference which does not fit into memory is left out, saying so, that nothing is left on disk however
this ends, and that two models of different vocabularies are refused. Imports no torch.
"""

from __future__ import annotations

import filecmp
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from nibble import __version__
from nibble.checkpoint import read_config, weight_files
from nibble.errors import DataError, ModelError
from nibble.library import GUIDE, GUIDE_FOLDER, ModelCard, inspect
from nibble.lowbit.formats import FORMATS, resolve
from nibble.quality.processes import ask
from nibble.quality.text import read_text

TOKENS = 4096
"""Tokens that are predicted unless another number is asked for."""

MAX_REFERENCE_BYTES = 2 * 2**30
"""The file of the reference's log-probabilities, at most: 3,500 tokens of a vocabulary of 150,000."""

PROCESS_BYTES = 700 * 10**6
"""Python, torch, and the logits of one window, beside a model's weights."""

FIGURES = (
    "perplexity", "kl_mean", "kl_p95", "top1", "size_bytes", "load_s", "peak_bytes", "steady_bytes", "tokens_per_s",
    "bits_per_weight", "layers",
)  # fmt: skip
"""What a report says of each format, besides `format` and `name`; null is what could not be measured."""


class Reports(Protocol):
    """Whom to tell: the part of `nibble.tasks.Report` that is needed here."""

    def progress(self, done: float, total: float, unit: str = "", stage: str = "") -> None:
        """Tell how far it is."""

    def note(self, text: str) -> None:
        """Tell one line for a person."""


class Silent:
    """Tells nobody."""

    def progress(self, done: float, total: float, unit: str = "", stage: str = "") -> None:
        """As `Reports`."""

    def note(self, text: str) -> None:
        """As `Reports`."""


@dataclass(frozen=True)
class Subject:
    """A model to be measured: a packed folder as it is, or a dense one packed while it is loaded."""

    folder: Path
    low_bit: str = ""
    """Name of a format; empty for a packed folder, whose own it is."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    """As `modules_to_not_convert`; like `overrides` for a dense folder only."""

    @property
    def name(self) -> str:
        """What to call its folder."""
        return folder_name(self.folder)

    @property
    def options(self) -> dict[str, Any]:
        """How `nibble.transformers` is told to load it."""
        if not self.low_bit:
            return {"load_in_low_bit": None}
        options: dict[str, Any] = {"load_in_low_bit": self.low_bit}
        if self.overrides:
            options["overrides"] = dict(self.overrides)
        if self.skip:
            options["modules_to_not_convert"] = list(self.skip)
        return options


@dataclass(frozen=True)
class Conditions:
    """What is the same for all models of one comparison."""

    text: Path | None = None
    """None is the text that ships with Nibble."""
    tokens: int = TOKENS
    device: str = "cpu"
    trusted: tuple[str, ...] = ()
    """Names of models whose own Python code may run."""
    scratch: Path | None = None
    """Where the reference's log-probabilities may lie meanwhile; None is the system's place for temporary files."""


def measure(
    folder: Path,
    formats: Sequence[str],
    *,
    text: Path | None = None,
    tokens: int = TOKENS,
    against: Path | None = None,
    device: str = "cpu",
    trusted: Sequence[str] = (),
    report: Reports | None = None,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """Measure one model in some formats, or a packed one as it is.

    Args:
        folder: a model's folder.
        formats: names of formats that a dense model is packed in; none for a packed folder.
        text: a file, as `nibble.quality.text.read_text` takes it; None is the text that ships with Nibble.
        tokens: predicted tokens; fewer where the text ends or the vocabulary is so large that the file of the
            reference's log-probabilities would exceed 2 GiB.
        against: folder of a dense model of the same vocabulary to compare with; None is `folder` itself where dense.
        device: auto, cpu, xpu or cuda.
        trusted: names of models whose own Python code may run.
        report: told the stage `evaluate`, and what is to be said.
        scratch: as in `Conditions`.

    Returns:
        JSON: `model`, `text` {name, tokens, sha256}, `device`, `reference` and `formats`, `versions`, `measured`, a
        Unix time. `reference` is null where there is none; else it and each of `formats` has `format`, `name` and
        FIGURES.

    Raises:
        NibbleError: a folder, format or text that cannot be used; vocabularies that differ; a process that died.
    """
    card = inspect(folder, folder_name(folder))
    packed = is_packed(card)
    names = [resolve(name).name for name in formats]
    if packed and names not in ([], [card.format]):
        raise ModelError(
            f"{card.name} is packed as {card.format} already and is measured as it is.",
            "To try other formats, measure its full-precision original.",
        )
    subjects = [Subject(folder)] if packed else [Subject(folder, name) for name in dict.fromkeys(names)]
    reference = against or (None if packed else folder)
    conditions = Conditions(text, tokens, device, tuple(trusted), scratch)
    return compare(subjects, reference, conditions, report) | {"model": card.name}


def compare(
    subjects: Sequence[Subject], reference: Path | None, conditions: Conditions, report: Reports | None = None
) -> dict[str, Any]:
    """Measure several models on the same text, each beside the same reference.

    Args:
        subjects: the models.
        reference: folder of a dense model; None compares with nothing, so that KL and agreement are null.
        conditions: text, device and the like.
        report: told the stage `evaluate`, and what is to be said.

    Returns, raises: as `measure`; `model` is the first subject's name.
    """
    if conditions.tokens < 1:
        raise DataError(f"{conditions.tokens} tokens cannot be measured on.", "Ask for some thousand.")
    text = read_text(conditions.text)
    with Bench(conditions, report or Silent(), len(subjects) + (2 if reference else 0)) as bench:
        for subject in subjects:
            if reference and subject.folder != reference:
                bench.check_vocabulary(subject.folder, reference)
        full = bench.take_reference(reference) if reference else None
        rows = [bench.measure(subject) for subject in subjects]
    return {
        "model": subjects[0].name if subjects else full["name"] if full else "",
        "text": {"name": text.name, "tokens": bench.positions, "sha256": text.sha256},
        "device": bench.device,
        "reference": full,
        "formats": rows,
        "versions": {"nibble": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        "measured": time.time(),
    }


class Bench:
    """The children of one comparison: asks them in turn and hands what one has found to the next.

    Within `with` it holds the file of the reference's log-probabilities, which has no name: it goes with the process.
    """

    def __init__(self, conditions: Conditions, report: Reports, count: int) -> None:
        """
        Args:
            conditions: text, device and the like.
            report: told how far it is.
            count: children that will be asked, for the progress.
        """
        self._conditions = conditions
        self._report = report
        self._count, self._done = count, 0
        self._file = tempfile.TemporaryFile(dir=conditions.scratch)  # noqa: SIM115 - closed by __exit__
        self._shared: dict[str, Any] = {}
        """For every later child: the windows, the tokenizer's fingerprint and, with a reference, its file."""
        self._reference: Path | None = None

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def positions(self) -> int:
        """Tokens that each model predicted."""
        return sum(len(window) - 1 for window in self._shared.get("windows", ()))

    @property
    def device(self) -> str:
        """What they ran on."""
        return str(self._shared.get("device", self._conditions.device))

    def check_vocabulary(self, folder: Path, reference: Path) -> None:
        """Refuse two models whose tokens mean different things, before the long work begins.

        Raises:
            ModelError: they do.
        """
        ours, theirs = folder / "tokenizer.json", reference / "tokenizer.json"
        if ours.is_file() and theirs.is_file() and filecmp.cmp(ours, theirs, shallow=False):
            return
        self._count += 2
        self._ask(reference, {"work": "tokens"})
        self._ask(folder, {"work": "tokens", "against": folder_name(reference)})

    def take_reference(self, folder: Path) -> dict[str, Any] | None:
        """Its row, or None where it does not fit into memory. Its errors of layers can be told all the same."""
        card = inspect(folder, folder_name(folder))
        if is_packed(card):
            raise ModelError(
                f"{card.name} is packed as {card.format}, so it is no reference.",
                "Compare with a full-precision model.",
            )
        self._reference = folder
        room = min(MAX_REFERENCE_BYTES, self._room())
        found = self._ask(
            folder, {"work": "reference", "fd": self._file.fileno(), "room": room, "needed": reference_bytes(card)}
        )
        if "free" in found:
            self._report.note(
                f"{card.name} in full precision needs about {reference_bytes(card) / 1e9:.1f} GB of memory, and "
                f"{found['free'] / 1e9:.1f} GB are free: measured without it, so KL and agreement are not known."
            )
            self._done += 1
            return None
        self._shared |= {"fd": self._file.fileno(), "vocabulary": found["vocabulary"], "against": card.name}
        if self.positions < self._conditions.tokens:
            self._report.note(
                f"{self.positions} tokens are measured, of {self._conditions.tokens} that were asked for."
            )
        # How chat would run it: speed and memory are those of bfloat16, where the distributions are float32's.
        chat = self._ask(folder, {"work": "measure", "options": Subject(folder, "bf16").options, "reads": False})
        found = chat | {"perplexity": found["perplexity"], "kl_mean": 0.0, "kl_p95": 0.0, "top1": 1.0}
        return self._row(card.format, card, found)

    def measure(self, subject: Subject) -> dict[str, Any]:
        """The row of one model."""
        card = inspect(subject.folder, subject.name)
        dense = str(self._reference) if self._reference and subject.low_bit != "bf16" else ""
        found = self._ask(subject.folder, {"work": "measure", "options": subject.options, "dense": dense})
        stored = read_config(subject.folder).get("quantization_config") or {}
        overrides = dict(subject.overrides or stored.get("overrides") or {})
        row = self._row(subject.low_bit or card.format, card, found)
        return row | ({"overrides": overrides} if overrides else {})

    def sensitivities(self, folder: Path, formats: Sequence[str]) -> list[dict[str, Any]]:
        """As `nibble.quality.sensitivity.sensitivities`, on the same text."""
        found = self._ask(folder, {"work": "sensitivity", "formats": list(dict.fromkeys(formats))})
        return list(found["sensitivities"])

    def _row(self, name: str, card: ModelCard, found: Mapping[str, Any]) -> dict[str, Any]:
        return {"format": name, "name": card.name} | {key: found.get(key) for key in FIGURES}

    def _ask(self, folder: Path, extra: Mapping[str, Any]) -> dict[str, Any]:
        name = folder_name(folder)
        spec: dict[str, Any] = {
            "folder": str(folder), "name": name, "device": self._conditions.device, "tokens": self._conditions.tokens,
            "text": str(self._conditions.text.resolve()) if self._conditions.text else None,
            "trusted": name in self._conditions.trusted,
        }  # fmt: skip

        def progress(done: float, total: float) -> None:
            self._report.progress(round(self._done + done / max(total, 1), 2), self._count, "models", "evaluate")

        progress(0, 1)
        found = ask({**spec, **self._shared, **extra}, progress, fds=[self._file.fileno()])
        self._done += 1
        progress(0, 1)
        self._shared |= {key: found[key] for key in ("fingerprint", "windows", "device")}
        return found

    def _room(self) -> int:
        """Bytes that the reference's file may take: half of what is free where it lies."""
        return shutil.disk_usage(self._conditions.scratch or tempfile.gettempdir()).free // 2


def is_packed(card: ModelCard) -> bool:
    """Whether a model's folder is in low bit already.

    Raises:
        ModelError: by another library's method.
    """
    quantized = read_config(card.folder).get("quantization_config")
    if quantized and card.format not in FORMATS:
        raise ModelError(
            f"{card.name} is quantized with {card.format}, which cannot be measured as it is.",
            f"Convert it first: python -m nibble quantize {card.name}.",
        )
    return bool(quantized)


def folder_name(folder: Path) -> str:
    """What a model's folder is called in reports."""
    return GUIDE if folder.resolve() == GUIDE_FOLDER else folder.resolve().name


def reference_bytes(card: ModelCard) -> int:
    """About how much memory a dense model takes as a reference: its files, its embedding in float32, the process."""
    config = read_config(card.folder)
    text = config.get("text_config") or config
    embedding = int(text.get("vocab_size") or 0) * int(text.get("hidden_size") or 0)
    size = sum(file.stat().st_size for file in weight_files(card.folder))
    # A tied head is kept apart from the embedding, which is widened.
    return size + embedding * (6 if card.format in ("bf16", "fp16") else 0) + PROCESS_BYTES
