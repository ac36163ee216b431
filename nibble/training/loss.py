"""The loss of a causal language model without its logits, whose vocabulary makes them the largest tensor of a step.

Promises the loss and the gradients that transformers' own code gives, within the rounding of the dtype: `frugal` tries
it on the very model first and leaves alone a model that it does not suit. Only tokens with a label pass the output
head, a few at a time, and the gradient to what enters the head is made with the loss, so that nothing of the size of
the vocabulary is kept. Knows nothing of data and steps.
"""

from __future__ import annotations

from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers.modeling_outputs import CausalLMOutputWithPast

from nibble.lowbit.linear import LowBitLinear, matmul, matmul_transposed

IGNORED = -100
"""Label of a token that is not trained."""

LOGITS = 2**24
"""Logits in memory at once: 64 MiB in float32."""

TRIED = (3, 5, 7, 11, 13)
"""Tokens of the trial."""


def frugal(model: nn.Module) -> bool:
    """Let a model that is given labels compute its loss without logits; its answer then holds none.

    A model is left as it is where its logits are more than its head times its last hidden state (Gemma 2 caps them),
    or its loss is not the mean cross-entropy of the next token.

    Args:
        model: a causal model of transformers; one of PEFT is looked into.

    Returns:
        Whether it does now.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    head: Any = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if type(head) not in (nn.Linear, LowBitLinear) or any(parameter.requires_grad for parameter in head.parameters()):
        return False
    if head.weight.dtype == torch.float16:
        # Gradients of single logits fall below its normal numbers, and a scaler would come too late.
        return False
    plain = inner.forward
    if not _agrees(inner, head, plain):
        return False

    @wraps(getattr(plain, "__func__", plain))
    def forward(self: Any, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        odd = args or torch.is_autocast_enabled(next(head.parameters()).device.type)
        if labels is None or odd or kwargs.keys() & {"shift_labels", "logits_to_keep", "ignore_index"}:
            return plain(*args, labels=labels, **kwargs)
        total = kwargs.pop("num_items_in_batch", None)
        return CausalLMOutputWithPast(loss=_loss(self, head, labels, total, kwargs))  # type: ignore[arg-type]

    inner.forward = MethodType(forward, inner)
    return True


def _loss(model: Any, head: Any, labels: torch.Tensor, total: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The mean over trained tokens; over `total` where the batch is a part of a larger one."""
    hidden = model.base_model(**kwargs)[0]
    trained = labels[:, 1:] != IGNORED
    summed = _HeadLoss.apply(hidden[:, :-1][trained], labels[:, 1:][trained], head)
    return summed / (trained.sum() if total is None else torch.as_tensor(total, device=summed.device))


def _agrees(model: Any, head: Any, plain: Any) -> bool:
    """Whether the model's own logits and loss are those of its head, tried on a few tokens."""
    ids = torch.tensor([TRIED], device=next(head.parameters()).device)
    ids = ids % model.config.get_text_config().vocab_size
    was = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            for module in model.modules():
                # In evaluation mode a packed layer would change into a chat kernel's form.
                module.training = isinstance(module, LowBitLinear)
            told = plain(input_ids=ids, labels=ids, use_cache=False)
            hidden = model.base_model(input_ids=ids, use_cache=False)[0]
            loss = _loss(model, head, ids, None, {"input_ids": ids, "use_cache": False})
            same = _close(_logits(hidden.flatten(0, 1), head).view_as(told.logits), told.logits, 1e-2)
            return same and _close(loss, told.loss, 1e-3)
    except Exception:  # noqa: BLE001 - a foreign model's code may raise anything when it is called in another way
        return False
    finally:
        for module, training in was:
            module.training = training


def _close(one: torch.Tensor, other: torch.Tensor, bound: float) -> bool:
    return bool((one.float() - other.float()).norm() <= bound * other.float().norm())


def _logits(hidden: torch.Tensor, head: Any) -> torch.Tensor:
    """hidden [n, width] -> [n, vocabulary]."""
    if isinstance(head, LowBitLinear):
        out = matmul(hidden, head.quantized)
        return out if head.bias is None else out + head.bias
    return linear(hidden, head.weight, head.bias)


def _back(gradient: torch.Tensor, head: Any) -> torch.Tensor:
    """Gradient to the logits [n, vocabulary] -> to what enters the head [n, width]."""
    return matmul_transposed(gradient, head.quantized) if isinstance(head, LowBitLinear) else gradient @ head.weight


class _HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of a frozen head's logits."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: Any
    ) -> torch.Tensor:
        """hidden [n, width], labels [n] -> a float32 number."""
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        total = torch.zeros((), device=hidden.device)
        step = max(1, LOGITS // head.out_features)
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            logits = _logits(hidden[part], head).float()
            true = labels[part].unsqueeze(1)
            top = logits.amax(1, keepdim=True)
            total -= logits.gather(1, true).sub_(top).sum()
            logits.sub_(top).exp_()
            summed = logits.sum(1, keepdim=True)
            total += summed.log().sum()
            if gradient is not None:
                # The gradient to the logits is softmax, less 1 at the true token.
                logits.div_(summed).scatter_add_(1, true, logits.new_full(true.shape, -1.0))
                gradient[part] = _back(logits.to(hidden.dtype), head)
        ctx.gradient = gradient
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return ctx.gradient * weight.to(ctx.gradient.dtype), None, None
