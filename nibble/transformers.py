"""Hugging Face models in low bit: a drop-in for the `transformers` API of BigDL-LLM and IPEX-LLM.

    from nibble.transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2-1.5B-Instruct", load_in_4bit=True)
    model.save_low_bit("qwen2-int4")
    model = AutoModelForCausalLM.load_low_bit("qwen2-int4")

Promises that peak memory while quantizing is the packed model and one weight, and that a saved folder is whole or not
there. After this module is imported, transformers' own classes read such folders too. Knows nothing of engines.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from nibble import __version__, checkpoint, publish, screen
from nibble.errors import FormatError, ModelError
from nibble.lowbit import attention, lean
from nibble.lowbit.formats import DEFAULT, Format, resolve
from nibble.lowbit.linear import LowBitLinear
from nibble.lowbit.quantizer import METHOD, LowBitConfig
from nibble.sources.safetensors import TOKENIZER_FILES

log = logging.getLogger(__name__)

PLAIN_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

WITHOUT_MEANING = (
    "optimize_model", "cpu_embedding", "disk_embedding", "embedding_qtype", "imatrix", "mixed_precision", "speculative",
    "pipeline_parallel_stages", "model_hub", "low_cpu_mem_usage",
)  # fmt: skip
"""Arguments of IPEX-LLM that are accepted and change nothing here."""

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""An id on Hugging Face: owner/name."""

DOWNLOADED = [*TOKENIZER_FILES, "*.json", "*.safetensors", "*.jinja", "*.py", "*.model"]
"""Files of a repository that are fetched; never pickles."""

NOT_LOW_BIT = "Please use from_pretrained with load_in_4bit or load_in_low_bit to get a low-bit model."


@dataclass
class _Request:
    """What a call of `from_pretrained` asks for, its arguments sorted out."""

    format: Format | None
    """None: nothing was said about low bit."""
    skip: list[str]
    overrides: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    """For transformers."""


class _AutoLowBit:
    """What the auto classes below share."""

    auto_class: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Load a model, packing its linear layers while they are read.

        Args:
            pretrained_model_name_or_path: a folder, or the id of a model on Hugging Face.
            load_in_4bit: short for load_in_low_bit="sym_int4".
            load_in_low_bit: name of a format; "bf16" and "fp16" pack nothing.
            modules_to_not_convert: names of modules that stay dense, such as ["lm_head"]; whole parts of a dotted path.
            overrides: names of modules -> another format for them, such as {"lm_head": "sym_int8"}; the last match
                counts, and "bf16" leaves them dense.
            dtype, torch_dtype: of the activations and what stays dense; default bfloat16.
            quantization_config: a `BitsAndBytesConfig` is taken for the nearest format.
            trust_remote_code: whether the folder's own Python code may run; default no.
            optimize_model and other arguments of IPEX-LLM: accepted.
            All else goes to transformers.

        Raises:
            FormatError: no such format.
            ModelError: the folder cannot be loaded, or is packed in another format already.
        """
        request = _sort(kwargs)
        source = str(pretrained_model_name_or_path)
        folder = _folder_of(source, request.options)
        screen.check(folder, trust_remote_code=bool(request.options.get("trust_remote_code")), tokenizer=False)
        config = checkpoint.read_config(folder)
        stored = _stored_format(folder, config)
        if stored and request.format not in (None, resolve(stored)):
            raise ModelError(
                f"{folder.name} is a low-bit model already ({stored}).",
                "Please use load_low_bit to load it, or quantize its full-precision original.",
            )
        if not stored and request.format is None:
            raise FormatError(
                "No low-bit format was given.",
                f'Please use from_pretrained with load_in_4bit=True or load_in_low_bit="{DEFAULT}" (or "bf16").',
            )
        return _load(cls.auto_class, folder, source, request, stored)

    @classmethod
    def load_low_bit(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Load a folder that `save_low_bit` wrote.

        Args:
            pretrained_model_name_or_path: the folder, or an id on Hugging Face.
            All else as `from_pretrained`; the format and what is packed are the folder's.

        Raises:
            ModelError: not a low-bit model, incomplete, or not loadable.
        """
        for name in ("load_in_4bit", "load_in_low_bit", "modules_to_not_convert", "overrides", "quantization_config"):
            kwargs.pop(name, None)
        request = _sort(kwargs)
        source = str(pretrained_model_name_or_path)
        folder = _folder_of(source, request.options)
        screen.check(folder, trust_remote_code=bool(request.options.get("trust_remote_code")), tokenizer=False)
        stored = _stored_format(folder, checkpoint.read_config(folder))
        if not stored:
            raise ModelError(f"{folder.name} is not a low-bit model.", NOT_LOW_BIT)
        return _load(cls.auto_class, folder, source, request, stored)


