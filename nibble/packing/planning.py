"""What becomes of each tensor of a checkpoint: decided from its names and shapes alone, before any is read.

Promises the decisions that `nibble.transformers` makes while it loads: the model is built without weights, the plug-in
says which layers it packs, and transformers says which module a name means. Knows nothing of files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from nibble.errors import ModelError
from nibble.lowbit.blocks import QuantizedTensor
from nibble.lowbit.formats import FORMATS, Format, resolve
from nibble.lowbit.linear import LowBitLinear
from nibble.lowbit.quantizer import LowBitConfig, LowBitQuantizer
from nibble.sources.base import Source, Stored

DTYPE = torch.bfloat16
"""Of what stays dense, as `from_pretrained` has it where nothing else is asked for."""


@dataclass(frozen=True)
class Packing:
    """What a model is to be made into."""

    low_bit: str
    """Name of a format; empty: every layer keeps the form it has in the source."""
    skip: tuple[str, ...] = ()
    """Modules that stay as they are; as `LowBitConfig`'s modules_to_not_convert."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """As `LowBitConfig`'s overrides."""


@dataclass(frozen=True)
class Output:
    """One weight of the new folder."""

    name: str
    """In the new folder's files."""
    target: str
    """In the model."""
    form: Format | torch.dtype
    nbytes: int
    """Of the tensor, or of codes and scales together."""


@dataclass
class Plan:
    """What becomes of a checkpoint."""

    model: PreTrainedModel
    """Without weights, as it will be loaded: configuration, layers, formats."""
    config: LowBitConfig
    outputs: dict[str, list[Output]]
    """Tensor of the source -> what is made of it, in the source's order; what the model has no use for is not there."""
    merged: str = ""
    """A packed weight that transformers makes of other tensors while it loads, so that it has to; or none."""

    @property
    def nbytes(self) -> int:
        """Bytes of all weights of the new folder."""
        if self.merged:
            return sum(tensor.nbytes for tensor in self.model.state_dict().values())
        return sum(output.nbytes for outputs in self.outputs.values() for output in outputs)


@dataclass(frozen=True)
class Target:
    """Where transformers puts a tensor of a checkpoint."""

    names: tuple[str, ...]
    """In the model; several where a conversion splits it."""
    converted: bool
    """Whether it is changed, or merged with others, on its way."""


def plan(source: Source, packing: Packing) -> Plan:
    """Decide what becomes of every tensor.

    Raises:
        FormatError: no such format.
        ModelError: transformers does not know the model, a weight is missing or has another shape, or there is
            nothing to pack.
    """
    model = skeleton(source)
    if packing.low_bit:
        config = LowBitConfig(packing.low_bit, list(packing.skip), dict(packing.overrides))
    else:
        config = _as_stored(source, model, packing)
    quantizer = LowBitQuantizer(config, pre_quantized=False)
    quantizer.preprocess_model(model=model)
    model.config.quantization_config = config
    model.hf_quantizer = quantizer  # type: ignore[assignment]

    targets = targets_of(source.tensors, model)
    own = {name for to in targets.values() for name in to.names}
    quantizer.tied = {target: of for target, of in quantizer.tied.items() if target not in own}
    _refuse_incomplete(source, model, quantizer.tied, targets)
    made = _outputs(source, model, quantizer.tied, targets)
    packed = {output.target for outputs in made.values() for output in outputs if isinstance(output.form, Format)}
    merged = next((name for to in targets.values() if to.converted for name in to.names if name in packed), "")
    if not merged and _astray(made, targets, model):
        # The files' names mean something else to a packed model: take the model's own.
        made = {
            name: outputs if targets[name].converted else [replace(output, name=output.target) for output in outputs]
            for name, outputs in made.items()
        }
        merged = _astray(made, targets, model)
    return Plan(model, config, made, merged)


