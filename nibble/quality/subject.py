"""A model loaded as chat loads it, and what that cost: seconds, memory, tokens a second. And the same in float32.

Needs torch. Knows nothing of texts and distances.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

from nibble import checkpoint
from nibble.devices import Device
from nibble.lowbit.linear import LowBitLinear, give_back_memory, prepare
from nibble.transformers import AutoModelForCausalLM

PROMPT, NEW_TOKENS = 128, 33
"""Speed is measured after a prompt of so many tokens, over so many new ones."""

SAMPLE_S = 0.003
"""Between two looks at the memory."""


class Peak:
    """The most private memory while it is entered: RssAnon of /proc on a CPU, what torch allocated on a GPU."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.bytes = 0

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.bytes = max(self.bytes, self.now())

    def now(self) -> int:
        """Bytes that are held in this moment."""
        if self._kind != "cpu":
            return int(torch.get_device_module(self._kind).memory_allocated())
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, self.now())
        if self._kind != "cpu":
            self.bytes = int(torch.get_device_module(self._kind).max_memory_allocated())


def mapped_weights() -> int:
    """Resident bytes of the weight files that this process has mapped: with them a dense model on a CPU is left.

    While a model is loaded they can be given up again, so they count only once it answers.
    """
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        key, *rest = line.split(maxsplit=1)
        if not key.endswith(":"):
            counts = line.endswith(".safetensors")
        elif key == "Rss:" and counts:
            total += 1024 * int(rest[0].split()[0])
    return total


def load(folder: Path, options: dict[str, Any], where: Device) -> Any:
    """A model in evaluation mode on its device, packed layers in the form that answers fastest.

    Args:
        folder: its files.
        options: `load_in_low_bit` and the like, as `nibble.transformers` takes them; None for a packed folder's own.
        where: the device, and the dtype of activations.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=where.torch_dtype, **options)
    model = model.to(where.kind).eval()  # type: ignore[arg-type]
    prepare(model)
    return model


def load_exact(folder: Path, where: Device, *, trusted: bool) -> Any:
    """The stored weights of a dense model with all arithmetic in float32, on its device.

    Linear layers keep their 16-bit weights, which are widened a few rows at a time; so memory is that of the files,
    and the embedding again.
    """
    tensors = {
        key: value for file in checkpoint.weight_files(folder) for key, value in checkpoint.read_header(file).items()
    }
    stored = checkpoint.dtype_name(tensors)
    wide = stored not in ("bf16", "fp16")
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(stored, "float32")
    model = AutoModelForCausalLM.from_pretrained(
        folder, load_in_low_bit="bf16", dtype=dtype, trust_remote_code=trusted
    ).eval()
    if not wide:
        for name, layer in list(model.named_modules()):
            if type(layer) is nn.Linear:
                model.set_submodule(name, LowBitLinear.from_linear(layer, stored))
        give_back_memory()
    return model.to(where.kind).float()  # type: ignore[arg-type]


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors as its folder would hold them; what is shared counts once."""
    packed = [module for module in model.modules() if isinstance(module, LowBitLinear)]
    ours = {id(tensor) for module in packed for tensor in (module.weight, module.weight_scale)}
    dense = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *_kept_buffers(model))}
    return sum(size for key, size in dense.items() if key not in ours) + sum(
        module.format.nbytes(module.out_features, module.in_features) for module in packed
    )


def _kept_buffers(model: nn.Module) -> Iterable[torch.Tensor]:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield buffer


def speed(model: Any, ids: Sequence[int]) -> float:
    """Tokens a second of one greedy answer, after a prompt and a first answer that is not counted.

    The rate is that of the median step, so that what else the machine does for a moment counts little.

    Args:
        model: as `load` returns it.
        ids: of a text; its first tokens are the prompt.
    """
    context = next(
        (value for key in checkpoint.CONTEXT_KEYS if isinstance(value := getattr(model.config, key, None), int)), 2**20
    )
    prompt = torch.tensor([list(ids)[: max(1, min(PROMPT, context - NEW_TOKENS))]], device=model.device)
    clock = _Clock()
    with torch.inference_mode():
        for count in (4, NEW_TOKENS):
            clock.times.clear()
            model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count,
                do_sample=False, stopping_criteria=StoppingCriteriaList([clock]),
            )  # fmt: skip
    steps = sorted(after - before for before, after in zip(clock.times, clock.times[1:], strict=False))
    return 1 / steps[len(steps) // 2]


class _Clock(StoppingCriteria):
    """Notes when each token came; never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> Any:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def settle() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    give_back_memory()
