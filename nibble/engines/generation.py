"""One prompt of token ids into one answer of token ids.

Promises that a stop is seen between two layers while a prompt is being read or tokens come slowly, else at the next
token, and that the tokens are those of `model.generate` on the same ids. Knows nothing of text or conversations.
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
from nibble.lowbit.lean import CACHE

LAYER_S = 0.15
"""How long one layer should take over one piece of a prompt: a stop is seen between layers."""

TOKEN_S = 0.2
"""Tokens that come faster are not interrupted between layers."""

PIECE_TOKENS = (64, 2048)
"""Fewest and most tokens of a piece. Small ones are dear: packed weights are unpacked anew for each."""


@dataclass(frozen=True)
class Listener:
    """Whoever follows an answer while it is made."""

    stopped: Callable[[], bool]
    """Asked before each layer while the prompt is read, and after each token."""
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
        self._layers = _layers(model)
        self._piece = 256

    def run(
        self, ids: Sequence[int], plan: Plan, listener: Listener, *, stops: Sequence[int] = (), wearer: object = None
    ) -> FinishReason:
        """Answer a prompt.

        Args:
            ids: of the prompt, at least one.
            plan: how to sample; `max_new_tokens` must fit into the context.
            listener: told of the tokens, and asked whether to go on.
            stops: ids that end this answer, besides the model's.
            wearer: tells the adapter that the model wears now.
        """
        prompt = torch.tensor([list(ids)], dtype=torch.long, device=self._model.device)
        ends = sorted({*self.stops, *stops})
        cache = self._prefix.take(ids, wearer) if self._prefix.supported else None
        with torch.inference_mode(), _Guard(self._layers, listener.stopped) as guard:
            watch = _Watch(listener, ends, guard)
            try:
                if cache is not None:
                    self._read(prompt, cache, listener)
                self._model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=generation_config(plan, self.defaults, ends),
                    logits_processor=LogitsProcessorList([Sampler(plan, prompt.device)]),
                    stopping_criteria=StoppingCriteriaList([watch]),
                    **({CACHE: cache} if cache is not None else {}),
                )
            except _Stopped:
                watch.reason = "stopped"
            if cache is not None:
                self._prefix.keep(cache, [*ids, *watch.tokens], wearer)
        return watch.reason

    def forget(self) -> None:
        """Give back the memory of the last answer's keys and values."""
        self._prefix.drop()

    def _read(self, prompt: torch.Tensor, cache: DynamicCache, listener: Listener) -> None:
        """Fill the cache with the prompt but for its last piece, which `generate` reads."""
        done = reused = cache.get_seq_length()
        length = prompt.shape[1]
        listener.on_prompt(reused)
        while length - done > self._piece:
            start = time.perf_counter()
            piece = prompt[:, done : done + self._piece]
            self._model(input_ids=piece, use_cache=True, **{CACHE: cache}, **self._lean)
            if prompt.device.type != "cpu":
                torch.accelerator.synchronize()
            done += piece.shape[1]
            self._adapt(piece.shape[1], time.perf_counter() - start)
            listener.on_prompt(reused)

    def _adapt(self, tokens: int, seconds: float) -> None:
        """Make a layer take `LAYER_S` over the next piece; that at most doubles, for one measurement may be lucky."""
        low, high = PIECE_TOKENS
        wanted = int(tokens * LAYER_S * len(self._layers) / max(seconds, 1e-6))
        self._piece = max(low, min(high, 2 * tokens, wanted))


def _layers(model: Any) -> list[torch.nn.Module]:
    """The modules that a model runs one after the other: its longest list of modules, or itself where it has none."""
    lists = [list(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len, default=[model])


class _Stopped(Exception):
    """Raised inside the model where a stop was seen between two layers."""


class _Guard:
    """Looks for a stop before each layer, until it is lifted."""

    def __init__(self, layers: Sequence[torch.nn.Module], stopped: Callable[[], bool]) -> None:
        self._layers = layers
        self._stopped = stopped
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> _Guard:
        self._hooks = [layer.register_forward_pre_hook(self._look) for layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        self.lift()

    def lift(self) -> None:
        """Look no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _look(self, *_: object) -> None:
        if self._stopped():
            raise _Stopped


class _Watch(StoppingCriteria):
    """Sees each token as transformers' loop makes it; tells of it, and ends the loop when asked to."""

    def __init__(self, listener: Listener, stops: Sequence[int], guard: _Guard) -> None:
        self._listener = listener
        self._stops = frozenset(stops)
        self._guard = guard
        self._latest = 0.0
        self.tokens: list[int] = []
        """Every new token, those that end the answer too."""
        self.reason: FinishReason = "length"

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> Any:
        token, now = int(input_ids[0, -1]), time.perf_counter()
        if self.tokens and now - self._latest < TOKEN_S:
            self._guard.lift()
        self.tokens.append(token)
        self._latest = now
        if token in self._stops:
            self.reason = "stop"
        else:
            self._listener.on_token(token)
            if self._listener.stopped():
                self.reason = "stopped"
        return torch.full((1,), self.reason != "length", device=input_ids.device, dtype=torch.bool)
