"""The engine over a model of BigDL-LLM or IPEX-LLM: transformers 4 generates, tokens arrive one by one.

Promises what every `ThreadedEngine` does; a long prompt is read by the library in one piece, so a stop waits for its
end there. Uses what transformers 4.31 and 4.37 have alike. Knows nothing of folders, pipes and the page.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psutil

from nibble.bigdl.older_tokenizer import OlderTokenizer
from nibble.engines.base import Chunk, EngineInfo, FinishReason, Sampling
from nibble.engines.text import SlowDecoder
from nibble.engines.threaded import ThreadedEngine, Ticket
from nibble.errors import ModelError
from nibble.prompts import Template, clean, fit

DEFAULT_NEW_TOKENS = 1024
"""Longest answer where neither the request nor the model says."""

PULSE_S = 5.0
"""How often a long prompt gives a sign of life."""


class BigdlEngine(ThreadedEngine):
    """A causal language model of the library and its tokenizer, answering one request at a time."""

    def __init__(self, model: Any, tokenizer: OlderTokenizer, template: Template, info: EngineInfo) -> None:
        """
        Args:
            model: on its device, in evaluation mode.
            tokenizer: its tokenizer.
            template: as `choose_template` returns it.
            info: what to tell of it.
        """
        super().__init__()
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        own = model.generation_config.eos_token_id
        eos = own if isinstance(own, list) else [own]
        self._stops = sorted({*template.stops, *(n for n in (*eos, tokenizer.eos_token_id) if n is not None)})
        self._info = info

    @property
    def info(self) -> EngineInfo:
        """What is loaded; the memory, private to this process, is measured now."""
        return replace(self._info, memory_bytes=int(psutil.Process().memory_full_info().uss))

    def warm_up(self) -> None:
        """Answer once and forget it."""
        start = time.perf_counter()
        for _ in self.stream([{"role": "user", "content": "warm"}], Sampling(max_new_tokens=2), threading.Event()):
            pass
        self._info = replace(self._info, warmup_s=time.perf_counter() - start)

    def answer(self, ticket: Ticket) -> None:
        """As `ThreadedEngine.answer`; a long prompt is read in one piece, so a stop waits for its end."""
        if ticket.request.adapter:
            raise ModelError("BigDL-LLM's engine puts no adapters on a model.", "Chat with it under engine: nibble.")
        context, sampling = self._info.context, ticket.request.sampling
        wanted = sampling.max_new_tokens or self._model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS
        reserve = min(wanted, max(1, context // 4))
        fitted = fit(clean(ticket.request.messages), self._encode, context, reserve)
        decoder = SlowDecoder(self._tokenizer, fitted.ids[-4:] if self._template.continues else ())
        progress = _Progress(ticket, decoder, len(fitted.ids), fitted.dropped_turns)
        watch = _Watch(progress, frozenset(self._stops), min(wanted, context - len(fitted.ids)))
        with progress.pulse():
            self._generate(fitted.ids, sampling, watch)
        progress.finish(watch.reason)

    def _generate(self, ids: list[int], sampling: Sampling, watch: _Watch) -> None:
        import torch

        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        prompt = torch.tensor([ids], device=self._model.device)
        with torch.inference_mode():
            self._model.generate(
                prompt, attention_mask=torch.ones_like(prompt), stopping_criteria=[watch],
                # One more than wanted: transformers' own limit, looked at first, would hide the last token.
                max_new_tokens=watch.limit + 1,
                pad_token_id=self._stops[0] if self._stops else 0, eos_token_id=self._stops or None,
                **_sampling_options(sampling),
            )  # fmt: skip

    def _encode(self, messages: Any) -> list[int]:
        return self._template.encode(self._tokenizer, messages)


class _Progress:
    """One answer as it grows: makes its chunks."""

    def __init__(self, ticket: Ticket, decoder: SlowDecoder, prompt_tokens: int, dropped_turns: int) -> None:
        self.ticket = ticket
        self._decoder = decoder
        self._so_far = Chunk(prompt_tokens=prompt_tokens, dropped_turns=dropped_turns)
        self._began = time.perf_counter()
        self._first = 0.0

    def on_token(self, token: int) -> None:
        now = time.perf_counter()
        count = self._so_far.tokens + 1
        self._first = self._first or now
        speed = (count - 1) / (now - self._first) if count > 1 else 0.0
        self._so_far = replace(self._so_far, tokens=count, tokens_per_s=speed, first_token_s=self._first - self._began)
        self.ticket.emit(replace(self._so_far, text=self._decoder.push(token)))

    def finish(self, reason: FinishReason) -> None:
        text, whole = self._decoder.end()
        self.ticket.emit(replace(self._so_far, text=text, finish_reason=reason, full_text=whole))

    @contextlib.contextmanager
    def pulse(self) -> Iterator[None]:
        """Give signs of life until the first token; the reader takes a long silence for a stall."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(PULSE_S) and not self._first:
                self.ticket.emit(self._so_far)

        thread = threading.Thread(target=beat, name="nibble-pulse", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


class _Watch:
    """A stopping criterion of transformers 4: told each token, asked whether to end."""

    def __init__(self, progress: _Progress, stops: frozenset[int], limit: int) -> None:
        self._progress = progress
        self._stops = stops
        self._tokens = 0
        self.limit = limit
        self.reason: FinishReason = "length"

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> bool:
        token = int(input_ids[0, -1])
        if token in self._stops:
            self.reason = "stop"
            return True
        self._tokens += 1
        self._progress.on_token(token)
        if self._progress.ticket.stopped:
            self.reason = "stopped"
        return self.reason == "stopped" or self._tokens >= self.limit


def _sampling_options(sampling: Sampling) -> dict[str, Any]:
    """Arguments of `generate` for what the request names; the rest is the model's own generation config."""
    named = {
        name: value
        for name in ("temperature", "top_p", "top_k", "repetition_penalty")
        if (value := getattr(sampling, name)) is not None
    }
    if sampling.temperature is not None:
        named["do_sample"] = sampling.temperature > 0
    if sampling.temperature == 0:
        named["temperature"] = 1.0
    return named
