"""How the next token is chosen: a request's wishes laid over the model's own generation config.

Promises that a request's random numbers come from a generator of its own, so that the same seed gives the same answer
whatever else is served, and that numbers which are not finite become a sentence. Knows nothing of conversations.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from nibble.engines.base import Sampling
from nibble.errors import ModelError

DEFAULT_NEW_TOKENS = 1024
"""Longest answer where neither the request nor the model says."""

KEPT = (
    "bos_token_id", "eos_token_id", "pad_token_id", "min_new_tokens", "no_repeat_ngram_size", "bad_words_ids",
    "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "exponential_decay_length_penalty",
)  # fmt: skip
"""Fields of a model's generation config that every answer of it keeps."""


@dataclass(frozen=True)
class Plan:
    """A request's sampling with nothing left open."""

    max_new_tokens: int
    temperature: float
    """0 is greedy."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


def plan(sampling: Sampling, defaults: GenerationConfig) -> Plan:
    """What a request asks for, and the model's generation config wherever it does not say.

    A model that decodes greedily of its own accord samples once a temperature is asked for. A top_k that nobody names
    is 50 where a model samples, as in transformers.
    """
    own = defaults.temperature if defaults.temperature is not None else 1.0
    temperature = _first(sampling.temperature, own if defaults.do_sample else 0.0)
    return Plan(
        max_new_tokens=int(_first(sampling.max_new_tokens, defaults.max_new_tokens, DEFAULT_NEW_TOKENS)),
        temperature=temperature,
        top_k=int(_first(sampling.top_k, defaults.top_k, 50)),
        top_p=_first(sampling.top_p, defaults.top_p, 1.0),
        min_p=_first(defaults.min_p, 0.0),
        typical_p=_first(defaults.typical_p, 1.0),
        repetition_penalty=_first(sampling.repetition_penalty, defaults.repetition_penalty, 1.0),
        seed=int(_first(sampling.seed, secrets.randbits(32))),
    )


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def generation_config(plan: Plan, defaults: GenerationConfig, stops: list[int]) -> GenerationConfig:
    """The config for transformers' own loop: greedy, because `Sampler` has already chosen.

    Args:
        plan: of this request.
        defaults: the model's generation config, of which `KEPT` is kept.
        stops: ids that end the answer.
    """
    kept = {name: getattr(defaults, name, None) for name in KEPT}
    kept["eos_token_id"] = stops or None
    if kept["pad_token_id"] is None:
        kept["pad_token_id"] = stops[0] if stops else 0
    return GenerationConfig(
        **kept, do_sample=False, max_new_tokens=plan.max_new_tokens, repetition_penalty=plan.repetition_penalty
    )


WARPERS: tuple[tuple[str, float, Callable[[Any], LogitsProcessor]], ...] = (
    ("temperature", 1.0, TemperatureLogitsWarper),
    ("top_k", 0, TopKLogitsWarper),
    ("top_p", 1.0, TopPLogitsWarper),
    ("min_p", 0.0, MinPLogitsWarper),
    ("typical_p", 1.0, TypicalLogitsWarper),
)
"""Field of `Plan`, the value at which it does nothing, and transformers' processor; in transformers' own order."""


class Sampler(LogitsProcessor):
    """Draws the next token and leaves it as the only one possible."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._greedy = plan.temperature == 0
        active = [] if self._greedy else [row for row in WARPERS if getattr(plan, row[0]) != row[1]]
        self._warpers = [make(getattr(plan, name)) for name, _, make in active]
        self._generator = torch.Generator(device=device).manual_seed(plan.seed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        """Scores of which only the drawn token's is finite; unchanged where decoding is greedy.

        Args:
            input_ids: int64 [1, tokens so far].
            scores: float32 [1, vocabulary].

        Raises:
            ModelError: the largest score is not a finite number.
        """
        # max() passes a NaN on, so this one number tells of NaN and overflow alike.
        if not bool(torch.isfinite(scores.max())):
            raise ModelError(
                "The model computed numbers that are not finite (NaN or infinity).",
                "Its weights may be damaged, or its dtype too narrow: try another format, or download the model again.",
            )
        if self._greedy:
            return scores
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        drawn = torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=self._generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)