class AutoModelForCausalLM(_AutoLowBit):
    """Models that continue a text."""

    auto_class = transformers.AutoModelForCausalLM


class AutoModel(_AutoLowBit):
    """Models without a head, and those that register their own class under this name (ChatGLM)."""

    auto_class = transformers.AutoModel


class AutoModelForSeq2SeqLM(_AutoLowBit):
    """Encoder-decoder models of text (T5)."""

    auto_class = transformers.AutoModelForSeq2SeqLM


class AutoModelForSpeechSeq2Seq(_AutoLowBit):
    """Encoder-decoder models of speech (Whisper)."""

    auto_class = transformers.AutoModelForSpeechSeq2Seq


def save_low_bit(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a packed model, its tokenizer and generation config to a folder, whole or not at all.

    Args:
        model: one that this module or, after its import, transformers has loaded.
        folder: replaced whole if an earlier save stands there.

    Raises:
        ModelError: the model is not packed, or something else stands in that place.
        OSError: writing failed; what stood there is untouched.
    """
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, LowBitConfig):
        raise ModelError("This is not a low-bit model.", NOT_LOW_BIT)
    source = Path(model.config.name_or_path or ".")
    facts = {
        "format": config.low_bit,
        "source": getattr(model, "_nibble_source", source.name),
        "parameters": count_parameters(model),
        "versions": {"nibble": __version__, **{name: version(name) for name in ("torch", "transformers")}},
    }
    with publish.publication(Path(folder), facts) as fresh:
        model.save_pretrained(fresh, max_shard_size="5GB")
        if source.is_dir():
            for pattern in TOKENIZER_FILES:
                for path in source.glob(pattern):
                    if path.is_file():
                        shutil.copyfile(path, fresh / path.name)


def count_parameters(model: PreTrainedModel) -> int:
    """Weights of the model before packing: no padding, no scales, and what the original shared counts once."""
    known = publish.read_manifest(Path(model.config.name_or_path or ".")).get("parameters")
    if isinstance(known, int):
        return known
    packed = {name: module for name, module in model.named_modules() if isinstance(module, LowBitLinear)}
    tied = {name.removesuffix(".weight") for name in getattr(getattr(model, "hf_quantizer", None), "tied", ())}
    codes = {id(module.weight) for module in packed.values()}
    dense = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in codes)
    return dense + sum(module.out_features * module.in_features for name, module in packed.items() if name not in tied)


def _sort(arguments: dict[str, Any]) -> _Request:
    """Take what is ours out of the arguments of a call; what is left is for transformers."""
    options = dict(arguments)
    for name in WITHOUT_MEANING:
        if options.pop(name, None) not in (None, False):
            _say_once(f"{name} is accepted for compatibility and changes nothing here.")
    low_bit = options.pop("load_in_low_bit", None)
    if options.pop("load_in_4bit", False) and low_bit is None:
        low_bit = DEFAULT
    skip = list(options.pop("modules_to_not_convert", None) or ())
    overrides = dict(options.pop("overrides", None) or {})
    dtype = options.pop("torch_dtype", None)
    options["dtype"] = _dtype_of(options.get("dtype") or dtype)
    foreign = options.pop("quantization_config", None)
    if foreign is not None:
        taken = _from_bitsandbytes(foreign)
        low_bit, skip = low_bit or taken["low_bit"], skip or taken["skip"]
        overrides = overrides or taken["overrides"]
        options["dtype"] = options["dtype"] or taken["dtype"]
    fmt = resolve(low_bit) if low_bit is not None else None
    return _Request(fmt, skip, overrides, options)


def _dtype_of(value: Any) -> torch.dtype | None:
    """A dtype by name or itself; None for "auto" and nothing: what suits best is chosen later."""
    if value is None or value == "auto":
        return None
    dtype = getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"{value!r} is not a dtype to compute in.", "Use bfloat16, float16, float32 or auto.")
    return dtype


def _from_bitsandbytes(config: Any) -> dict[str, Any]:
    """The nearest format to a `BitsAndBytesConfig`, as IPEX-LLM took it: nf4, fp4, int4, bf16; 8 bits as sym_int8."""
    if isinstance(config, LowBitConfig):
        taken = {"low_bit": config.low_bit, "skip": config.modules_to_not_convert, "overrides": config.overrides}
        return {**taken, "dtype": None}
    get = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
    names = {"nf4": "nf4", "fp4": "fp4", "int4": "sym_int4", "bf16": "bf16"}
    if get("load_in_8bit"):
        low_bit = "sym_int8"
    elif get("load_in_4bit") and (kind := str(get("bnb_4bit_quant_type"))) in names:
        low_bit = names[kind]
    else:
        raise FormatError(
            f"A {type(config).__name__} is not something that can be loaded in low bit here.",
            "Give a BitsAndBytesConfig with load_in_4bit=True, or load_in_low_bit.",
        )
    if get("bnb_4bit_use_double_quant"):
        _say_once("bnb_4bit_use_double_quant is accepted and changes nothing here: scales stay in float32.")
    return {
        "low_bit": low_bit,
        "skip": list(get("llm_int8_skip_modules") or ()),
        "overrides": {},
        "dtype": _dtype_of(get("bnb_4bit_compute_dtype")),
    }


def _folder_of(source: str, options: dict[str, Any]) -> Path:
    """The folder of a model: itself, or where Hugging Face's files of that id were downloaded to."""
    folder = Path(source).expanduser()
    if folder.exists() or not REPOSITORY.fullmatch(source):
        return folder
    from huggingface_hub import snapshot_download

    known = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    arguments = {name: options.pop(name) for name in known if options.get(name) is not None}
    try:
        return Path(snapshot_download(source, allow_patterns=DOWNLOADED, **arguments))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source} is neither a folder nor a model that could be downloaded: {_first_line(error)}",
            "Check the name and the network, or name a folder.",
        ) from error


