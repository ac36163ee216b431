"""The measuring itself: how fast weights of each format pass through one row, and what a layer takes beside them.

Promises to take about two seconds of an idle machine beside loading torch, and figures that other work on the machine
disturbs little: of many short times the fastest fifth counts. Knows nothing of any model: matrices hold arbitrary
numbers, and the models are random and tiny.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen3Config, StoppingCriteria
from transformers import StoppingCriteriaList as Criteria

from nibble import devices
from nibble.lowbit import attention, kernels, lean
from nibble.lowbit.blocks import PLAIN, QuantizedTensor
from nibble.lowbit.formats import FORMATS, Format
from nibble.lowbit.int4_cpu import CpuInt4Weight
from nibble.lowbit.linear import matmul, prepare
from nibble.lowbit.quantizer import pack_model
from nibble.lowbit.recipes import RECIPES
from nibble.probe.machine import Machine, identity

ROWS, WIDTH = 8192, 2048
"""A matrix of the size that chat models have."""

WORKING_SET = 2**28
"""Bytes of matrices that are gone through in turn, so that they come from memory and not from a cache of a core."""

FILL = 0x3F
"""A byte that makes ordinary numbers in every dtype: 0.75 in bfloat16, 1.8 in float16 and float8."""

RATE_S = 0.15
"""How long each way of multiplying is measured."""

COUNTED = 0.2
"""The share of the times, fastest first, of which the slowest counts."""

TINY: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
    "vocab_size": 256, "max_position_embeddings": 512, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
TINY_LAYERS = (1, 9)
TINY_TOKENS = 40

WAYS: dict[str, tuple[Callable[..., PretrainedConfig], str]] = {
    "lean": (Qwen2Config, "sym_int4"),
    "kernel": (Qwen3Config, "sym_int4"),
    "portable": (Qwen3Config, "fp8_e5m2"),
    "dense": (Qwen3Config, "bf16"),
}
"""What serves a decoder layer -> a family that is served so, and a format. A model's family decides between the first
two: the lean way knows some."""


def measure() -> Machine:
    """Measure this machine: about two seconds, with all cores that it may use."""
    load = psutil.getloadavg()[0]
    where = devices.choose("auto")
    served = tuple(name for name in RECIPES if kernels.agrees(name))
    steps = {way: tuple(_token_seconds(way, layers) for layers in TINY_LAYERS) for way in WAYS}
    # Now that everything a chat needs is loaded, and before the large buffers.
    process = _private_memory()
    bandwidth = devices.read_bandwidth(0.3, WORKING_SET >> 20)
    rates = _rates(served)
    layer_s = {way: _layer_seconds(way, steps[way], rates) for way in WAYS}
    return Machine(
        identity=identity(), cores=devices.usable_cores(), bandwidth=bandwidth, rates=rates, kernels=served,
        layer_s=layer_s, token_s=max(0.0, steps["lean"][0] - layer_s["lean"]), process_bytes=process,
        device=where.kind, device_bytes=0 if where.kind == "cpu" else devices.free_memory(where.kind),
        load=load, measured=time.time(),
    )  # fmt: skip


def _private_memory() -> int:
    """Bytes of this process that no file backs (RssAnon of /proc; elsewhere all that is resident)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:"))
    except (OSError, StopIteration):
        return int(psutil.Process().memory_info().rss)


def _rates(served: tuple[str, ...]) -> dict[str, float]:
    """Format -> weights a second; formats that the same kernel serves in the same way are measured once."""
    pool = torch.full((WORKING_SET,), FILL, dtype=torch.uint8)
    found: dict[object, float] = {}
    rates = {}
    for fmt in FORMATS.values():
        key = (RECIPES[fmt.name].planes, fmt.block) if fmt.name in served else fmt.name
        if key not in found:
            products = _dense(fmt, pool) if not fmt.quantized else _packed(fmt, pool, fast=fmt.name in served)
            with torch.inference_mode():
                found[key] = ROWS * WIDTH / _typical(products)
        rates[fmt.name] = found[key]
    return rates


def _dense(fmt: Format, pool: torch.Tensor) -> list[Callable[[], object]]:
    dtype = PLAIN[fmt.name]
    row = torch.ones(1, WIDTH, dtype=dtype)
    return [partial(linear, row, weight) for weight in pool.view(dtype).view(-1, ROWS, WIDTH)]


def _packed(fmt: Format, pool: torch.Tensor, *, fast: bool) -> list[Callable[[], object]]:
    """Products of one row with each matrix that the pool holds, by the int4 kernel or the portable path."""
    row = torch.ones(1, WIDTH, dtype=torch.bfloat16)
    if fast:
        planes = RECIPES[fmt.name].planes
        terms = torch.ones(planes * WIDTH // fmt.block, ROWS, 2, dtype=torch.bfloat16)
        codes = pool.view(-1, ROWS, planes * WIDTH // 2)
        weights = [CpuInt4Weight(fmt, part, terms.clone(), WIDTH) for part in codes]
        return [partial(weight.matmul, row) for weight in weights]
    shape = fmt.code_shape(ROWS, WIDTH)
    size = shape[0] * shape[1] * shape[2]
    scales = torch.ones(fmt.scale_shape(ROWS, WIDTH), dtype=getattr(torch, fmt.scale))
    tensors = [
        QuantizedTensor(fmt, pool[start : start + size].view(shape), scales, WIDTH)
        for start in range(0, len(pool) - size + 1, size)
    ]
    return [partial(matmul, row, tensor) for tensor in tensors]


def _typical(products: list[Callable[[], object]]) -> float:
    """Seconds of one of these, gone through in turn; the first is left out."""
    products[0]()
    times: list[float] = []
    end = time.perf_counter() + RATE_S
    while time.perf_counter() < end or len(times) < 4:
        for product in products:
            start = time.perf_counter()
            product()
            times.append(time.perf_counter() - start)
            if time.perf_counter() >= end and len(times) >= 4:
                break
    return _counted(times)


def _counted(times: list[float]) -> float:
    return sorted(times)[int(COUNTED * len(times))]


def _layer_seconds(way: str, steps: tuple[float, ...], rates: dict[str, float]) -> float:
    """Seconds of one layer of a tiny model beside its weights, from two models that differ in their layers alone."""
    one, many = TINY_LAYERS
    size, hidden = TINY["head_dim"], TINY["hidden_size"]
    heads = TINY["num_attention_heads"] + TINY["num_key_value_heads"]
    weights = hidden * (2 * heads * size + 3 * TINY["intermediate_size"])
    return max(0.0, (steps[1] - steps[0]) / (many - one) - weights / rates[WAYS[way][1]])


def _token_seconds(way: str, layers: int) -> float:
    """Seconds between two tokens of a tiny random model, through transformers' own loop as in a chat."""
    family, name = WAYS[way]
    model = _tiny(family(**TINY, num_hidden_layers=layers), name)
    clock = _Clock()
    prompt = torch.ones(1, 8, dtype=torch.long)
    with torch.inference_mode():
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TINY_TOKENS, min_new_tokens=TINY_TOKENS,
            do_sample=False, pad_token_id=0, stopping_criteria=Criteria([clock]),
        )  # fmt: skip
    # The first steps try the kernels and gather each layer's parts.
    return _counted([after - before for before, after in zip(clock.times[4:], clock.times[5:], strict=False)])


def _tiny(config: PretrainedConfig, name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if FORMATS[name].quantized:
        pack_model(model, name)
    attention.use(model)
    lean.offer(model)
    prepare(model)
    return model


class _Clock(StoppingCriteria):
    """Notes when each token came, and never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> Any:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)
