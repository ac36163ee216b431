"""The loss on samples that were not trained.

Promises that each trained token counts the same, whatever the batch it stood in, and that dropout is off meanwhile.
Knows nothing of the loop, so that a comparison measures as training does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from nibble.data.rows import IGNORED
from nibble.training.feed import Segment, collator
from nibble.training.learner import evaluating


def heldout_loss(
    model: torch.nn.Module, rows: Sequence[list[Segment]], padding: int, batch: int, device: torch.device | str
) -> float:
    """Mean loss of a trained token over rows; dropout is off meanwhile, and each token counts the same.

    Args:
        model: takes `input_ids`, `attention_mask` and `labels`, and gives `loss`, a mean over trained tokens.
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
    collate, was_training = collator(padding), model.training
    total, count = 0.0, 0
    evaluating(model)
    try:
        with torch.no_grad():
            for start in range(0, len(rows), batch):
                inputs = {key: value.to(device) for key, value in collate(rows[start : start + batch]).items()}
                trained = int((inputs["labels"][:, 1:] != IGNORED).sum())
                # The model's own loss, which while training is made without the logits of a whole batch.
                total += float(model(**inputs).loss) * trained if trained else 0.0
                count += trained
    finally:
        model.train(was_training)
    return total, count
