"""How much memory quantizing takes and how fast one token follows another, on the shape of a real model.

    python bench/decode.py --shape qwen2-1.5b [--low-bit sym_int4] [--prompts 128 2048] [--json]

Writes random weights shard by shard into a temporary folder, loads them in a fresh process in the format asked for, and
measures there: the peak of private memory (RssAnon of /proc; mapped files do not count) against what the loaded model
keeps, the bandwidth at which all threads read memory, and decode speed through `generate` after prompts of each length.
The memory-bandwidth limit is that bandwidth over the bytes of packed weights, each of which a token reads once.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen2-1.5b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen2-7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Name -> what differs from transformers' default Qwen2 configuration."""

FLOORS = {"memory": 1.3, "bandwidth": 0.35, "long_prompt": 0.6}
"""What must hold: peak over kept memory at most, decode over the limit at least, long over short prompt at least."""

NEW_TOKENS = 33


def write_model(folder: Path, shape: Mapping[str, Any], family: str = "qwen2") -> None:
    """A model with random bfloat16 weights, one shard a layer, so that no more than a shard is in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **shape, max_position_embeddings=32768, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = model.state_dict()
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        part = name.split(".layers.")[1].split(".")[0] if ".layers." in name else name
        shards.setdefault(f"model-{part}.safetensors", {})[name] = tensor
    random = torch.Generator().manual_seed(0)
    for file, names in shards.items():
        filled = {
            name: torch.ones(tensor.shape, dtype=torch.bfloat16)
            if name.endswith("norm.weight")
            else torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=random)
            for name, tensor in names.items()
        }
        save_file(filled, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


def private_memory() -> int:
    """Bytes of this process that no file backs."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


class Peak:
    """The largest private memory while it is entered, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self.bytes = private_memory()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.003):
            self.bytes = max(self.bytes, private_memory())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def decode_speed(model: Any, prompt: int) -> tuple[float, float]:
    """(tokens a second while reading a prompt of so many tokens, tokens a second after it)."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    times: list[float] = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    ids = torch.randint(0, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(prompt))
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            do_sample=False, stopping_criteria=StoppingCriteriaList([Clock()]),
        )  # fmt: skip
    steps = sorted(after - before for before, after in zip(times, times[1:], strict=False))
    return prompt / (times[0] - start), 1 / steps[len(steps) // 2]


def measure(folder: Path, low_bit: str, prompts: list[int]) -> dict[str, Any]:
    """Load and measure, in this process."""
    import torch

    from nibble.devices import read_bandwidth
    from nibble.lowbit import LowBitLinear, kernel_name, prepare
    from nibble.transformers import AutoModelForCausalLM

    base = private_memory()
    start = time.perf_counter()
    with Peak() as peak:
        model = AutoModelForCausalLM.from_pretrained(folder, load_in_low_bit=low_bit)
        prepare(model)
    loaded_s = time.perf_counter() - start
    gc.collect()
    kept = private_memory()
    layers = [module for module in model.modules() if isinstance(module, LowBitLinear)]
    weights = sum(layer.format.nbytes(layer.out_features, layer.in_features) for layer in layers)
    bandwidth = read_bandwidth()
    decode_speed(model, 16)
    speeds = {prompt: decode_speed(model, prompt) for prompt in prompts}
    limit = bandwidth / weights if weights else 0.0
    short, long = speeds[prompts[0]][1], speeds[prompts[-1]][1]
    return {
        "format": low_bit,
        "kernel": kernel_name(model),
        "attention": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "load_s": round(loaded_s, 1),
        "base_mib": base >> 20,
        "peak_mib": peak.bytes >> 20,
        "kept_mib": kept >> 20,
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "weights_gb": round(weights / 1e9, 3),
        "limit_tok_s": round(limit, 1),
        "prefill_tok_s": {prompt: round(speed[0], 1) for prompt, speed in speeds.items()},
        "decode_tok_s": {prompt: round(speed[1], 2) for prompt, speed in speeds.items()},
        "ratios": {
            "memory": round(peak.bytes / kept, 3),
            "bandwidth": round(short / limit, 3) if limit else None,
            "long_prompt": round(long / short, 3),
        },
    }


def main() -> int:
    """Write, load, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-1.5b")
    parser.add_argument("--low-bit", default=["sym_int4"], nargs="+", metavar="NAME")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--folder", type=Path, help="keep the random model here and use it again")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.folder, arguments.low_bit[0], arguments.prompts)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").exists():
            write_model(folder, SHAPES[arguments.shape])
        for low_bit in arguments.low_bit:
            # A fresh process each: what the last one had allocated would hide a peak.
            command = [sys.executable, __file__, "--measure", "--low-bit", low_bit, "--folder", str(folder)]
            command += ["--prompts", *map(str, arguments.prompts)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            report(json.loads(output.splitlines()[-1]), as_json=arguments.json)
    return 0


def report(result: dict[str, Any], *, as_json: bool) -> None:
    """Print one format's figures."""
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:16} {value}")
    for name, floor in FLOORS.items():
        value = result["ratios"][name]
        upper = name == "memory"
        holds = value is not None and (value <= floor if upper else value >= floor)
        print(f"{name:16} {value} (at {'most' if upper else 'least'} {floor}): {'holds' if holds else 'MISSED'}")
    print()


if __name__ == "__main__":
    sys.exit(main())
