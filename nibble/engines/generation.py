"""One prompt of token ids into one answer of token ids.

Promises that a stop is seen within half a second, also while a long prompt is being read, and that the tokens are those
of `model.generate` on the same ids. Knows nothing of text, conversations or queues.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from nibble.engines.base import FinishReason
from nibble.engines.prefix import PrefixCache
from nibble.engines.sampling import Plan, Sampler, generation_config

CHUNK_S = 0.3
"""How long reading one piece of a prompt should take: a stop is seen between pieces."""

CHUNK_TOKENS = (16, 4096)
"""Fewest and most tokens of a piece."""


@dataclass(frozen=True)
class Listener:
    """Whoever follows an answer while it is made."""

    stopped: Callable[[], bool]
    """Asked before each piece of the prompt and after each token."""
    on_prompt: Callable[[int], None]
    """Told after each piece of the prompt how many of its tokens were reused from the last answer."""
    on_token: Callable[[int], None]
    """Told each new token, those that end the answer left out."""


class Generator:
    """A model that answers one prompt at a time and remembers the last."""

    def __init__(self, model: Any, stops: Sequence[int] = ()) -> None:
        """
        Args:
            model: a causal language model of transformers. Its generation config is taken over and emptied, so that
                a request's own settings cannot be mixed with it.
            stops: ids that end an answer, besides those of the generation config.
        """
        self._model = model
        self.defaults: GenerationConfig = model.generation_config
        """The model's own generation config."""
        own = self.defaults.eos_token_id
        self.stops = sorted({*stops, *(own if isinstance(own, list) else [] if own is None else [own])})
        model.generation_config = GenerationConfig()
        self._prefix = PrefixCache(model.config)
        # Without it the model's head would be computed for every token of a piece, and then thrown away.
        lean = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._lean: dict[str, Any] = {"logits_to_keep": 1} if lean else {}
        self._chunk = 64

    def run(self, ids: Sequence[int], plan: Plan, listener: Listener) -> FinishReason:
        """Answer a prompt.

        Args:
            ids: of the prompt, at least one.
            plan: how to sample; `max_new_tokens` must fit into the context.
            listener: told of the tokens, and asked whether to go on.
        """
        with torch.inference_mode():
            prompt = torch.tensor([list(ids)], dtype=torch.long, device=self._model.device)
            cache = self._prefix.take(ids) if self._prefix.supported else None
            if cache is not None and not self._read(prompt, cache, listener):
                self._prefix.keep(cache, ids)
                return "stopped"
            watch = _Watch(listener, self.stops)
            output = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=generation_config(plan, self.defaults, self.stops),
                logits_processor=LogitsProcessorList([Sampler(plan, prompt.device)]),
                stopping_criteria=StoppingCriteriaList([watch]),
                **({"past_key_values": cache} if cache is not None else {}),
            )
            if cache is not None:
                self._prefix.keep(cache, output[0].tolist())
        return watch.reason

    def forget(self) -> None:
        """Give back the memory of the last answer's keys and values."""
        self._prefix.drop()

    def _read(self, prompt: torch.Tensor, cache: DynamicCache, listener: Listener) -> bool:
        """Fill the cache with the prompt but for its last piece, which is `generate`'s; False where it was stopped."""
        done = reused = cache.get_seq_length()
        length = prompt.shape[1]
        listener.on_prompt(reused)
        while length - done > self._chunk:
            if listener.stopped():
                return False
            start = time.perf_counter()
            piece = prompt[:, done : done + self._chunk]
            self._model(input_ids=piece, past_key_values=cache, use_cache=True, **self._lean)
            if prompt.device.type != "cpu":
                torch.accelerator.synchronize()
            done += piece.shape[1]
            self._adapt(piece.shape[1], time.perf_counter() - start)
            listener.on_prompt(reused)
        return not listener.stopped()

    def _adapt(self, tokens: int, seconds: float) -> None:
        """Make the next piece last `CHUNK_S`; it at most doubles, for one measurement may have been lucky."""
        low, high = CHUNK_TOKENS
        self._chunk = max(low, min(high, 2 * tokens, int(tokens * CHUNK_S / max(seconds, 1e-6))))


class _Watch(StoppingCriteria):
    """Sees each token as transformers' loop makes it; tells of it, and ends the loop when asked to."""

    def __init__(self, listener: Listener, stops: Sequence[int]) -> None:
        self._listener = listener
        self._stops = frozenset(stops)
        self.reason: FinishReason = "length"

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> Any:
        token = int(input_ids[0, -1])
        if token in self._stops:
            self.reason = "stop"
        else:
            self._listener.on_token(token)
            if self._listener.stopped():
                self.reason = "stopped"
        return torch.full((1,), self.reason != "length", device=input_ids.device, dtype=torch.bool)
