"""Whether samples packed into one row learn what they would alone: asked of the very model that is to be trained.

Promises that packing is refused with a sentence where it is not exact. Knows nothing of how rows are filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nibble.training.feed import Corpus, Segment, collator
from nibble.training.learner import evaluating

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Of a token's loss, by the dtype of the arithmetic: what rounding alone may change."""

LONGEST = 64
"""Tokens of a sample that are tried."""


def inexact(model: Any, corpus: Corpus, places: Sequence[int], padding: int, dtype: torch.dtype) -> str:
    """Why samples must not be packed for this model; empty where packed ones have the losses that they have alone."""
    trial = [_cut(corpus[place]) for place in places[:3]]
    if len(trial) < 2:
        return "there is only one."
    was = model.training
    evaluating(model)
    try:
        with torch.no_grad():
            alone = torch.cat([_losses(model, [[segment]], padding, None) for segment in trial])
            together = _losses(model, [trial], padding, dtype)
    except Exception as error:  # noqa: BLE001 - a foreign model's code may raise anything at a mask of this form
        return f"this model does not take positions and a mask of its own ({type(error).__name__})."
    finally:
        model.train(was)
    worst = float((alone - together).abs().max()) if len(alone) else 0.0
    if not worst <= TOLERANCE[dtype]:
        return f"in this model a sample would see its neighbours (a token's loss differs by {worst:.2g})."
    return ""


def _cut(segment: Segment) -> Segment:
    return segment[0][:LONGEST], segment[1][:LONGEST]


def _losses(model: Any, rows: list[list[Segment]], padding: int, packed: torch.dtype | None) -> torch.Tensor:
    """Of each token that is trained, in order."""
    inputs = {key: value.to(model.device) for key, value in collator(padding, packed)(rows).items()}
    labels = inputs.pop("labels")[:, 1:].flatten()
    logits = model(**inputs).logits[:, :-1].float().flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return losses[labels != -100]
