"""Low-rank adapters put on a model's linear layers while it answers: y = W x + b + scale · B (A x).

Promises that a model without an adapter is exactly what it was, that any number of adapters share one model, and that
what is added equals what PEFT adds in float32. Knows nothing of how adapters are stored, and trains nothing.
(LoRA: Hu et al., arXiv:2106.09685.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Addition:
    """What an adapter adds to the output of one layer; all in float32, as PEFT keeps it."""

    down: torch.Tensor | None = None
    """A [r, in]; None where only the bias was trained."""
    up: torch.Tensor | None = None
    """scale · B [out, r]."""
    bias: torch.Tensor | None = None
    """Trained bias less the layer's own [out]."""

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [..., in] -> what is added to the output [..., out], in float32."""
        if self.down is None or self.up is None:
            assert self.bias is not None
            return self.bias
        low = linear(rows.float(), self.down)
        return linear(low, self.up, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in (self.down, self.up, self.bias) if tensor is not None)


@dataclass(frozen=True)
class Lora:
    """An adapter, ready to be put on a model: dotted path of a layer -> what is added there."""

    additions: Mapping[str, Addition]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes beside the model."""
        return sum(addition.nbytes for addition in self.additions.values())


class Wearing:
    """Which adapter a model wears: one at a time, or none. The lean way through a layer looks at `addition_of`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._worn: Lora | None = None
        self._hooks: list[RemovableHandle] = []

    def put_on(self, lora: Lora | None) -> None:
        """Wear this adapter in place of the one before; None takes it off.

        Raises:
            AttributeError: the model has no layer of such a name.
        """
        if lora is self._worn:
            return
        self._take_off()
        for path, addition in (lora.additions if lora else {}).items():
            module = self._model.get_submodule(path)
            vars(module)[WORN] = addition
            self._hooks.append(module.register_forward_hook(_add))
        self._worn = lora

    def _take_off(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for path in self._worn.additions if self._worn else ():
            vars(self._model.get_submodule(path)).pop(WORN, None)
        self._worn = None


WORN = "_nibble_addition"


def addition_of(module: nn.Module) -> Addition | None:
    """What the adapter that is worn adds to a layer's output; None where it adds nothing."""
    return vars(module).get(WORN)


def _add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output + addition_of(module).of(inputs[0]).to(output.dtype)  # type: ignore[union-attr]
