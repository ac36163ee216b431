"""Opt-in: scripts that import `ipex_llm` or `bigdl.llm` run on Nibble.

    from nibble import compat
    compat.install()
    from ipex_llm.transformers import AutoModelForCausalLM    # Nibble's

Promises that nothing changes before `install` is called, that the real library is never answered for where a script has
imported it, and that a name which is not offered says so. Importing it does not import torch. Knows nothing of engines.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from nibble.errors import ModelError, NibbleError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO = {
    name: f"nibble.transformers:{name}"
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq")
}
QLORA = {
    name: f"nibble.qlora:{name}"
    for name in (
        "LoraConfig", "PeftModel", "TrainingArguments", "cast_lora_weight", "get_peft_model",
        "prepare_model_for_kbit_training",
    )
}  # fmt: skip
TOP = {"optimize_model": "nibble.compat:optimize_model"}

NAMES: dict[str, dict[str, str]] = {
    module.format(library): names
    for library in ("ipex_llm", "bigdl.llm")
    for module, names in (
        ("{}", TOP),
        ("{}.optimize", TOP),
        ("{}.transformers", AUTO),
        ("{}.transformers.model", AUTO),
        ("{}.transformers.qlora", QLORA),
    )
} | {"bigdl": {}}
"""Module that is answered -> name in it -> ours, as `module:name`."""

EXTENSION = "intel_extension_for_pytorch"
"""Answered by an empty module where it is not installed: scripts import it for its effect, which torch has itself."""


def install() -> None:
    """Answer imports of `ipex_llm` and `bigdl.llm` in this process from now on. A second call does nothing.

    Raises:
        NibbleError: the real library is imported already.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    for name in NAMES:
        if name in sys.modules:
            raise NibbleError(f"{name} is imported already.", "Call nibble.compat.install() before it.")
    sys.meta_path.insert(0, _Finder())


def uninstall() -> None:
    """Answer no more, and forget what was answered."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    for name in (*NAMES, EXTENSION):
        if isinstance(getattr(sys.modules.get(name), "__loader__", None), _Finder):
            del sys.modules[name]


def optimize_model(
    model: PreTrainedModel, low_bit: str = "sym_int4", optimize_llm: bool = True,
    modules_to_not_convert: Sequence[str] | None = None, cpu_embedding: bool = False, **_: Any,
) -> PreTrainedModel:  # fmt: skip
    """Pack a model that transformers has loaded, in place, and give it `save_low_bit`.

    Args:
        model: of transformers, in full precision.
        low_bit: name of a format; None packs nothing.
        optimize_llm, cpu_embedding: accepted, and without meaning here.
        modules_to_not_convert: names of modules that stay dense; whole parts of a dotted path.

    Raises:
        FormatError: no such format.
        ModelError: not a model of transformers, or one with nothing to pack.
    """
    from transformers import PreTrainedModel

    from nibble.lowbit.formats import resolve
    from nibble.lowbit.quantizer import pack_model
    from nibble.transformers import PLAIN_DTYPES, save_low_bit

    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"A {type(model).__name__} is no model of transformers.", "Only those can be packed and saved here."
        )
    if low_bit is None:
        return model
    fmt = resolve(low_bit)
    if not fmt.quantized:
        return model.to(PLAIN_DTYPES[fmt.name])  # type: ignore[arg-type]
    pack_model(model, fmt.name, modules_to_not_convert or ())
    model.save_low_bit = MethodType(save_low_bit, model)  # type: ignore[assignment]
    return model


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and makes the modules in `NAMES`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == EXTENSION and _installed(fullname):
            return None
        if fullname in NAMES or fullname == EXTENSION:
            return importlib.util.spec_from_loader(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Answer(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing runs: names are looked up when they are asked for."""


class _Answer(ModuleType):
    """A module whose names are ours."""

    def __getattr__(self, name: str) -> Any:
        place = NAMES.get(self.__name__, {}).get(name)
        if place is None:
            offered = ", ".join(NAMES.get(self.__name__, {})) or "none"
            raise AttributeError(f"Nibble answers for {self.__name__}, but not for its {name!r}; offered: {offered}")
        module, _, ours = place.partition(":")
        return getattr(importlib.import_module(module), ours)


def _installed(name: str) -> bool:
    """Whether another finder than ours knows the module."""
    others = (finder for finder in sys.meta_path if not isinstance(finder, _Finder))
    return any(finder.find_spec(name, None) for finder in others if hasattr(finder, "find_spec"))
