"""The process in which IPEX-LLM, or BigDL-LLM where that is installed, holds a model: `python -m
nibble.bigdl.child`, run by the interpreter of the environment that requirements-bigdl.txt makes.

Promises the protocol of `nibble.engines.wire`, that folders written by transformers 5 are read as they were meant, and
that pickles are read as tensors alone. Must not import what needs transformers 5. Knows nothing of the page.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nibble.bigdl.engine import BigdlEngine
from nibble.bigdl.folders import check, saved_format
from nibble.bigdl.older_folder import older_copy
from nibble.bigdl.older_tokenizer import OlderTokenizer
from nibble.checkpoint import CONTEXT_KEYS, read_config
from nibble.devices import XPU_VARIABLES, import_extension, usable_cores
from nibble.engines.base import EngineInfo, LoadSpec
from nibble.engines.child import main
from nibble.errors import DeviceError, ModelError, NibbleError
from nibble.lowbit.formats import resolve
from nibble.prompts import choose_template

LIBRARIES = {"ipex_llm": "ipex-llm", "bigdl.llm": "bigdl-llm"}
"""Module of the library, under its later and its earlier name -> package. The first that is installed is used."""

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
"""Where neither config.json nor the tokenizer says how many tokens the model can see."""


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
    saved = saved_format(config)
    check(folder, trusted=spec.trust_remote_code)
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
    if kind == "xpu":
        for name, value in XPU_VARIABLES.items():
            os.environ.setdefault(name, value)
    why = "asked for" if wanted != "auto" else "found by torch" if there else "torch finds no Intel GPU"
    return kind, f"{kind}: {why}" + (f"; {extension}" if extension else "")


def _load(folder: Path, low_bit: str, trusted: bool) -> tuple[Any, OlderTokenizer, str]:
    """The model, its tokenizer, and the library with its version. An empty `low_bit` means a folder of the library."""
    library = next((name for name in LIBRARIES if _installed(name)), "")
    if not library:
        raise ModelError(f"{sys.prefix} has neither ipex-llm nor bigdl-llm.", "Run `make bigdl`.")
    with tempfile.TemporaryDirectory(prefix="nibble-bigdl-") as temporary:
        # Where transformers puts a folder's own code before it imports it; its cache would keep a copy for each load.
        os.environ["HF_MODULES_CACHE"] = str(Path(temporary) / "modules")
        copy = Path(temporary) / "model"
        copy.mkdir()
        model, tokenizer = _load_copy(library, older_copy(folder, copy), low_bit, trusted)
    package = LIBRARIES[library]
    return model, OlderTokenizer(tokenizer), f"{package} {importlib.metadata.version(package)}"


def _load_copy(library: str, folder: Path, low_bit: str, trusted: bool) -> tuple[Any, Any]:
    import torch
    import transformers

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())
    transformers.logging.set_verbosity_error()
    auto = importlib.import_module(f"{library}.transformers").AutoModelForCausalLM
    options: dict[str, Any] = {"trust_remote_code": trusted}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    if not low_bit:
        return auto.load_low_bit(str(folder), **options), tokenizer
    if low_bit == "bf16":
        options["torch_dtype"] = torch.bfloat16
    return auto.from_pretrained(str(folder), load_in_low_bit=low_bit, **options), tokenizer


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
    return ModelError(f"BigDL-LLM could not load {name}: {line[:300]}", "Try Nibble's own engine: engine: nibble.")


if __name__ == "__main__":
    code = main(load)
    # Threads of torch and of the engine would hold up an ordinary exit.
    sys.stderr.flush()
    os._exit(code)
