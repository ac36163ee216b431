"""One merge from an adapter's name to a proven model: whole, or not there.

Promises that merge_report.json lies beside the weights only where everything in it was found in the files, and that a
low-bit form is made of nothing but the files that were proven. Knows nothing of jobs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch

from nibble import __version__, publish
from nibble.adapters import WEIGHTS, Adapter
from nibble.adapters import fingerprint as fingerprint_of
from nibble.checkpoint import read_header, weight_files
from nibble.devices import choose
from nibble.errors import ModelError
from nibble.lowbit.blocks import quantize
from nibble.lowbit.formats import Format
from nibble.merging import logits, proof, survival
from nibble.merging.base import Base
from nibble.merging.changes import read_changes
from nibble.merging.proof import Found
from nibble.merging.writing import Layout, layout, write_settings, write_weights
from nibble.packing import Packing, pack, plan
from nibble.packing.planning import skeleton
from nibble.packing.writing import require_room
from nibble.sources import safetensors
from nibble.sources.safetensors import Safetensors, reader
from nibble.tasks import Report

REPORT = "merge_report.json"

LEAST = 0.05
"""Share of the change that must be left in the stored dtype, lest the new model be the base with some noise."""

DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


@dataclass
class Job:
    """What is merged, and where it goes."""

    adapter: Adapter
    base: Base
    folder: Path
    """Of the new model."""
    packed: Mapping[Path, str]
    """Folder -> format that it is packed in besides."""
    device: str
    report: Report

    def tell(self, stage: str) -> Callable[[int, int], None]:
        """What a step tells its progress."""
        return lambda done, total: self.report.progress(done, total, "tensors", stage)


def run(job: Job) -> dict[str, Any]:
    """Merge, prove, publish; the report as merge_report.json has it.

    Raises:
        ModelError: the adapter does not fit, changes nothing, or is broken; or the merge cannot be proven.
        OSError: writing failed; there is no new folder.
    """
    source = safetensors.open(job.base.folder)
    changes = read_changes(job.adapter, skeleton(source))
    if all(change.empty for change in changes.values()):
        raise ModelError(
            f"{job.adapter.name} is zero: it changes nothing in {job.base.name}.",
            "It has not been trained: train it, or take another adapter.",
        )
    made = layout(source, skeleton(source), changes)
    if job.base.packed:
        _check_origin(job.base, source, made)
    need = sum(source.tensors[output.stored].nbytes for output in made.outputs)
    require_room({job.folder: need}, job.adapter.name, "Merging")
    notes = _notes(job)
    with ExitStack() as undo:
        with publish.publication(job.folder, _facts(job, source, made)) as fresh:
            write_weights(source, made, fresh, job.tell("merge"))
            stop = job.adapter.facts.get("stop_token_id")
            notes += write_settings(
                job.base.folder, job.adapter.folder, fresh, untied=made.untied, stop=stop if type(stop) is int else None
            )
            found = proof.examine(job.base.folder, fresh, made.outputs, job.tell("prove"))
            _refuse_nothing(job, found)
            report = _report(job, found, notes)
            answers = _answers(job, fresh, source, made, report)
            for folder, low_bit in job.packed.items():
                report["low_bit"].append(_pack(job, source, fresh, folder, low_bit, made, answers))
                # What stands there is of a model that does not, where this one fails after all.
                undo.callback(publish.remove, folder)
            report["sentences"] = sentences(report)
            text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
            (fresh / REPORT).write_text(text, encoding="utf-8")
        undo.pop_all()
    return report


def _notes(job: Job) -> list[str]:
    notes = []
    if job.base.known_by == "name":
        notes.append(
            f"The adapter does not record its base's weights: {job.base.name} was taken by its name; the shapes fit."
        )
    if job.base.packed:
        notes.append(
            f"The adapter was trained on {job.base.trained_on.name}, a low-bit form of {job.base.name}, whose changed "
            f"layers were found to be packed from it bit for bit."
        )
    elif job.adapter.format and job.adapter.format not in ("bf16", "fp16"):
        notes.append(
            f"The adapter was trained while its base was held in {job.adapter.format}, and is merged into the base in "
            f"full precision: its own change is exact, what it is added to is finer than what it has seen."
        )
    if job.adapter.facts.get("partial"):
        notes.append(f"Its training was stopped at step {job.adapter.facts.get('steps')}: it is merged as it was then.")
    return notes


def _facts(job: Job, source: Safetensors, made: Layout) -> dict[str, Any]:
    return {
        "kind": "merged",
        # Not `source`: that would say that this is a low-bit form of the base.
        "made_from": {
            "base": job.base.name,
            "base_fingerprint": job.adapter.fingerprint or fingerprint_of(job.base.folder),
            "adapter": job.adapter.name,
            "adapter_sha256": _sha256(job.adapter.folder / WEIGHTS),
            "run": str(job.adapter.facts.get("run") or ""),
        },
        "parameters": sum(prod(source.tensors[output.stored].shape) for output in made.outputs),
        "versions": {"nibble": __version__, **{name: version(name) for name in ("torch", "transformers", "peft")}},
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _check_origin(base: Base, source: Safetensors, made: Layout) -> None:
    """Refuse a full-precision model from which the low-bit one that was trained on was not made."""
    config = survival.settings(base.trained_on)
    packing = Packing(config.low_bit, tuple(config.modules_to_not_convert), config.overrides)
    files = {name: file for file in weight_files(base.trained_on) for name in read_header(file)}
    outputs = plan(source, packing).outputs
    for changed in made.changed:
        for output in outputs.get(changed.stored, ()):
            weight = source.tensors[changed.stored].read()
            assert isinstance(weight, torch.Tensor)
            ours = quantize(weight, output.form.name).codes if isinstance(output.form, Format) else None
            file = files.get(output.name)
            if ours is not None and (file is None or not torch.equal(ours, reader(file, output.name)())):
                raise ModelError(
                    f"{base.trained_on.name} was not made from the {base.name} that is here: {output.name} differs.",
                    f"Put the very model that it was made from in the place of {base.name}.",
                )


def _refuse_nothing(job: Job, found: Found) -> None:
    total = found.total
    if total.altered and total.share >= LEAST:
        return
    if not total.asked:
        raise ModelError(
            f"{job.adapter.name} changes nothing in {job.base.name}: all of its products are zero.",
            "It has not been trained: train it, or take another adapter.",
        )
    dtypes = " and ".join(DTYPES.get(name, name) for name in sorted(found.dtypes))
    if total.altered:
        # Small weights have small steps, so that a few of them move where the others stay.
        raise ModelError(
            f"{job.adapter.name} changes next to nothing that {dtypes} can hold: {max(0.0, total.share):.1%} of its "
            f"change is left when it is rounded.",
            "Train it longer, or with a higher learning rate; unmerged it works in Chat as it is.",
        )
    raise ModelError(
        f"{job.adapter.name} changes nothing that {dtypes} can hold: its largest change of a weight, "
        f"{total.largest:.2g}, is lost when it is rounded.",
        "Train it longer, or with a higher learning rate; unmerged it works in Chat as it is.",
    )


def _report(job: Job, found: Found, notes: list[str]) -> dict[str, Any]:
    return {
        "name": job.folder.name,
        "adapter": job.adapter.name,
        "base": job.base.name,
        "base_known_by": job.base.known_by,
        "proven": True,
        "weights": found.as_dict(),
        "logits": None,
        "low_bit": [],
        "notes": notes,
        "sentences": [],
    }


@dataclass
class _Asked:
    """The prompts, and what base and adapter answer."""

    ids: list[torch.Tensor]
    base: logits.Logits
    tuned: logits.Logits


def _answers(job: Job, fresh: Path, source: Safetensors, made: Layout, report: dict[str, Any]) -> _Asked | None:
    """Compare what base and adapter answer with what the merged files do; None where there is no room for it.

    Raises:
        ModelError: they differ by more than the order of sums and the stored dtype's rounding explain.
    """
    device = choose(job.device).kind
    why = logits.room(sum(prod(stored.shape) for stored in source.tensors.values()), device)
    if why:
        report["notes"].append(f"The answers of base and adapter were not compared with the merged model's: {why}.")
        return None
    ids = logits.prompts(fresh, _vocabulary(source))
    stored = {output.place: _dtype(source, output.stored) for output in made.outputs if output.place and output.change}
    job.report.progress(0, 2, "models", "logits")
    answers = logits.of_base(job.base.folder, job.adapter, ids, stored, device, untied=made.untied)
    job.report.progress(1, 2, "models", "logits")
    ours = logits.of_folder(fresh, ids, device)
    job.report.progress(2, 2, "models", "logits")
    limit, change = logits.limit(answers.tuned), logits.minus(answers.tuned, answers.base)
    found: dict[str, Any] = {
        "prompts": len(ids),
        "tokens": sum(row.shape[1] for row in ids),
        "tolerance": limit,
        "to_peft_rounded": logits.distance(ours, answers.rounded),
        "to_tuned": logits.distance(ours, answers.tuned),
        "base_to_tuned": logits.distance(answers.base, answers.tuned),
        "share": logits.share(logits.minus(ours, answers.base), change),
    }
    exact = all(dtype == torch.float32 for dtype in stored.values())
    off = found["to_tuned" if exact else "to_peft_rounded"]["max"]
    if not off <= limit:
        raise ModelError(
            f"The merge could not be proven, so nothing was kept: its logits are off by {off:.3g}.",
            "Use the adapter in Chat without merging it, and report this.",
        )
    report["logits"] = found
    return _Asked(ids, answers.base, answers.tuned)


def _dtype(source: Safetensors, name: str) -> torch.dtype:
    """In which dtype a tensor is stored."""
    value = source.tensors[name].read()
    assert isinstance(value, torch.Tensor)
    return value.dtype


def _vocabulary(source: Safetensors) -> int:
    text = source.config.get("text_config")
    known = (text if isinstance(text, dict) else source.config).get("vocab_size")
    return known if isinstance(known, int) and known > 0 else 256


def _pack(
    job: Job, source: Safetensors, fresh: Path, folder: Path, low_bit: str, made: Layout, asked: _Asked | None
) -> dict[str, Any]:
    """Pack the proven files, and measure what is left of the change."""
    merged = safetensors.open(fresh)
    merged.name = job.folder.name
    packing = Packing(low_bit)
    [packed] = pack(merged, {folder: packing}, job.report)
    found: dict[str, Any] = {
        "name": folder.name,
        "folder": str(folder),
        "format": packed.format,
        "bytes": packed.nbytes,
        "weights": survival.weights(source, merged, folder, plan(merged, packing), made),
        "logits": None,
    }
    if asked:
        device = choose(job.device).kind
        ours = logits.of_folder(folder, asked.ids, device, {})
        plain = logits.of_folder(job.base.folder, asked.ids, device, {"load_in_low_bit": low_bit})
        found["logits"] = {
            "to_tuned": logits.distance(ours, asked.tuned),
            "packed_base_to_base": logits.distance(plain, asked.base),
            "share": logits.share(logits.minus(ours, plain), logits.minus(asked.tuned, asked.base)),
        }
    found["sentences"] = survival.sentences(folder.name, low_bit, found)
    return found


def sentences(report: Mapping[str, Any]) -> list[str]:
    """A report as a person reads it."""
    weights, found = report["weights"], report["logits"]
    total = weights["total"]
    dtypes = " and ".join(DTYPES.get(name, name) for name in weights["dtypes"])
    told = [
        f"Proven from the files: {weights['targets']} weights changed by scale·B·A, within "
        f"{total['of_tolerance']:.0%} of what rounding to {dtypes} allows; {weights['equal_tensors']} other tensors "
        f"have the base's bytes.",
        f"{total['share']:.1%} of the change is there after rounding to {dtypes}, in {total['altered']:,} of "
        f"{total['numbers']:,} numbers.",
    ]
    if total["share"] < survival.MOSTLY_LOST:
        told.append(f"The change is mostly lost in {dtypes}: use the adapter in Chat without merging it.")
    if weights["unaltered_targets"]:
        told.append(f"{weights['unaltered_targets']} of these weights stayed as they were: their change is too small.")
    if found:
        near = found["to_tuned"]
        told.append(
            f"Logits on {found['prompts']} prompts: {near['max']:.2g} from base and adapter at most, while the adapter "
            f"moves them by up to {found['base_to_tuned']['max']:.2g}; the same next token in {near['agreement']:.1%} "
            f"of {found['tokens']} places. From PEFT's own merge, rounded alike: {found['to_peft_rounded']['max']:.1g}."
        )
    for row in report["low_bit"]:
        told += row["sentences"]
    return told + list(report["notes"])
