"""Whether every format is right on an accelerator, and how fast its products are there.

    python -m bench.device_check [cuda|xpu|cpu] [--train [--processes 2]]

For each format: quantizing, forward and backward there against the same on the CPU in float32; a layer prepared on the
CPU moved there and back; the fast kernel's form taken back. Then microseconds of one product for 1, 16 and 512 rows.
Then a small random model: greedy text there and on the CPU. Exit code 1 if anything differs.

With --train instead: the guide learns the shipped quotes by the task `finetune` in one process, then by torchrun in
several, one a device, with the same batch in all; their losses are compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from nibble.lowbit import FORMATS, LowBitLinear, kernels, quantize

SHAPE = (8960, 1536)
PACKED = [name for name, row in FORMATS.items() if row.quantized]


def close(one: torch.Tensor, other: torch.Tensor, bound: float) -> bool:
    """Whether two results differ by less than a share of their size."""
    one, other = one.detach().float().cpu(), other.detach().float().cpu()
    return float((one - other).norm()) <= bound * float(other.norm())


def check(name: str, device: str) -> list[str]:
    """What is wrong with a format on a device; empty when nothing is."""
    wrong = []
    torch.manual_seed(0)
    for rows, width in ((176, 256), (64, 172), (50, 100)):
        dense = nn.Linear(width, rows)
        layer = LowBitLinear.from_linear(dense, name)
        moved = LowBitLinear.from_linear(copy.deepcopy(dense), name)
        moved.eval().prepare(torch.bfloat16)
        moved.to(device)
        there = quantize(dense.weight.to(device), name)
        if not close(there.dequantize(), layer.dequantize(), 1e-3):
            wrong.append(f"{rows}x{width}: quantized there differs")
        if not torch.equal(moved.dequantize().cpu(), layer.dequantize()):
            wrong.append(f"{rows}x{width}: moved weight differs")
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.01)):
            given = torch.randn(5, width)
            here_rows = given.clone().requires_grad_()
            there_rows = given.to(device, dtype).requires_grad_()
            here_out, there_out = layer(here_rows), moved.to(dtype)(there_rows)
            here_out.sum().backward()
            there_out.sum().backward()
            if not close(there_out, here_out, bound) or not close(there_rows.grad, here_rows.grad, bound):
                wrong.append(f"{rows}x{width}: forward or backward differs in {dtype}")
        moved.prepare(torch.bfloat16)
        for count in (1, 16, 100):
            given = torch.randn(count, width)
            with torch.inference_mode():
                if not close(moved(given.to(device, torch.bfloat16)), layer(given), 0.02):
                    wrong.append(f"{rows}x{width}: {count} rows differ, {moved.kernel}")
        if not torch.equal(moved.to("cpu").weight, layer.weight):
            wrong.append(f"{rows}x{width}: not the same codes after coming back")
    return wrong


def microseconds(layer: LowBitLinear, count: int, device: str) -> float:
    """Of one product, the mean of many."""
    rows = torch.randn(count, SHAPE[1], device=device, dtype=torch.bfloat16)
    with torch.inference_mode():
        for _ in range(3):
            layer(rows)
        torch.accelerator.synchronize()
        start = time.perf_counter()
        for _ in range(30):
            layer(rows)
        torch.accelerator.synchronize()
    return (time.perf_counter() - start) / 30 * 1e6


def speed(name: str, device: str) -> str:
    """One line: microseconds by the portable path and by what the layer chooses."""
    layer = LowBitLinear.from_linear(nn.Linear(SHAPE[1], SHAPE[0], bias=False, device=device), name).to(torch.bfloat16)
    layer.train()
    portable = [microseconds(layer, count, device) for count in (1, 16, 512)]
    layer.eval().prepare(torch.bfloat16)
    chosen = [microseconds(layer, count, device) for count in (1, 16, 512)]
    words = [" ".join(f"{value:8.0f}" for value in values) for values in (portable, chosen)]
    return f"{name:10} portable {words[0]}   {layer.kernel:22} {words[1]}"


def same_text(device: str) -> bool:
    """Whether a small random model in low bit says the same there as here, in float32."""
    from transformers import AutoModelForCausalLM as Plain
    from transformers import Qwen2Config

    from nibble.transformers import AutoModelForCausalLM

    config = Qwen2Config(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    ids = torch.tensor([[5, 6, 7, 8]])
    with tempfile.TemporaryDirectory() as folder:
        Plain.from_config(config).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True, dtype=torch.float32)
        here = model.generate(ids, max_new_tokens=20, do_sample=False)
        there = model.to(device).generate(ids.to(device), max_new_tokens=20, do_sample=False)
        model.to(torch.bfloat16).generate(ids.to(device), max_new_tokens=20, do_sample=False)
    return torch.equal(here, there.cpu())


def train(device: str, processes: int) -> bool:
    """Whether training gives the same losses in one process and in several; prints both."""
    task = ["-m", "nibble.tasks.finetune"]
    shared = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *task]
    losses: list[list[float]] = []
    for name, command in (("one process", task), (f"{processes} processes", shared)):
        with tempfile.TemporaryDirectory() as home:
            spec = {
                "model": "guide", "data": "quotes", "device": device, "home": home, "dtype": "float32", "dropout": 0.0,
                "max_steps": 20, "warmup_steps": 2, "logging_steps": 1, "save_steps": 20, "eval_share": 0.0,
            }  # fmt: skip
            run_yaml = Path(home) / "run.yaml"
            run_yaml.write_text(json.dumps(spec), encoding="utf-8")
            start = time.perf_counter()
            done = subprocess.run([sys.executable, *command, str(run_yaml)], capture_output=True, text=True)
            seconds = time.perf_counter() - start
            if done.returncode:
                print(f"{name}: FAILED\n{(done.stdout + done.stderr)[-3000:]}")
                return False
            [metrics] = Path(home).glob("runs/*/metrics.jsonl")
            rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
            losses.append([row["loss"] for row in rows if "loss" in row])
        print(f"{name}: {seconds:.0f} s, losses {losses[-1][0]:.4f} to {losses[-1][-1]:.4f}", flush=True)
    off = max(abs(one - other) / one for one, other in zip(*losses, strict=True))
    print(f"largest relative difference of a loss: {off:.2g}")
    return off < 1e-3


def main() -> int:
    """Check, then measure; or train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device", nargs="?", default=str(torch.accelerator.current_accelerator() or "cpu"))
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    device = arguments.device
    print(f"torch {torch.__version__}, {device}")
    if arguments.train:
        return 0 if train(device, arguments.processes) else 1
    failed = False
    for name in PACKED:
        wrong = check(name, device)
        failed |= bool(wrong)
        trusted = name in kernels.RECIPES and device in kernels.KERNELS and kernels.agrees(name, device)
        print(f"{name:10} {'kernel agrees' if trusted else 'no kernel':14} {'; '.join(wrong) or 'right'}", flush=True)
    print(f"microseconds for 1, 16, 512 rows times {SHAPE[0]} x {SHAPE[1]}")
    for name in PACKED:
        print(speed(name, device), flush=True)
    same = same_text(device)
    print("greedy text there and here:", "the same" if same else "DIFFERS")
    return 1 if failed or not same else 0


if __name__ == "__main__":
    sys.exit(main())
