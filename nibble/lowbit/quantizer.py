"""The plug-in for transformers: `from_pretrained` packs each weight while it loads, and reloads what was packed.

Promises that importing this module is enough for transformers' own classes to read a packed folder, that no dense
model is ever held (one weight at a time is), that tied embeddings stay right when the output head is packed, and that a
weight which is missing from the files is an error, never noise. Knows nothing of Nibble's own loading functions.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from nibble.errors import FormatError, ModelError
from nibble.lowbit.blocks import quantize
from nibble.lowbit.formats import DEFAULT, Format, resolve
from nibble.lowbit.linear import LowBitLinear

log = logging.getLogger(__name__)

METHOD = "nibble"
LAYOUT = 1
"""Version of the stored form; raised when the bytes of a packed weight come to mean something else."""


class Refused(dict[str, ModelError]):
    """Shared by all copies of a configuration: transformers copies the one it is given before it uses it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Refused:
        return self


@register_quantization_config(METHOD)
class LowBitConfig(QuantizationConfigMixin):
    """What stands under `quantization_config` in config.json."""

    def __init__(
        self,
        low_bit: str = DEFAULT,
        modules_to_not_convert: list[str] | None = None,
        overrides: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
        layout: int = LAYOUT,
        **_: Any,
    ) -> None:
        """
        Args:
            low_bit: name of a format.
            modules_to_not_convert: modules that stay as they are: a name such as `lm_head` or `layers.0.mlp` means
                every module whose dotted path holds it, whole parts only (`layers.1` is not `layers.11`).
            overrides: names, as above -> another format for these modules; "bf16" and "fp16" mean that they stay as
                they are. Where several match a module, the last one counts.
            layout: version of the stored form.

        Raises:
            FormatError: no such format.
            ModelError: the folder was written by a later version.
        """
        self.quant_method = METHOD  # type: ignore[assignment]
        self.low_bit = resolve(low_bit).name
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        try:
            self.overrides = {str(pattern): resolve(name).name for pattern, name in dict(overrides or {}).items()}
        except (TypeError, ValueError):
            raise FormatError("overrides is no table of formats.", 'Write it as {"lm_head": "sym_int8"}.') from None
        if layout > LAYOUT:
            raise ModelError(
                "This model was packed by a later version of Nibble.", "Update Nibble, or quantize it again."
            )
        self.layout = layout
        self.refused = Refused()
        """Weights that could not be packed, and why; transformers itself reports them in a table and a RuntimeError."""

    def format_of(self, module: str) -> Format | None:
        """The format in which the linear layer of this dotted path is packed; None: it stays as it is."""
        if any(_names(pattern, module) for pattern in self.modules_to_not_convert):
            return None
        matches = [name for pattern, name in self.overrides.items() if _names(pattern, module)]
        fmt = resolve(matches[-1] if matches else self.low_bit)
        return fmt if fmt.quantized else None

    def to_dict(self) -> dict[str, Any]:
        """What is written to config.json. The overrides are pairs: transformers sorts the keys of a table."""
        values = {name: value for name, value in vars(self).items() if name != "refused"}
        return {**values, "overrides": [list(pair) for pair in self.overrides.items()]}


