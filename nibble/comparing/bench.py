"""The measuring: one loaded base, adapters put on it in turn; held-out loss, what was forgotten, and answers.

Promises that all are measured on the same samples, text, prompts and seed, by the same arithmetic, so that an adapter
which changes nothing shows no difference at all. Knows nothing of where reports go.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import logging as transformers_logging

from nibble import __version__
from nibble.comparing.attach import attached
from nibble.comparing.order import BASE, Order, Tuned
from nibble.devices import Device
from nibble.engines.base import Sampling
from nibble.engines.generation import Generator, Listener
from nibble.engines.sampling import plan
from nibble.engines.text import DecoderFactory
from nibble.errors import DataError, DeviceError, NibbleError
from nibble.lowbit.linear import give_back_memory, prepare
from nibble.prompts.templates import OWN
from nibble.quality import distance, windows
from nibble.quality.text import read_text
from nibble.training import feed, learner
from nibble.training.heldout import heldout_loss
from nibble.training.recipe import Recipe
from nibble.transformers import AutoModelForCausalLM

TOKENS = 2048
"""Tokens of neutral text that are predicted, unless another number is asked for."""

MAX_REFERENCE_BYTES = 2 * 2**30
"""The file of the base's log-probabilities, at most."""

NEUTRAL = "the evaluation text that ships with Nibble: questions about Nibble, which no data set here trains on"

Report = dict[str, Any]


@dataclass(frozen=True)
class Wish:
    """What to measure with."""

    prompts: Sequence[str]
    sampling: Sampling
    text: Path | None = None
    """Neutral text; None is the one that ships."""
    tokens: int = TOKENS
    find_data: Callable[[str], Path] | None = None
    """Where a data set's name leads; raises NibbleError."""
    trusted: bool = False


@dataclass
class Held:
    """The samples that training left out, or why there are none."""

    rows: list[list[feed.Segment]] = field(default_factory=list)
    data: str = ""
    why: str = ""
    """A sentence where there are no rows."""
    chat: bool | None = None
    """Whether the data set held conversations; None where that is not recorded and it cannot be read."""