def _stored_format(folder: Path, config: dict[str, Any]) -> str:
    """Name of the format that a folder is packed in; empty where it is not.

    Raises:
        ModelError: it is packed by something else, or a file of it is missing.
    """
    if "bigdl_transformers_low_bit" in config:
        raise ModelError(
            f"{folder.name} was saved by IPEX-LLM or BigDL-LLM, whose files hold pickles.",
            "Convert it with nibble.bigdl.convert.convert(folder, out), or quantize its full-precision original.",
        )
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is None:
        return ""
    if method != METHOD:
        raise ModelError(
            f"{folder.name} is quantized with {method} already.",
            "Take its full-precision original, or load it with that.",
        )
    # The weights alone: tokenizer.save_pretrained into the same folder is what the tutorials do next.
    publish.verify(folder, pattern="*.safetensors*")
    return str(config["quantization_config"].get("low_bit", DEFAULT))


def _load(auto_class: Any, folder: Path, source: str, request: _Request, stored: str) -> PreTrainedModel:
    fmt, options = request.format, request.options
    plain = PLAIN_DTYPES.get(fmt.name) if fmt else None
    if not stored and fmt is not None and fmt.quantized:
        options["quantization_config"] = LowBitConfig(fmt.name, request.skip, request.overrides)
    # A folder of ours knows the dtype that it was saved in.
    options["dtype"] = options["dtype"] or plain or ("auto" if stored else torch.bfloat16)
    try:
        # Pickles lie beside the weights of many models; none is ever a way out.
        model, found = auto_class.from_pretrained(
            folder, **{**options, "use_safetensors": True, "output_loading_info": True}
        )
    except Exception as error:  # noqa: BLE001 - a foreign folder can make transformers raise anything
        for name, reason in getattr(options.get("quantization_config"), "refused", {}).items():
            raise ModelError(f"{name} of {folder.name} cannot be packed. {reason.message}", reason.hint) from error
        raise ModelError(
            f"{folder.name} could not be loaded: {_first_line(error)}",
            "Check that the folder is complete and that this version of transformers knows the model.",
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(
            f"The files of {folder.name} lack {len(missing)} of the model's weights, {missing[0]} first.",
            "The model is incomplete or of another kind: download it again.",
        )
    if "attn_implementation" not in options and model.device.type == "cpu":
        attention.use(model)
        lean.offer(model)
    model._nibble_source = publish.read_manifest(folder).get("source") or (
        folder.name if folder == Path(source).expanduser() else source
    )
    model.save_low_bit = MethodType(save_low_bit, model)
    return model


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@cache
def _say_once(sentence: str) -> None:
    log.info(sentence)
