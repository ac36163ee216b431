"""The process in which IPEX-LLM, or BigDL-LLM where that is installed, holds a model: `python -m
nibble.engines.bigdl_child`, run by the interpreter of the environment that requirements-bigdl.txt makes.

Promises the protocol of `nibble.engines.wire`, that folders written by transformers 5 are read as they were meant, and
that pickles are read as tensors alone. Must not import what needs transformers 5. Knows nothing of the page.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from nibble.devices import import_extension, usable_cores
from nibble.engines.base import Chunk, EngineInfo, FinishReason, LoadSpec, Sampling
from nibble.engines.child import main
from nibble.engines.older_copy import older_copy
from nibble.engines.older_tokenizer import OlderTokenizer
from nibble.engines.text import SlowDecoder
from nibble.engines.threaded import ThreadedEngine, Ticket
from nibble.errors import DeviceError, FormatError, ModelError, NibbleError
from nibble.library import CONTEXT_KEYS, PICKLES, check_code, read_config, weight_files
from nibble.lowbit.formats import resolve
from nibble.prompts import Template, choose_template, clean, fit

LIBRARIES = ("ipex_llm", "bigdl.llm")
"""The library under its later and its earlier name; the first that is installed is used."""

LOW_BIT_KEY = "bigdl_transformers_low_bit"
"""Key of config.json that marks a folder saved by the library, with the format as its value."""

ON_CPU = ("sym_int4", "asym_int4", "sym_int5", "asym_int5", "sym_int8", "bf16")
"""Formats whose forward the library has on a CPU (2.2.0); the others raise in mid-answer."""

ENVIRONMENT = {
    "BIGDL_IMPORT_IPEX": "0",  # the library's own import of Intel's extension crashes where it does not fit the torch
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
UNSAFE = ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",)
"""Variables under which torch would open pickles whole."""

DEFAULT_CONTEXT = 4096
DEFAULT_NEW_TOKENS = 1024
PULSE_S = 5.0
"""How often a long prompt, which the library reads in one piece, gives a sign of life."""


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
                # One more than wanted: transformers' own limit, looked at first, would hide the last token from `watch`.
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


def load(spec: LoadSpec) -> BigdlEngine:
    """Load a folder with the library and warm it up: one in full precision is quantized, one of its own reloaded.

    Raises:
        ModelError: the folder cannot be loaded here.
        FormatError: the format is none of the library's.
        DeviceError: the device is not there, or has not the format.
    """
    for name in UNSAFE:
        os.environ.pop(name, None)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    start, folder = time.perf_counter(), Path(spec.folder)
    name = spec.name or folder.name
    config = read_config(folder)
    saved = str(config.get(LOW_BIT_KEY, ""))
    _check(folder, config, spec)
    low_bit = saved or (resolve(spec.low_bit).name if spec.low_bit else "bf16")
    device, reason = _device(spec.device)
    if device == "cpu" and low_bit not in ON_CPU:
        raise DeviceError(
            f"BigDL-LLM computes {low_bit} on Intel GPUs only.",
            f"Choose one of {', '.join(ON_CPU)}, or load the model with Nibble's own engine.",
        )
    try:
        model, tokenizer, library = _load(folder, "" if saved else low_bit, spec.trust_remote_code)
        model = model.to(device).eval()
    except NibbleError:
        raise
    except Exception as error:  # noqa: BLE001 - a foreign folder can make the library raise anything
        raise _loading_error(error, name) from error
    template = choose_template(tokenizer, str(config.get("model_type", "")), [name, str(config.get("_name_or_path"))])
    info = EngineInfo(
        model=name, format=low_bit, device=device, dtype=str(model.dtype).removeprefix("torch."),
        reason=reason, context=_context(model.config, tokenizer), template=template.name,
        family=str(config.get("model_type", "")), parameters=_parameters(model), kernel=library,
        load_s=time.perf_counter() - start, note=template.note,
    )  # fmt: skip
    engine = BigdlEngine(model, tokenizer, template, info)
    engine.warm_up()
    return engine


def _check(folder: Path, config: dict[str, Any], spec: LoadSpec) -> None:
    check_code(folder, config, trusted=spec.trust_remote_code)
    if LOW_BIT_KEY in config:
        if not any(next(folder.glob(pattern), None) for pattern in PICKLES):
            raise ModelError(f"{folder.name} has no weights (pytorch_model*.bin).", "Copy the whole folder again.")
        return
    weight_files(folder)
    method = (config.get("quantization_config") or {}).get("quant_method", "")
    if method not in ("", "gptq", "awq"):
        raise ModelError(
            f"{folder.name} is stored in a form that BigDL-LLM does not read ({method}).",
            "Load it with Nibble's own engine: engine: nibble in config.yaml.",
        )


def _device(wanted: str) -> tuple[str, str]:
    """The device and why: Intel's GPUs where torch, or its extension, finds one; else the CPU."""
    if wanted == "cuda":
        raise DeviceError("BigDL-LLM has no CUDA.", "Use --device cpu, or Nibble's own engine.")
    extension = import_extension()
    import torch

    there = bool(hasattr(torch, "xpu") and torch.xpu.is_available())
    if wanted == "xpu" and not there:
        raise DeviceError(f"xpu was asked for, but torch finds none. {extension}".strip(), "Use --device cpu.")
    kind = "xpu" if there and wanted != "cpu" else "cpu"
    why = "asked for" if wanted != "auto" else "found by torch" if there else "torch finds no Intel GPU"
    return kind, f"{kind}: {why}" + (f"; {extension}" if extension else "")


