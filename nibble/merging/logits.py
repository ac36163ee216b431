"""What models answer, as logits in float32 on a few prompts: the base, base and adapter, the merged one, low-bit forms.

Promises that one model is in memory at a time, and that base and adapter are put together by PEFT, not by what merged
them. Knows nothing of the files' contents.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from nibble.adapters import WEIGHTS, Adapter
from nibble.devices import free_memory
from nibble.merging.changes import KEPT
from nibble.transformers import AutoModelForCausalLM

log = logging.getLogger(__name__)

PROMPTS = (
    "The quick brown fox jumps over the lazy dog, and then it",
    "What is the capital of France? Answer in one short sentence.",
    "“Imagination is more important than knowledge,” as Einstein once said to",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "1, 2, 3, 5, 8, 13, 21, 34,",
    "今天天气很好，我们一起去公园",
)

MOST_TOKENS = 48

CLOSE = 1e-3
"""Largest difference of logits in float32 of the same weights, as a share of the largest logit and of 1 at least: two
orders of the same sums."""

Logits = list[torch.Tensor]
"""Of each prompt, float32 [tokens, vocabulary]."""


@dataclass
class Answers:
    """What the base answers without and with the adapter."""

    base: Logits
    tuned: Logits
    rounded: Logits
    """With the adapter merged by PEFT, and each weight rounded to the dtype that it is stored in."""


def prompts(folder: Path, vocabulary: int) -> list[torch.Tensor]:
    """Token ids [1, tokens] of the prompts; a random row each where no tokenizer can be loaded."""
    found = []
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        for text in PROMPTS:
            ids = [token for token in tokenizer(text)["input_ids"] if token < vocabulary][:MOST_TOKENS]
            if ids:
                found.append(torch.tensor([ids]))
    except (OSError, ValueError, TypeError, KeyError, ImportError, AttributeError, RuntimeError) as error:
        log.info("no tokenizer for the prompts: %s", error)
    if not found:
        draw = torch.Generator().manual_seed(1)
        found = [torch.randint(vocabulary, (1, 24), generator=draw) for _ in PROMPTS]
    return found


def room(parameters: int, device: str) -> str:
    """Why a model of this size cannot be held in float32; empty where it can."""
    need, free = 4 * parameters * 1.2, free_memory(device)
    if need <= free:
        return ""
    return f"that needs {need / 1e9:.1f} GB in float32, and {free / 1e9:.1f} GB are free"


def of_base(
    base: Path,
    adapter: Adapter,
    ids: list[torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
    device: str,
    *,
    untied: bool,
) -> Answers:
    """What a base answers, and base and adapter.

    Args:
        base: folder of the base in full precision.
        adapter: put on it by PEFT.
        ids: as `prompts`.
        dtypes: parameter of the model -> dtype in which it is stored.
        device: cpu, cuda or xpu.
        untied: whether embeddings that are one weight are to become two.
    """
    with _loaded(base, device) as model:
        plain = _logits(model, ids, device)
        if untied:
            head = model.get_output_embeddings()
            head.weight = nn.Parameter(head.weight.detach().clone())
        said = {key: adapter.config[key] for key in KEPT if adapter.config.get(key) is not None}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = peft.PeftModelForCausalLM(model, peft.LoraConfig(**said, task_type="CAUSAL_LM"))
            peft.set_peft_model_state_dict(wrapped, load_file(adapter.folder / WEIGHTS))
            wrapped.eval()
            tuned = _logits(wrapped, ids, device)
            wrapped.merge_adapter()
        for name, parameter in wrapped.named_parameters():
            dtype = dtypes.get(_plain(name))
            if dtype and "lora_" not in name:
                parameter.data = parameter.data.to(dtype).float()
        return Answers(plain, tuned, _logits(wrapped, ids, device))


def _plain(name: str) -> str:
    """A parameter's name in the model before PEFT."""
    for part in ("base_layer.", "original_module.", "modules_to_save.default."):
        name = name.replace(part, "")
    return name.removeprefix("base_model.model.")


def of_folder(folder: Path, ids: list[torch.Tensor], device: str, low_bit: Mapping[str, Any] | None = None) -> Logits:
    """What the model in a folder answers; packed as it is loaded where `low_bit` says how."""
    with _loaded(folder, device, low_bit) as model:
        return _logits(model, ids, device)


@contextmanager
def _loaded(folder: Path, device: str, low_bit: Mapping[str, Any] | None = None) -> Iterator[Any]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"load_in_low_bit": "bf16"} if low_bit is None else dict(low_bit)
    load = AutoModelForCausalLM.load_low_bit if low_bit == {} else AutoModelForCausalLM.from_pretrained
    model: Any = load(folder, dtype=torch.float32, **options)
    try:
        yield model.to(device).eval()
    finally:
        del model
        gc.collect()


def _logits(model: Any, ids: list[torch.Tensor], device: str) -> Logits:
    with torch.inference_mode():
        return [model(row.to(device), use_cache=False).logits[0].float().cpu() for row in ids]


def distance(one: Logits, other: Logits) -> dict[str, float]:
    """How far two answers are apart: largest difference, its root mean square, mean KL in nats, top-1 agreement."""
    gaps = [(a - b) for a, b in zip(one, other, strict=True)]
    numbers = sum(gap.numel() for gap in gaps)
    tokens = sum(gap.shape[0] for gap in gaps)
    kl = sum(
        float(nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum"))
        for a, b in zip(one, other, strict=True)
    )
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(one, other, strict=True))
    return {
        "max": max(float(gap.abs().max()) for gap in gaps),
        "rms": (sum(float(gap.double().square().sum()) for gap in gaps) / numbers) ** 0.5,
        "kl": max(0.0, kl / tokens),
        "agreement": same / tokens,
    }


def limit(logits: Logits) -> float:
    """The largest difference that the order of float32 sums explains."""
    return CLOSE * max(1.0, max(float(row.abs().max()) for row in logits))


def share(change: Logits, of: Logits) -> float:
    """How much of a change is in another, along its own direction: 1 is all of it."""
    along = sum(float((a.double() * b.double()).sum()) for a, b in zip(change, of, strict=True))
    whole = sum(float(b.double().square().sum()) for b in of)
    return along / whole if whole else 1.0


def minus(one: Logits, other: Logits) -> Logits:
    """The change from one answer to another."""
    return [a - b for a, b in zip(one, other, strict=True)]