@register_quantizer(METHOD)
class LowBitQuantizer(HfQuantizer):
    """Puts `LowBitLinear` in the place of `nn.Linear` before the weights are read, and packs them as they come."""

    quantization_config: LowBitConfig

    def __init__(self, quantization_config: LowBitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.tied: dict[str, str] = {}
        """Names of packed weights that were tied -> the weight they are read from."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work: parts of the model left on disk."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ModelError("A packed model cannot be kept partly on disk.", 'Use device_map="cpu" or "auto".')

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether the file's tensor of this name is dense and its layer packed."""
        path, _, tensor = param_name.rpartition(".")
        return not self.pre_quantized and tensor == "weight" and isinstance(model.get_submodule(path), LowBitLinear)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        formats = self.formats(model)
        for name, fmt in formats.items():
            layer: Any = model.get_submodule(name)
            packed = LowBitLinear(
                (layer.out_features, layer.in_features), fmt,
                bias=layer.bias is not None, dtype=layer.weight.dtype, device="meta",
            )  # fmt: skip
            # Otherwise transformers would try to draw random numbers for a weight that is missing.
            packed._is_hf_initialized = True  # type: ignore[assignment]
            model.set_submodule(name, packed)
        self._untie(model, {f"{name}.weight" for name in formats})
        if self.tied and not self.pre_quantized:
            # Some checkpoints have a head of its own though their configuration ties it.
            own = _names_in(kwargs.get("checkpoint_files") or ())
            self.tied = {target: source for target, source in self.tied.items() if target not in own}
        if not self.pre_quantized:
            _keep_stored_precision(model, {f"{name}.weight" for name in formats} | set(self.tied.values()))

    def formats(self, model: PreTrainedModel) -> dict[str, Format]:
        """Path of every linear layer that is packed -> how.

        Raises:
            ModelError: there is none.
        """
        config = self.quantization_config
        layers = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        # Their code casts activations to the dtype of these layers' weights.
        kept = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
        wanted = {name: config.format_of(name) for name in layers if not any(_names(part, name) for part in kept)}
        formats = {name: fmt for name, fmt in wanted.items() if fmt is not None}
        for setting in ("modules_to_not_convert", "overrides"):
            for pattern in getattr(config, setting):
                if not any(_names(pattern, name) for name, _ in model.named_modules()):
                    log.warning("%s: no module is called %s.", setting, pattern)
        if not formats:
            raise ModelError(
                f"{type(model).__name__} has no linear layer to pack ({len(layers)} are excluded).",
                "Load it in bf16, or exclude fewer modules.",
            )
        log.info("%d of %d linear layers are packed as %s.", len(formats), len(layers), config.low_bit)
        return formats

    def _untie(self, model: PreTrainedModel, packed: set[str]) -> None:
        """Forget ties of packed weights: they are read from the same tensor of the file, but no longer share memory."""
        ties = model.all_tied_weights_keys
        self.tied = {target: ties.pop(target) for target in packed & ties.keys()}
        if not ties:
            for config in (model.config, model.config.get_text_config()):
                config.tie_word_embeddings = False

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self.quantization_config)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Read each weight that a packed one was tied to twice: as it is, and packed."""
        sources = sorted(set(self.tied.values())) if not self.pre_quantized else []
        prefix = f"{model.base_model_prefix}." if model is not None else ""
        return weight_conversions + [
            WeightConverter(
                [pattern],
                [source, *(target for target in sorted(self.tied) if self.tied[target] == source)],
                operations=[_PackTied(self.quantization_config)],
            )
            for source in sources
            # A checkpoint may have been saved from the model's body alone, without the body's name.
            for pattern in dict.fromkeys((source, f"^{source.removeprefix(prefix)}"))
        ]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        vars(model).pop("_get_dtype_plan", None)
        # Saving reverses the conversions that loading made.
        vars(model)["_weight_conversions"] = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or ()
            if not any(isinstance(operation, _PackTied) for operation in getattr(conversion, "operations", ()))
        ]
        missing = [
            f"{name}.{tensor}"
            for name, module in model.named_modules()
            if isinstance(module, LowBitLinear)
            for tensor in ("weight", "weight_scale")
            if not getattr(getattr(module, tensor), "_is_hf_initialized", False)
        ]
        if missing:
            raise ModelError(
                f"The files lack {len(missing)} of the model's weights, {missing[0]} first.",
                "The model is incomplete or of another kind: download it again.",
            )
        _let_go_of_files(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, LowBitLinear):
                dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                dense.weight = nn.Parameter(module.dequantize(dtype or torch.float32))
                dense.bias = module.bias
                model.set_submodule(name, dense)
        return model


class _Pack(ConversionOps):
    """A dense tensor of the file -> packed codes and their scales."""

    def __init__(self, config: LowBitConfig) -> None:
        self.config = config

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *args: Any, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            tensors |= self.pack(model, name, value[0] if isinstance(value, list) else value)
        return tensors

    def pack(self, model: PreTrainedModel, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Codes and scales of one weight, under their names, in the format of its layer."""
        layer = model.get_submodule(name.rpartition(".")[0])
        assert isinstance(layer, LowBitLinear)
        try:
            result = quantize(weight, layer.format.name)
        except ModelError as error:
            self.config.refused[name] = error
            raise
        return {name: result.codes, f"{name}_scale": result.scales}


class _PackTied(_Pack):
    """One dense tensor of the file -> itself under the first target's name, and packed under the others'."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *args: Any, target_patterns: list[str], model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        value = next(iter(input_dict.values()))
        weight = value[0] if isinstance(value, list) else value
        first, *others = target_patterns
        tensors = {first: weight.to(model.get_parameter(first).dtype)}
        for name in others:
            tensors |= self.pack(model, name, weight)
        return tensors


def _names(pattern: str, path: str) -> bool:
    """Whether a dotted path holds the pattern as whole parts."""
    return f".{pattern}." in f".{path}."


def _names_in(files: Sequence[str]) -> set[str]:
    """Names of the tensors in safetensors files."""
    names: set[str] = set()
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                names.update(opened.keys())
    return names


def _keep_stored_precision(model: PreTrainedModel, names: set[str]) -> None:
    """Hand weights to the quantizer as the file has them, not rounded to the dtype of the activations first."""
    plan = model._get_dtype_plan
    pattern = f"^(?:{'|'.join(re.escape(name) for name in sorted(names))})$"
    vars(model)["_get_dtype_plan"] = lambda dtype: {**plan(dtype), pattern: None}


def _let_go_of_files(model: nn.Module) -> None:
    """Copy what still lies in a mapped file, so that the file can be replaced, cut or deleted under a living model."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    ranges = [
        tuple(int(address, 16) for address in line.split(maxsplit=1)[0].split("-"))
        for line in maps.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.endswith(".safetensors")
    ]
    for tensor in (*model.parameters(), *model.buffers()):
        if any(start <= tensor.data_ptr() < stop for start, stop in ranges):
            tensor.data = tensor.data.clone()


def pack_model(
    model: PreTrainedModel, low_bit: str, skip: Sequence[str] = (), overrides: Mapping[str, str] | None = None
) -> PreTrainedModel:
    """Pack the linear layers of a model that is loaded already, in place; it can then be saved like any packed one.

    Args:
        model: in full precision, on the CPU or an accelerator.
        low_bit: name of a format.
        skip: as `LowBitConfig`'s modules_to_not_convert.
        overrides: as there.

    Raises:
        FormatError, ModelError: as `LowBitConfig`; the model has no linear layer to pack, or numbers that do not fit.
    """
    quantizer = LowBitQuantizer(LowBitConfig(low_bit, list(skip), dict(overrides or {})))
    formats = quantizer.formats(model)
    for name, fmt in formats.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, LowBitLinear.from_linear(layer, fmt.name))
    quantizer._untie(model, {f"{name}.weight" for name in formats})
    model.config.quantization_config = quantizer.quantization_config
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    return model
