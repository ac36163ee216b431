"""The engine in this process: a folder loaded in low bit by transformers, answering in a thread.

Promises that a stop is seen within half a second, that a failure inside the model is one sentence, and that turns of a
conversation reuse what was read before. Knows nothing of processes, pages or where models are kept.
"""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoTokenizer
from transformers import logging as transformers_logging

from nibble.checkpoint import CONTEXT_KEYS, read_config
from nibble.devices import Device, choose
from nibble.engines.base import Chunk, EngineInfo, FinishReason, Sampling
from nibble.engines.generation import Generator, Listener
from nibble.engines.sampling import plan
from nibble.engines.text import Decoder, DecoderFactory
from nibble.engines.threaded import ThreadedEngine, Ticket, apart
from nibble.engines.wardrobe import Dressed, Wardrobe
from nibble.errors import DeviceError, ModelError, NibbleError
from nibble.library import GUIDE, GUIDE_FOLDER, inspect
from nibble.lowbit.formats import FORMATS, resolve
from nibble.lowbit.linear import give_back_memory, kernel_name, prepare
from nibble.prompts import Template, choose_template, clean, fit
from nibble.screen import check
from nibble.transformers import AutoModelForCausalLM

DEFAULT_CONTEXT = 4096
"""Where config.json does not say how many tokens the model can see."""

ALIVE_S = 5.0
"""How long an answer may say nothing while its layers still run: silence is taken for a stall."""

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
"""Formats that pack nothing -> the dtype that they are."""

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "defaultcpuallocator")
"""What torch's RuntimeErrors say, in lower case, when memory ran out on a device that raises no error of its own."""


@dataclass
class _Progress:
    """One answer as it grows: makes its chunks."""

    ticket: Ticket
    decoder: Decoder
    began: float
    prompt_tokens: int
    dropped_turns: int
    lead: str
    """Text before the first token's."""
    reused_tokens: int = 0
    tokens: int = 0
    first: float | None = None
    """Seconds from the turn's begin to the first token."""
    latest: float = 0.0
    told: float = 0.0
    """When something was last said of it."""

    def tell(self, chunk: Chunk) -> None:
        self.told = time.perf_counter()
        self.ticket.emit(chunk)

    def stopped(self) -> bool:
        if time.perf_counter() - self.told > ALIVE_S:
            self.tell(self.chunk())
        return self.ticket.stopped

    def on_prompt(self, reused: int) -> None:
        self.reused_tokens = reused
        self.tell(self.chunk())

    def on_token(self, token: int) -> None:
        self.tokens += 1
        self.latest = time.perf_counter() - self.began
        if self.first is None:
            self.first = self.latest
        self.tell(self.chunk(self.decoder.push(token)))

    def finish(self, reason: FinishReason) -> None:
        text, whole = self.decoder.end()
        whole = None if whole is None else self.lead + whole
        self.tell(replace(self.chunk(text), finish_reason=reason, full_text=whole))

    def chunk(self, text: str = "") -> Chunk:
        seconds = self.latest - (self.first or 0.0)
        return Chunk(
            text=text,
            tokens=self.tokens,
            tokens_per_s=(self.tokens - 1) / seconds if seconds > 0 else 0.0,
            first_token_s=self.first,
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused_tokens,
            dropped_turns=self.dropped_turns,
        )


