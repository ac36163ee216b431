"""How long one step of QLoRA takes and how much memory, beside bitsandbytes + PEFT, on the shape of a real model.

    python -m bench.finetune [--shape qwen2-0.5b] [--targets qkv all-linear] [--checkpointing on off] [--rounds 8]

Each side trains the same random weights (nf4, activations in bfloat16, LoRA of rank 8 by PEFT, AdamW) on the same
random tokens, in a child process of its own. All are alive at once and take turns step by step, so that whatever else
the machine does meets each. `ours` is the step that the task `finetune` makes; `plain` is our layer alone, under
transformers' own attention and loss and torch's dropout; `peer` is bitsandbytes as PEFT's documents set it up, but with
bfloat16 activations in place of the float32 that `prepare_model_for_kbit_training` makes, which is slower and larger.
Its repacking for AVX512-BF16 is off, as training must have it. Weights that loading left in mapped files are copied and
freed memory is given back, on every side, so that private memory (RssAnon of /proc) holds all that is used.

Prints medians of seconds a step and peaks of private memory, and the ratios ours / peer: at most 1 is the aim.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.decode import ROOT, SHAPES, Peak, private_memory, write_model

SIDES = ("peer", "plain", "ours")
TARGETS: dict[str, Any] = {"qkv": ["q_proj", "k_proj", "v_proj"], "all-linear": "all-linear"}
WARM_UP = 2

ENVIRONMENT = {**os.environ, "GOMP_SPINCOUNT": "5000", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Of every side, as in the task: threads that spin long while they wait would measure what else the machine does."""


def load(side: str, folder: Path) -> Any:
    """The packed base of one side, all of it in private memory."""
    import torch

    from nibble.lowbit.linear import give_back_memory
    from nibble.lowbit.quantizer import _let_go_of_files

    if side == "peer":
        from bitsandbytes.nn import Linear4bit
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False
    else:
        from nibble.transformers import AutoModelForCausalLM as Ours

        model = Ours.from_pretrained(
            folder,
            load_in_low_bit="nf4",
            dtype=torch.bfloat16,
            modules_to_not_convert=["lm_head"],
            **({} if side == "ours" else {"attn_implementation": "sdpa"}),
        )
    _let_go_of_files(model)
    give_back_memory()
    return model


class Training:
    """One side's model, and a step of it."""

    def __init__(self, side: str, folder: Path, arguments: argparse.Namespace) -> None:
        import peft
        import torch

        from nibble.lowbit.linear import keep_memory
        from nibble.qlora import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from nibble.training.loss import frugal

        torch.manual_seed(0)
        self.side = side
        if side == "ours":
            keep_memory()
        model = prepare_model_for_kbit_training(load(side, folder), arguments.checkpointing[0] == "on")
        config = LoraConfig(
            r=8, lora_alpha=32, lora_dropout=0.05, target_modules=TARGETS[arguments.targets[0]], task_type="CAUSAL_LM"
        )
        self.model = (get_peft_model if side == "ours" else peft.get_peft_model)(model, config).train()
        self.model.config.use_cache = False
        if side == "ours" and not frugal(self.model):
            raise SystemExit("this model's loss is not computed without logits")
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=2e-4)
        random = torch.Generator().manual_seed(1)
        shape = (arguments.batch, arguments.tokens)
        self.ids = torch.randint(0, self.model.config.vocab_size, shape, generator=random)
        self.ones = torch.ones_like(self.ids)

    def step(self) -> float:
        """Forward, backward, update; the loss."""
        loss = self.model(input_ids=self.ids, attention_mask=self.ones, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def serve(side: str, arguments: argparse.Namespace) -> None:
    """The child: load, then one step for every line that comes, answered by a line."""
    base = private_memory()
    training = Training(side, arguments.folder, arguments)
    gc.collect()
    say(loaded=private_memory() - base)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        with Peak() as peak:
            loss = training.step()
        say(seconds=time.perf_counter() - wall, cpu=time.process_time() - cpu, peak=peak.bytes - base, loss=loss)


def say(**values: float) -> None:
    """A line to the parent."""
    print(json.dumps(values), flush=True)


class Side:
    """The parent's end of a child."""

    def __init__(self, name: str, flags: list[str]) -> None:
        command = [sys.executable, "-m", "bench.finetune", "--serve", name, *flags]
        self.name, self.steps = name, []
        self._child = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        self.loaded = self._read()["loaded"]

    def _read(self) -> dict[str, float]:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"the side {self.name} ended with {self._child.wait()}")

    def step(self) -> None:
        """One step, kept."""
        assert self._child.stdin is not None
        self._child.stdin.write("step\n")
        self._child.stdin.flush()
        self.steps.append(self._read())

    def end(self) -> dict[str, float]:
        """Its figures; the child is gone."""
        self._child.communicate()
        kept = self.steps[WARM_UP:]
        return {
            "seconds": round(statistics.median(step["seconds"] for step in kept), 3),
            "cpu_seconds": round(statistics.median(step["cpu"] for step in kept), 3),
            "loaded_mib": int(self.loaded) >> 20,
            "peak_mib": int(max(step["peak"] for step in self.steps)) >> 20,
            "loss_first": round(self.steps[0]["loss"], 4),
            "loss_last": round(self.steps[-1]["loss"], 4),
        }


def compare(folder: Path, targets: str, checkpointing: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All sides in one setting, step by step in turn."""
    flags = ["--folder", str(folder), "--targets", targets, "--checkpointing", checkpointing]
    flags += ["--batch", str(arguments.batch), "--tokens", str(arguments.tokens)]
    sides = [Side(name, flags) for name in arguments.sides]
    for turn in range(WARM_UP + arguments.rounds):
        for side in sides if turn % 2 else reversed(sides):
            side.step()
    figures = {side.name: side.end() for side in sides}
    ratios = {
        f"{name}/peer {key}": round(figures[name][key] / figures["peer"][key], 3)
        for name in figures
        if name != "peer" and "peer" in figures
        for key in ("seconds", "cpu_seconds", "peak_mib")
    }
    return {"targets": targets, "checkpointing": checkpointing, "sides": figures, "ratios": ratios}


def main() -> int:
    """Write the model, compare in every setting, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--checkpointing", nargs="+", choices=("on", "off"), default=["on", "off"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--folder", type=Path, help="keep the random model here and use it again")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").exists():
            write_model(folder, SHAPES[arguments.shape])
        for targets in arguments.targets:
            for checkpointing in arguments.checkpointing:
                report(compare(folder, targets, checkpointing, arguments), as_json=arguments.json)
    return 0


def report(result: dict[str, Any], *, as_json: bool) -> None:
    """Print one setting's figures."""
    if as_json:
        print(json.dumps(result), flush=True)
        return
    print(f"LoRA on {result['targets']}, gradient checkpointing {result['checkpointing']}")
    for name, figures in result["sides"].items():
        print(f"  {name:6}", *(f"{key} {value}" for key, value in figures.items()))
    for name, ratio in result["ratios"].items():
        print(f"  {name:24} {ratio} {'holds' if ratio <= 1 else 'MISSED'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