def _load(folder: Path, low_bit: str, trusted: bool) -> tuple[Any, OlderTokenizer, str]:
    """The model, its tokenizer, and the library with its version. An empty `low_bit` means a folder of the library."""
    library = next((name for name in LIBRARIES if _installed(name)), "")
    if not library:
        raise ModelError(f"{sys.prefix} has neither ipex-llm nor bigdl-llm.", "Run `make bigdl`.")
    import torch
    import transformers

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())
    transformers.logging.set_verbosity_error()
    auto = importlib.import_module(f"{library}.transformers").AutoModelForCausalLM
    options = {"trust_remote_code": trusted}
    with tempfile.TemporaryDirectory(prefix="nibble-bigdl-") as temporary:
        copy = older_copy(folder, Path(temporary))
        tokenizer = transformers.AutoTokenizer.from_pretrained(copy, **options)
        if not low_bit:
            model = auto.load_low_bit(str(copy), **options)
        elif low_bit == "bf16":
            model = auto.from_pretrained(str(copy), load_in_low_bit=low_bit, torch_dtype=torch.bfloat16, **options)
        else:
            model = auto.from_pretrained(str(copy), load_in_low_bit=low_bit, **options)
    module = sys.modules[library]
    version = getattr(module, "__version__", "") or importlib.import_module("importlib.metadata").version(
        library.replace(".", "-").replace("_", "-")
    )
    return model, OlderTokenizer(tokenizer), f"{library} {version}"


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _context(config: Any, tokenizer: OlderTokenizer) -> int:
    keys = (*CONTEXT_KEYS, "model_max_length")
    found = next((int(getattr(config, key)) for key in keys if isinstance(getattr(config, key, None), int)), 0)
    told = tokenizer.model_max_length if tokenizer.model_max_length < 2**31 else 0
    return found or told or DEFAULT_CONTEXT


def _parameters(model: Any) -> int:
    """Weights of the model; a packed matrix tells its shape apart from its bytes."""
    total = 0
    for parameter in model.parameters():
        shape = getattr(parameter, "_shape", None) or parameter.shape
        count = 1
        for side in shape:
            count *= int(side)
        total += count
    return total


def _loading_error(error: Exception, name: str) -> NibbleError:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, MemoryError):
        return DeviceError(f"There is not enough memory for {name}.", "Choose a smaller model.")
    if isinstance(error, FormatError):
        return error
    return ModelError(f"BigDL-LLM could not load {name}: {line[:300]}", "Try Nibble's own engine: engine: nibble.")


if __name__ == "__main__":
    code = main(load)
    # Threads of torch and of the engine would hold up an ordinary exit.
    sys.stderr.flush()
    os._exit(code)
