"""From a checkpoint into low-bit folders: every tensor is read once, whatever the number of folders.

Promises that each folder appears whole or not at all, that the disk is asked for room before anything is written, and
that no more than one tensor and one shard is in memory. Knows nothing of jobs and names.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from nibble import __version__, publish
from nibble.errors import ModelError
from nibble.lowbit.blocks import QuantizedTensor, quantize
from nibble.lowbit.formats import Format
from nibble.packing.planning import Output, Packing, Plan, dense, plan
from nibble.shards import SHARD_BYTES, Writer
from nibble.sources.base import Source
from nibble.transformers import AutoModelForCausalLM, save_low_bit


class Progress(Protocol):
    """What is told while tensors are packed: the part of `nibble.tasks.Report` that is used here."""

    def progress(self, done: float, total: float, unit: str = "", stage: str = "") -> None:
        """Tell that `done` of `total` units are done."""

    def note(self, text: str) -> None:
        """Tell one line for a person."""


@dataclass(frozen=True)
class Packed:
    """A folder that was written."""

    folder: Path
    format: str
    nbytes: int
    """Of the weights."""
    kept: int
    """Weights that the source had in this very form, taken bit for bit."""


def pack(source: Source, wanted: Mapping[Path, Packing], report: Progress) -> list[Packed]:
    """Write a low-bit folder for each of several packings.

    Args:
        source: a checkpoint.
        wanted: folder to write -> what is to stand there; an earlier model of ours there is replaced whole.
        report: told the tensors that are done.

    Raises:
        FormatError, ModelError: as `plan`; a tensor holds numbers that do not fit; the disk has no room; a folder is
            in use, or holds something else.
        OSError: writing failed; what stood there is untouched.
    """
    plans = {folder: plan(source, packing) for folder, packing in wanted.items()}
    require_room({folder: made.nbytes for folder, made in plans.items()}, source.name)
    streamed = {folder: made for folder, made in plans.items() if not made.merged}
    results = _stream(source, streamed, report) if streamed else {}
    for folder, made in plans.items():
        if made.merged:
            results[folder] = _load_and_save(source, made, folder, report)
    return [results[folder] for folder in wanted]


def require_room(sizes: Mapping[Path, int], name: str, doing: str = "Packing") -> None:
    """Refuse work for which the disk has no room.

    Args:
        sizes: folder that is to be written -> its bytes; all on one file system.
        name: whose work it is, for the sentence.
        doing: what the work is, for the sentence.

    Raises:
        ModelError: how much it needs and how much is free.
    """
    need = sum(sizes.values())
    folder = next(iter(sizes)).parent
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if need > free:
        scale, unit = (1e9, "GB") if need >= 1e8 else (1e6, "MB")
        raise ModelError(
            f"{doing} {name} needs {need / scale:.1f} {unit} in {folder}, {free / scale:.1f} {unit} are free.",
            "Delete what you no longer need, or set `home` to a folder on a larger disk.",
        )


def _stream(source: Source, plans: Mapping[Path, Plan], report: Progress) -> dict[Path, Packed]:
    kept = dict.fromkeys(plans, 0)
    names = [name for name in source.tensors if any(name in made.outputs for made in plans.values())]
    with ExitStack() as publications:
        fresh = {
            folder: publications.enter_context(publish.publication(folder, _facts(source, made)))
            for folder, made in plans.items()
        }
        writers = {folder: Writer(path, SHARD_BYTES // len(plans)) for folder, path in fresh.items()}
        for done, name in enumerate(names):
            report.progress(done, len(names), "tensors", "pack")
            stored = source.tensors[name]
            value = stored.read()
            plain: dict[torch.dtype, torch.Tensor] = {}
            for folder, made in plans.items():
                for output in made.outputs.get(name, ()):
                    if isinstance(output.form, torch.dtype):
                        # The same tensor for all folders: an embedding is often the largest thing in memory.
                        if output.form not in plain:
                            plain[output.form] = dense(value).to(output.form)
                        writers[folder].add(output.name, plain[output.form])
                        continue
                    packed = _packed(output, output.form, value, source.name)
                    writers[folder].add(output.name, packed.codes)
                    writers[folder].add(f"{output.name}_scale", packed.scales)
                    kept[folder] += output.form.name == stored.low_bit
        for folder, made in plans.items():
            writers[folder].finish()
            _write_config(made, source, fresh[folder])
        report.progress(len(names), len(names), "tensors", "pack")
    return {folder: Packed(folder, made.config.low_bit, made.nbytes, kept[folder]) for folder, made in plans.items()}


def _packed(output: Output, form: Format, value: torch.Tensor | QuantizedTensor, source: str) -> QuantizedTensor:
    if isinstance(value, QuantizedTensor) and value.format == form:
        return value
    try:
        return quantize(dense(value), form.name)
    except ModelError as error:
        raise ModelError(f"{output.name} of {source} cannot be packed. {error.message}", error.hint) from None


def _facts(source: Source, made: Plan) -> dict[str, Any]:
    facts = {
        "format": made.config.low_bit,
        "source": source.name,
        "parameters": sum(prod(source.tensors[name].shape) for name in made.outputs),
        "versions": {"nibble": __version__, **{name: version(name) for name in ("torch", "transformers")}},
    }
    return facts if source.kind == "safetensors" else facts | {"converted_from": source.kind}


def _write_config(made: Plan, source: Source, fresh: Path) -> None:
    """config.json and generation_config.json as `save_pretrained` writes them, and the source's other files."""
    model = made.model
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(fresh)
    if model.can_generate():
        model.generation_config.save_pretrained(fresh)
    source.copy_files(fresh)


def _load_and_save(source: Source, made: Plan, folder: Path, report: Progress) -> Packed:
    """For families whose layers transformers makes of several tensors: load the model in low bit, then save it."""
    path = getattr(source, "folder", None)
    if source.kind != "safetensors" or path is None:
        raise ModelError(
            f"{made.merged} of {source.name} is made of other tensors, which is not done for {source.kind} files.",
            "Take the model's full-precision version.",
        )
    report.note(f"{source.name} is loaded whole, for {made.merged} is made of other tensors while that is done.")
    report.progress(0, 2, "steps", "pack")
    config = made.config
    model = AutoModelForCausalLM.from_pretrained(
        path, load_in_low_bit=config.low_bit, modules_to_not_convert=config.modules_to_not_convert,
        overrides=config.overrides,
    )  # fmt: skip
    report.progress(1, 2, "steps", "pack")
    save_low_bit(model, folder)
    report.progress(2, 2, "steps", "pack")
    return Packed(folder, config.low_bit, sum(file.stat().st_size for file in folder.glob("*.safetensors")), 0)
