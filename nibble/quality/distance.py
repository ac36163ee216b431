"""How far two models' next-token distributions lie apart, token by token of the same windows.

Promises that only the logits of one window are in memory, whatever the vocabulary, and that all sums are in float32 or
better. Needs torch. Knows nothing of how models are loaded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from nibble.errors import ModelError

ROWS = 64
"""Positions handled at once: with a vocabulary of 150,000 that is 40 MB in float32."""


class LogProbs:
    """The log-probabilities that a model gave at each predicted position, in float32, in a file: [positions, vocab]."""

    def __init__(self, fd: int, positions: int, vocabulary: int) -> None:
        """
        Args:
            fd: descriptor of a file open for reading and writing, which this leaves open.
            positions, vocabulary: its shape; the file is made as large as that.
        """
        size = 4 * positions * vocabulary
        if os.fstat(fd).st_size < size:
            # Reserved now: a disk that is full later would end the process by SIGBUS, without a word.
            os.posix_fallocate(fd, 0, size)
        with os.fdopen(os.dup(fd), "r+b") as stream:
            self.values = torch.from_numpy(np.memmap(stream, np.float32, "r+", shape=(positions, vocabulary)))


def positions(windows: Sequence[Sequence[int]]) -> int:
    """How many tokens of these windows are predicted: all but the first of each."""
    return sum(len(window) - 1 for window in windows)


def read(
    model: Any, windows: Sequence[Sequence[int]], progress: Callable[[float, float], None], *,
    into: LogProbs | None = None, beside: LogProbs | None = None,
) -> dict[str, float]:  # fmt: skip
    """Let a model read the windows.

    With p_i the reference's distribution of token i given the tokens before it in its window, q_i the model's, x_i the
    token that stands there, and n the number of positions:

        perplexity = exp(-1/n sum_i ln q_i(x_i)); as in transformers' documentation, with a stride of one window
        kl_i       = sum_v p_i(v) (ln p_i(v) - ln q_i(v)), in nats;  kl_mean and kl_p95 are the mean and the 95th
                     percentile over i, interpolated linearly
        top1       = share of i where p_i and q_i have the same most likely token

    Args:
        model: a causal language model of transformers, on its device.
        windows: of token ids.
        progress: told the windows done, and all.
        into: where the model's own log-probabilities are written.
        beside: the reference's, of the same windows.

    Returns:
        `perplexity`; beside a reference also `kl_mean`, `kl_p95` and `top1`.

    Raises:
        ModelError: logits that are not finite.
    """
    likelihoods: list[torch.Tensor] = []
    divergences: list[torch.Tensor] = []
    agreed, start = 0, 0
    for done, window in enumerate(windows):
        progress(done, len(windows))
        ids = torch.tensor([window], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        for rows in range(0, len(logits), ROWS):
            here = torch.log_softmax(logits[rows : rows + ROWS].float(), dim=-1).cpu()
            place = slice(start, start + len(here))
            likelihoods.append(here.gather(1, ids[0, rows + 1 : rows + 1 + len(here), None].cpu())[:, 0].double())
            if into is not None:
                into.values[place] = here
            if beside is not None:
                there = beside.values[place]
                divergences.append(_divergence(there, here))
                agreed += int((there.argmax(-1) == here.argmax(-1)).sum())
            start += len(here)
    progress(len(windows), len(windows))
    mean = float(torch.cat(likelihoods).mean())
    if not math.isfinite(mean):
        raise ModelError("The model's logits are not finite numbers.", "Try another format; or its files are damaged.")
    result = {"perplexity": math.exp(-mean)}
    if beside is not None:
        kl = torch.cat(divergences)
        result |= {
            "kl_mean": float(kl.mean()), "kl_p95": float(torch.quantile(kl, 0.95)), "top1": agreed / start,
        }  # fmt: skip
    return result


def _divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) of each row of log-probabilities, in nats. A token that cannot come adds nothing."""
    share = reference.exp()
    terms = torch.where(share > 0, share * (reference - other), 0.0)
    # Rounding can leave a sum of nothing a little below it.
    return terms.sum(-1).double().clamp_min(0)
