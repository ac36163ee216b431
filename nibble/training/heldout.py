"""The loss on samples that were not trained.

Promises that each trained token counts the same, whatever the batch it stood in, and that dropout is off meanwhile.
Knows nothing of the loop, so that a comparison measures as training does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from nibble.training.feed import Segment, collator
from nibble.training.learner import evaluating


def heldout_loss(
    model: torch.nn.Module, rows: Sequence[list[Segment]], padding: int, batch: int, device: torch.device | str
) -> float:
    """Mean loss of a trained token over rows; dropout is off meanwhile, and each token counts the same.

    Args:
        model: takes `input_ids`, `attention_mask` and gives `logits`.
        rows: one sample each.
        padding: token to pad with.
        batch: rows at a time.
        device: of the model.
    """
    lengths = sorted(range(len(rows)), key=lambda row: sum(len(ids) for ids, _ in rows[row]))
    total, count = summed_loss(model, [rows[row] for row in lengths], padding, batch, device)
    return total / count if count else math.nan


def summed_loss(
    model: torch.nn.Module, rows: Sequence[list[Segment]], padding: int, batch: int, device: torch.device | str
) -> tuple[float, int]:
    """Sum of the losses of the trained tokens, and their number; as `heldout_loss` otherwise."""
    collate, trained = collator(padding), model.training
    total, count = 0.0, 0
    evaluating(model)
    try:
        with torch.no_grad():
            for start in range(0, len(rows), batch):
                inputs = {key: value.to(device) for key, value in collate(rows[start : start + batch]).items()}
                labels = inputs.pop("labels")[:, 1:]
                logits = model(**inputs).logits[:, :-1].float()
                losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
                total += float(losses)
                count += int((labels != -100).sum())
    finally:
        model.train(trained)
    return total, count