class LocalEngine(ThreadedEngine):
    """A causal language model of transformers and its tokenizer."""

    def __init__(
        self, model: Any, tokenizer: Any, template: Template, info: EngineInfo, base: Path | None = None
    ) -> None:
        """
        Args:
            model: on its device, in evaluation mode. The engine takes it over.
            tokenizer: its tokenizer, used by this engine alone.
            template: as `choose_template` returns it.
            info: what to tell of it; memory is measured anew each time it is asked for.
            base: folder of the model, by which adapters are matched to it; without one it wears none.
        """
        super().__init__()
        eos = tokenizer.eos_token_id
        self._generator = Generator(model, [*template.stops, *([] if eos is None else [eos])])
        self._tokenizer = tokenizer
        self._template = template
        self._decoder = DecoderFactory(tokenizer)
        self._vocabulary = model.get_input_embeddings().num_embeddings
        self._device = str(model.device.type)
        self._info = info
        self._wardrobe = Wardrobe(model, base) if base else None

    @classmethod
    @apart
    def load(
        cls, folder: Path | str, low_bit: str = "sym_int4", device: str = "auto", *,
        name: str = "", dtype: str = "", trust_remote_code: bool = False,
    ) -> LocalEngine:  # fmt: skip
        """Load a model folder and warm it up.

        Args:
            folder: a Hugging Face folder, in full precision or already in low bit; the latter is loaded as it is.
            low_bit: one of `nibble.lowbit.FORMATS`; empty keeps the stored precision.
            device: auto, cpu, xpu or cuda.
            name: what to call the model; empty is the folder's name.
            dtype: of activations; empty is the device's own.
            trust_remote_code: whether Python code in the folder may run.

        Raises:
            ModelError: the folder cannot be loaded.
            FormatError: `low_bit` is no format.
            DeviceError: the device is not there or has not enough memory.
        """
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        folder, start = Path(folder), time.perf_counter()
        name = name or (GUIDE if folder.resolve() == GUIDE_FOLDER else folder.name)
        low_bit = resolve(low_bit).name if low_bit else ""
        check(folder, trust_remote_code=trust_remote_code)
        config, card, where = read_config(folder), inspect(folder, name), choose(device)
        dtype = dtype or DTYPES.get(low_bit) or where.dtype
        if dtype != where.dtype:
            where = replace(where, dtype=dtype, reason=f"{where.reason.partition(';')[0]}; {dtype}: asked for")
        stored = card.format in FORMATS and "quantization_config" in config
        try:
            tokenizer = _load_tokenizer(folder, trust_remote_code)
            names = [card.name, folder.name, str(config.get("_name_or_path", ""))]
            template = choose_template(tokenizer, card.family, names)
            model = _load_model(folder, None if stored else low_bit or "bf16", where, trust_remote_code)
        except Exception as error:  # noqa: BLE001 - a foreign folder can make transformers raise anything
            raise _loading_error(error, card.name, where.kind) from error
        info = EngineInfo(
            model=card.name, format=card.format if stored else low_bit or SHORT.get(dtype, dtype), device=where.kind,
            dtype=where.dtype, reason=where.reason, context=_context(model, tokenizer), template=template.name,
            family=card.family, parameters=card.parameters, load_s=time.perf_counter() - start, note=template.note,
        )  # fmt: skip
        engine = cls(model, tokenizer, template, info, folder)
        engine.warm_up()
        engine._info = replace(engine._info, kernel=kernel_name(model))  # a kernel is tried, and kept, at its first use
        return engine

    @property
    def info(self) -> EngineInfo:
        """What is loaded; the memory is measured now."""
        return replace(self._info, memory_bytes=used_memory(self._device))

    def warm_up(self) -> None:
        """Answer once and forget it: first uses of kernels and templates must not fall into a person's answer."""
        start = time.perf_counter()
        # Long enough to be read in pieces, so that the many-row kernels are used too.
        words = "warm " * (100 if self._info.context >= 512 else 4)
        for _ in self.stream([{"role": "user", "content": words}], Sampling(max_new_tokens=3), threading.Event()):
            pass
        self._generator.forget()
        release_memory(self._device)
        self._info = replace(self._info, warmup_s=time.perf_counter() - start)

    def answer(self, ticket: Ticket) -> None:
        """As `ThreadedEngine.answer`."""
        began, context = time.perf_counter(), self._info.context
        worn = self._wear(ticket.request.adapter)
        wanted = plan(ticket.request.sampling, self._generator.defaults)
        reserve = min(wanted.max_new_tokens, max(1, context // 4))
        fitted = fit(clean(ticket.request.messages), self._encode, context, reserve)
        if max(fitted.ids) >= self._vocabulary:
            raise ModelError("The tokenizer has tokens that the model does not know.", "Use the model's own tokenizer.")
        progress = _Progress(
            ticket, self._decoder(fitted.ids[-4:] if self._template.continues else ()), began, len(fitted.ids),
            fitted.dropped_turns, self._opened_thought(fitted.ids),
        )  # fmt: skip
        progress.tell(progress.chunk(progress.lead))
        wanted = replace(wanted, max_new_tokens=min(wanted.max_new_tokens, context - len(fitted.ids)))
        listener = Listener(progress.stopped, progress.on_prompt, progress.on_token)
        stops, wearer = (worn.stops, worn.key) if worn else ((), None)
        progress.finish(self._generator.run(fitted.ids, wanted, listener, stops=stops, wearer=wearer))

    def _wear(self, adapter: str) -> Dressed | None:
        """Put the adapter in a folder on the model, or take off what it wears."""
        if self._wardrobe is None:
            if adapter:
                raise ModelError("This model wears no adapters.", "Load it from its folder.")
            return None
        return self._wardrobe.wear(adapter)

    def explain(self, error: BaseException) -> NibbleError:
        """As `ThreadedEngine.explain`; out of memory is told with what to do about it."""
        if isinstance(error, NibbleError) or not is_out_of_memory(error):
            return super().explain(error)
        self._generator.forget()
        release_memory(self._device)
        return DeviceError(
            f"The {self._device} ran out of memory while answering.",
            "Begin a new chat, ask for a shorter answer, or load the model in a format with fewer bits.",
        )

    def close(self) -> None:
        """End what runs and give the model's memory back. A second call does nothing."""
        super().close()
        if hasattr(self, "_generator"):
            del self._generator, self._wardrobe
            release_memory(self._device)

    def _encode(self, messages: Any) -> list[int]:
        return self._template.encode(self._tokenizer, messages)

    def _opened_thought(self, ids: list[int]) -> str:
        """`<think>` where the prompt itself opens it: the answer must show where the thinking that follows began."""
        tail = self._tokenizer.decode(ids[-16:])
        return "<think>\n" if tail.rstrip().endswith("<think>") else ""


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)


def _load_model(folder: Path, low_bit: str | None, where: Device, trust_remote_code: bool) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, load_in_low_bit=low_bit, dtype=where.torch_dtype, trust_remote_code=trust_remote_code
    )
    model = model.to(where.kind).eval()  # type: ignore[arg-type]
    prepare(model)
    return model


