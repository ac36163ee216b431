"""What is left of an adapter's change where the merged model is packed in low bit: in the weights, and in the answers.

Promises that both packed weights are those of the packer: the merged one read from its files, the base's packed anew
in the same format. Knows nothing of how much is enough for a person.

The share is that of Q(W + Δ) - Q(W) along Δ: 1 where the change is there in full on the average, 0 where packing took
all of it. The likeness (a cosine) tells how much of what packing changed is the adapter's: steps of a format are coarse
beside a small change, so that single numbers jump or stay while their sum is right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nibble.checkpoint import read_config, read_header, weight_files
from nibble.lowbit.blocks import QuantizedTensor, quantize
from nibble.lowbit.formats import Format, resolve
from nibble.lowbit.quantizer import LowBitConfig
from nibble.merging.changes import row_blocks
from nibble.merging.proof import Tally
from nibble.merging.writing import Layout
from nibble.packing import Plan
from nibble.sources.base import Source
from nibble.sources.safetensors import reader

MOSTLY_LOST = 0.5
"""Share of the change below which it counts as mostly lost."""

UNLIKE = 0.3
"""Likeness below which most of what packing changed is not the adapter's."""


def settings(folder: Path) -> LowBitConfig:
    """How the model in a folder is packed."""
    said = {key: value for key, value in read_config(folder)["quantization_config"].items() if key != "quant_method"}
    return LowBitConfig(**{key: said[key] for key in ("low_bit", "modules_to_not_convert", "overrides") if key in said})


def weights(base: Source, merged: Source, packed: Path, plan: Plan, layout: Layout) -> dict[str, Any]:
    """Measure what packing left of each changed matrix.

    Args:
        base: in full precision.
        merged: in full precision.
        packed: folder of the merged model in low bit.
        plan: by which it was packed.
        layout: which tensors are changed.
    """
    files = {name: file for file in weight_files(packed) for name in read_header(file)}
    by_tensor: dict[str, Tally] = {}
    for output in layout.changed:
        for made in plan.outputs.get(output.name, ()):
            if isinstance(made.form, Format) and made.name in files:
                before, after = base.tensors[output.stored].read(), merged.tensors[output.name].read()
                assert isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)
                kept = QuantizedTensor(
                    made.form, reader(files[made.name], made.name)(),
                    reader(files[made.name], f"{made.name}_scale")(), before.shape[1],
                )  # fmt: skip
                by_tensor[output.name] = _measure(before, after, kept)
    total = Tally()
    for tally in by_tensor.values():
        total.add(tally)
    return {
        "share": total.share if by_tensor else None,
        "likeness": total.likeness if by_tensor else None,
        "unpacked_targets": len(layout.changed) - len(by_tensor),
        "by_tensor": {name: {"share": row.share, "likeness": row.likeness} for name, row in by_tensor.items()},
    }


def _measure(before: torch.Tensor, after: torch.Tensor, kept: QuantizedTensor) -> Tally:
    plain = quantize(before, kept.format.name)
    tally = Tally(numbers=before.numel())
    for rows in row_blocks(tuple(before.shape)):
        asked = after[rows].double() - before[rows].double()
        made = _rows(kept, rows) - _rows(plain, rows)
        tally.add(
            Tally(
                altered=int(made.count_nonzero()), asked=float(asked.square().sum()),
                made=float(made.square().sum()), along=float((asked * made).sum()),
            )
        )  # fmt: skip
    return tally


def _rows(packed: QuantizedTensor, rows: slice) -> torch.Tensor:
    part = QuantizedTensor(packed.format, packed.codes[rows], packed.scales[rows], packed.in_features)
    return part.dequantize().double()


def sentences(name: str, low_bit: str, found: dict[str, Any]) -> list[str]:
    """What a person should know of it."""
    label, share = resolve(low_bit).name, found["weights"]["share"]
    if share is None:
        return [f"{name}: no changed layer is packed in {label}, so the change is there as it was."]
    likeness = found["weights"]["likeness"]
    told = [f"{name}: {share:.0%} of the change is in the {label} weights (likeness {likeness:.2f})."]
    answers = found.get("logits")
    if answers:
        told.append(
            f"{name}: {answers['share']:.0%} of the change is in its answers' logits; it names the same next token as "
            f"base and adapter in {answers['to_tuned']['agreement']:.0%} of the places, as the packed base does the "
            f"base in {answers['packed_base_to_base']['agreement']:.0%}."
        )
    lost = share < MOSTLY_LOST or (answers and answers["share"] < MOSTLY_LOST)
    if lost:
        told.append(f"The change is mostly lost in {label}: take a format with more bits, such as sym_int8.")
    elif likeness < UNLIKE:
        told.append(
            f"Rounding to {label} moves these weights more than the adapter does; judge the answers, not the weights."
        )
    return told