def skeleton(source: Source) -> PreTrainedModel:
    """The model of a source's configuration, on the meta device: no weight is allocated."""
    family = str(source.config.get("model_type") or "")
    if family not in CONFIG_MAPPING:
        raise ModelError(
            f"{source.name} is a model of the family {family or 'unnamed'}, which transformers does not know here.",
            "Take a model of another family, or a later version of transformers.",
        )
    try:
        config = CONFIG_MAPPING[family].from_dict(dict(source.config))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=DTYPE)  # type: ignore[no-any-return]
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, StrictDataclassError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"{source.name} is no model that continues a text: {first}", "Check its config.json."
        ) from error


def targets_of(names: Iterable[str], model: PreTrainedModel) -> dict[str, Target]:
    """Where transformers would put tensors of these names; one that the model has no place for is left out.

    The steps are those of `transformers.core_model_loading.convert_and_load_state_dict_in_model`.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    places, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    # Some renamings depend on the order.
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, places)
        if renamed not in places and name in places:
            renamed, pattern = rename_source_key(name, [], [], prefix, places)
        if renamed in places:
            converter = next((entry for entry in converters if pattern in entry.source_patterns), None)
            made = (
                [renamed.replace(converter.target_patterns[0], to) for to in converter.target_patterns]
                if converter
                else [renamed]
            )
            found[name] = Target(tuple(made), converter is not None)
    return {name: found[name] for name in names if name in found}


def _refuse_incomplete(
    source: Source, model: PreTrainedModel, tied: Mapping[str, str], targets: Mapping[str, Target]
) -> None:
    """Refuse a checkpoint that lacks a weight, or has one of another shape."""
    places = model.state_dict()
    for name, to in targets.items():
        layer = model.get_submodule(to.names[0].rpartition(".")[0])
        packed = isinstance(layer, LowBitLinear) and to.names[0].endswith(".weight")
        wanted = (layer.out_features, layer.in_features) if packed else tuple(places[to.names[0]].shape)
        if not to.converted and source.tensors[name].shape != wanted:
            raise ModelError(
                f"{name} of {source.name} has the shape {source.tensors[name].shape}; its config.json says {wanted}.",
                "The files do not belong together: download the model again.",
            )
    found = {name for to in targets.values() for name in to.names}
    # Where two names stand for one weight, either may be in the files.
    found |= {of for alias, of in model.all_tied_weights_keys.items() if alias in found}
    spared = model._keys_to_ignore_on_load_missing or ()
    missing = [
        name
        for name, _ in model.named_parameters()
        if name not in found | tied.keys() | model.all_tied_weights_keys.keys()
        and not any(re.search(pattern, name) for pattern in spared)
    ]
    if missing:
        raise ModelError(
            f"The files of {source.name} lack {len(missing)} of the model's weights, {missing[0]} first.",
            "The model is incomplete or of another kind: download it again.",
        )


def _outputs(
    source: Source, model: PreTrainedModel, tied: Mapping[str, str], targets: Mapping[str, Target]
) -> dict[str, list[Output]]:
    """What is made of each tensor: itself in the precision that the model keeps it in, or packed, or both."""
    outputs: dict[str, list[Output]] = {}
    dtype_of = _dtypes(model)
    found = {name: tensor for tensor, to in targets.items() for name in to.names}
    for name, to in targets.items():
        stored, target = source.tensors[name], to.names[0]
        if _repeats(source, model.all_tied_weights_keys.get(target), name, found):
            continue
        layer = model.get_submodule(target.rpartition(".")[0])
        if isinstance(layer, LowBitLinear) and target.endswith(".weight"):
            outputs[name] = [_packed(name, target, layer)]
            continue
        dtype = dtype_of(target)
        heads = [alias for alias, of in tied.items() if of == target]
        outputs[name] = [
            Output(name, target, dtype, prod(stored.shape) * dtype.itemsize),
            *(_packed(alias, alias, model.get_submodule(alias.rpartition(".")[0])) for alias in heads),
        ]
    return outputs


def _packed(name: str, target: str, layer: nn.Module) -> Output:
    assert isinstance(layer, LowBitLinear)
    return Output(name, target, layer.format, layer.format.nbytes(layer.out_features, layer.in_features))


def _repeats(source: Source, of: str | None, name: str, found: Mapping[str, str]) -> bool:
    """Whether a tensor is the same as the one that the model ties it to; transformers unties those that differ."""
    if of is None or of not in found or found[of] == name:
        return False
    return torch.equal(dense(source.tensors[name].read()), dense(source.tensors[found[of]].read()))


def dense(tensor: torch.Tensor | QuantizedTensor) -> torch.Tensor:
    """A tensor's values, whatever form it has."""
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