class Bench:
    """A loaded base, and what it is measured with."""

    def __init__(self, order: Order, wish: Wish, device: Device, tell: Callable[[float, float], None]) -> None:
        """
        Args:
            order: what is compared.
            wish: what to measure with.
            device: where, and in which dtype unless the recipe says another.
            tell: told the parts done, and all.

        Raises:
            NibbleError: the base cannot be loaded, or the text is too short.
        """
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.order, self.wish, self.device, self._tell = order, wish, device, tell
        recipe = order.recipe or Recipe()
        self.reader = learner.open_reader(order.base, recipe.max_length, trusted=wish.trusted)
        self.held = heldout(order, self.reader, wish.find_data)
        self.chat, self.chat_why = self._is_chat()
        dtype, _ = learner.arithmetic(recipe, device)
        self.model = load(order, dtype, wish.trusted).to(device.kind).eval()
        # Nothing goes on from what is only measured; answers bring a cache of their own.
        self.model.config.use_cache = False
        self.windows = self._windows()
        self._generator = Generator(self.model, self._stops())
        self._decoders = DecoderFactory(self.reader.tokenizer)

    def run(self, metric: Callable[..., None]) -> Report:
        """Measure base and adapters.

        Args:
            metric: told the figures of each subject.
        """
        subjects: list[Tuned | None] = [None, *self.order.tuned]
        parts = 2 * len(subjects)
        with tempfile.TemporaryFile() as file:
            into = distance.LogProbs(file.fileno(), distance.positions(self.windows), self._vocabulary())
            rows = []
            for place, subject in enumerate(subjects):
                with self._wearing(subject):
                    rows.append(_named(subject, self.order) | self._figures(subject, into, place, parts))
                numbers = {key: rows[-1][key] for key in ("loss", "perplexity", "kl_mean") if rows[-1][key] is not None}
                metric(subject=float(place), **numbers)
        # From here on packed layers answer as chat has them; what was measured above met the weights exactly.
        prepare(self.model.eval())
        for place, subject in enumerate(subjects):
            with self._wearing(subject):
                rows[place]["answers"] = self._answers(len(subjects) + place, parts)
        self._tell(parts, parts)
        return self._report(rows)

    @contextmanager
    def _wearing(self, subject: Tuned | None) -> Iterator[None]:
        if subject is None:
            yield
            return
        with attached(self.model, subject.folder, self._called(subject)):
            yield

    def _called(self, subject: Tuned) -> str:
        whole = self.order.adapter or self.order.run
        return whole if subject.step is None else f"{whole} at {subject.name}"

    def _figures(self, subject: Tuned | None, reference: distance.LogProbs, place: int, parts: int) -> dict[str, Any]:
        """Held-out loss, perplexity of the neutral text, and its distance from the base's."""
        self._tell(place, parts)
        learner.evaluating(self.model)
        loss = None
        if self.held.rows:
            size = (self.order.recipe or Recipe()).batch_size
            loss = heldout_loss(self.model, self.held.rows, self.reader.padding, size, self.model.device)
            learner.evaluating(self.model)
        self._tell(place + 0.3, parts)
        found = distance.read(
            self.model, self.windows, lambda done, total: self._tell(place + 0.3 + 0.7 * done / max(total, 1), parts),
            **({"into": reference} if subject is None else {"beside": reference}),
        )  # fmt: skip
        if subject is None:
            found |= {"kl_mean": 0.0, "kl_p95": 0.0, "top1": 1.0}
        return {"loss": loss, **found}

    def _answers(self, place: float, parts: int) -> list[dict[str, Any]]:
        answers = []
        for number, prompt in enumerate(self.wish.prompts):
            self._tell(place + number / len(self.wish.prompts), parts)
            answers.append(self._answer(prompt))
        return answers

    def _answer(self, prompt: str) -> dict[str, Any]:
        ids = self._ids(prompt)
        decoder = self._decoders(() if self.chat else ids[-4:])
        pieces: list[str] = []
        tokens: list[int] = []

        def on_token(token: int) -> None:
            tokens.append(token)
            pieces.append(decoder.push(token))

        # What was kept of another adapter's prompt is not this one's.
        self._generator.forget()
        reason = self._generator.run(
            ids, plan(self.wish.sampling, self._generator.defaults),
            Listener(lambda: False, lambda reused: None, on_token),
        )  # fmt: skip
        rest, whole = decoder.end()
        text = "".join(pieces) + rest if whole is None else whole
        return {"text": text, "tokens": len(tokens), "finish_reason": reason}

    def _ids(self, prompt: str) -> list[int]:
        tokenizer = self.reader.tokenizer
        if self.chat:
            ids = self.reader.encoder.template.encode(tokenizer, [{"role": "user", "content": prompt}])
        else:
            ids = list(tokenizer(prompt)["input_ids"])
        if not ids:
            raise DataError(f"{prompt[:40]!r} has no tokens.", "Give another prompt.")
        return ids

    def _stops(self) -> list[int]:
        """What ends an answer: the same for all, the base too."""
        eos = self.reader.tokenizer.eos_token_id
        learnt = [] if self.order.stop is None else [self.order.stop]
        return [*self.reader.encoder.template.stops, *([] if eos is None else [eos]), *learnt]

    def _is_chat(self) -> tuple[bool, str]:
        """Whether prompts go through the chat template, and why."""
        if self.held.chat is not None:
            kind = "conversations" if self.held.chat else "running text"
            how = "go through the chat template" if self.held.chat else "are continued as raw text"
            return self.held.chat, f"It was trained on {kind}, so prompts {how}."
        if self.reader.encoder.template.name == OWN:
            return True, "Prompts go through the base's chat template: it brings one."
        return False, "Prompts are continued as raw text: the base brings no chat template."

    def _windows(self) -> list[list[int]]:
        room = min(MAX_REFERENCE_BYTES, shutil.disk_usage(tempfile.gettempdir()).free // 2)
        tokens = max(1, min(self.wish.tokens, room // (4 * self._vocabulary())))
        return windows.cut(read_text(self.wish.text), self.order.base, self.reader.tokenizer, tokens)

    def _vocabulary(self) -> int:
        """How many logits the model gives."""
        with torch.inference_mode():
            ids = torch.zeros((1, 1), dtype=torch.long, device=self.model.device)
            learner.evaluating(self.model)
            return int(self.model(input_ids=ids, use_cache=False).logits.shape[-1])

    def _report(self, rows: list[dict[str, Any]]) -> Report:
        order, text = self.order, read_text(self.wish.text)
        return {
            "base": order.name, "format": order.low_bit or "packed", "device": self.device.kind,
            "dtype": str(self.model.dtype).removeprefix("torch."), "adapter": order.adapter, "run": order.run,
            "chat": self.chat, "chat_why": self.chat_why, "prompts": list(self.wish.prompts),
            "sampling": {key: value for key, value in vars(self.wish.sampling).items() if value is not None},
            "heldout": {"data": self.held.data, "samples": len(self.held.rows), "why": self.held.why},
            "neutral": {
                "name": NEUTRAL if self.wish.text is None else text.name, "sha256": text.sha256,
                "tokens": distance.positions(self.windows),
            },
            "subjects": rows,
            "versions": {"nibble": __version__, **{name: version(name) for name in ("torch", "transformers", "peft")}},
        }  # fmt: skip


def _named(subject: Tuned | None, order: Order) -> dict[str, Any]:
    if subject is None:
        return {"name": BASE, "step": None, "recorded_loss": order.recorded}
    return {"name": subject.name, "step": subject.step, "recorded_loss": subject.recorded}


def heldout(order: Order, reader: learner.Reader, find_data: Callable[[str], Path] | None) -> Held:
    """The samples that training left out, made again from what the adapter says of them."""
    said = order.heldout
    data = str(said.get("data") or "")
    if not data or find_data is None:
        alone = "Nothing was trained, so nothing was held out." if not order.tuned else (
            "What the adapter was trained on is not recorded with it, so no samples are known to be held out."
        )  # fmt: skip
        return Held(why=alone)
    share = float(said.get("share") or 0)
    recorded = said["chat"] if isinstance(said.get("chat"), bool) else None
    try:
        mapping = feed.as_mapping(said.get("columns") or {}, bool(said.get("leave_out")))
        corpus, found = feed.read(find_data(data), reader.encoder, mapping)
    except NibbleError as error:
        return Held(data=data, chat=recorded, why=f"The held-out samples cannot be made again: {error}")
    chat = found.detection is not None and found.detection.form != "text" if recorded is None else recorded
    if not share:
        return Held(data=data, chat=chat, why=f"No sample of {data} was held out: eval_share was 0.")
    _, places = feed.split(corpus, share, int(said.get("seed") or 0))
    if said.get("digest") and said["digest"] != corpus.digest() or said.get("samples", len(places)) != len(places):
        why = f"{data} has changed since: which of its samples were held out cannot be told."
        return Held(data=data, chat=chat, why=why)
    if not places:
        return Held(data=data, chat=chat, why=f"No sample of {data} was held out.")
    return Held([[corpus[place]] for place in places], data, chat=chat)


def load(order: Order, dtype: torch.dtype, trusted: bool) -> Any:
    """The base as it is trained, on the CPU.

    Raises:
        ModelError: it cannot be loaded.
        DeviceError: there is not enough memory.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trusted}
    # Chat's way for one new token leaves adapters out: what is compared must differ by them alone.
    options |= {"attn_implementation": "sdpa"}
    if order.low_bit:
        skip = list(order.recipe.modules_to_not_convert) if order.recipe else ["lm_head"]
        options |= {"load_in_low_bit": order.low_bit, "modules_to_not_convert": skip}
    loader = AutoModelForCausalLM.from_pretrained if order.low_bit else AutoModelForCausalLM.load_low_bit
    try:
        try:
            model = loader(order.base, **options)
        except NibbleError as error:
            if "scaled_dot_product_attention" not in str(error.__cause__):
                raise
            model = loader(order.base, **{**options, "attn_implementation": "eager"})
    except Exception as error:
        if learner.is_out_of_memory(error.__cause__ or error):
            raise DeviceError(f"There is not enough memory to load {order.name}.", "Compare a smaller base.") from error
        raise
    give_back_memory()
    return model