def _context(model: Any, tokenizer: Any) -> int:
    config = model.config.get_text_config()
    found = next((int(getattr(config, key)) for key in CONTEXT_KEYS if isinstance(getattr(config, key, None), int)), 0)
    # Tokenizers that were never told write a length of 10^30.
    told = tokenizer.model_max_length if tokenizer.model_max_length < 2**31 else 0
    return found or told or DEFAULT_CONTEXT


def _loading_error(error: Exception, name: str, kind: str) -> NibbleError:
    if is_out_of_memory(error.__cause__ or error):
        return DeviceError(
            f"The {kind} has not enough memory for {name}.", "Choose a format with fewer bits, or a smaller model."
        )
    if isinstance(error, NibbleError):
        return error
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ModelError(f"{name} could not be loaded: {line[:300]}", "Check the folder, or download the model again.")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory, of whatever device, was not enough."""
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)
    )


def release_memory(device: str) -> None:
    """Give memory that nothing holds any more back to the device."""
    gc.collect()
    if device == "cpu":
        give_back_memory()
    else:
        torch.accelerator.empty_cache()


def used_memory(device: str) -> int:
    """Bytes that this process holds: on a GPU what torch allocated there, else private memory (RssAnon of /proc)."""
    if device != "cpu":
        return int(torch.get_device_module(device).memory_allocated())
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(psutil.Process().memory_info().rss)