def _dtypes(model: PreTrainedModel) -> Callable[[str], torch.dtype]:
    """What says in which dtype the model keeps a tensor."""
    places = model.state_dict()
    wishes = model._get_dtype_plan(DTYPE)
    pattern, names, _ = build_glob_alternation(list(wishes))

    def dtype_of(target: str) -> torch.dtype:
        match = pattern.search(target) if wishes else None
        wish = wishes[names[str(match.lastgroup)]] if match else None
        return wish or places[target].dtype

    return dtype_of


def _astray(made: Mapping[str, list[Output]], targets: Mapping[str, Target], model: PreTrainedModel) -> str:
    """A layer that would not find its tensor when the new folder is loaded; empty where all do."""
    wanted = {}
    for name, outputs in made.items():
        for output in outputs:
            if not targets[name].converted:
                wanted[output.name] = output.target
                if isinstance(output.form, Format):
                    wanted[f"{output.name}_scale"] = f"{output.target}_scale"
    found = targets_of(wanted, model)
    return next((target for name, target in wanted.items() if name not in found or found[name].names != (target,)), "")


def _as_stored(source: Source, model: PreTrainedModel, packing: Packing) -> LowBitConfig:
    """The configuration in which every layer keeps the form that its tensor has in the source."""
    origin = {name: tensor for tensor, to in targets_of(source.tensors, model).items() for name in to.names}
    formats = {}
    for path in (name for name, module in model.named_modules() if type(module) is nn.Linear):
        weight = f"{path}.weight"
        tensor = origin.get(weight) or origin.get(model.all_tied_weights_keys.get(weight, ""))
        if tensor:
            formats[path] = _nearest(source.tensors[tensor], tensor in source.dense)
    packed = Counter(name for name in formats.values() if resolve(name).quantized)
    if not packed:
        raise ModelError(f"{source.name} holds no packed weights.", "Say which format it is to have: --low-bit NAME.")
    base = packed.most_common(1)[0][0]
    return LowBitConfig(base, list(packing.skip), {**_short(formats, base), **packing.overrides})


def _nearest(stored: Stored, dense: bool) -> str:
    """The format that a weight has, or the smallest of ours with at least its bits."""
    if stored.low_bit:
        return stored.low_bit
    bits = 8 * stored.nbytes / prod(stored.shape)
    if dense or bits >= 16:
        return "bf16"
    enough = [row for row in FORMATS.values() if row.kind == "symmetric" and row.bits_per_weight >= bits]
    return min(enough, key=lambda row: row.bits_per_weight, default=FORMATS["bf16"]).name


def _short(formats: Mapping[str, str], base: str) -> dict[str, str]:
    """Overrides for layers that have another format than `base`: one for a kind of layer that is alike everywhere."""
    kinds: dict[str, set[str]] = {}
    for path, name in formats.items():
        kinds.setdefault(path.rpartition(".")[2], set()).add(name)
    overrides = {kind: names.copy().pop() for kind, names in kinds.items() if len(names) == 1}
    overrides |= {path: name for path, name in formats.items() if len(kinds[path.rpartition(".")[2]]) > 1}
    return {pattern: name for pattern, name in overrides.items() if name != base}
