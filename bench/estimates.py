"""What Nibble says that a model will take, against what it then takes: memory at its peak and between answers, and speed.

    python bench/estimates.py [--shapes NAME ...] [--formats NAME ...] [--context 512] [--priority -10] [--write]

Writes random weights in the shape of a real model, estimates from the headers, then loads it with the real engine in a
fresh process for each format. Memory is private memory (RssAnon of /proc) and the resident pages of mapped weight files,
which a dense model is left with; at its peak private memory alone, as mapped pages can be given up while loading. Speed
is that of the best of several short answers. `--write` renews docs/estimates.md with what is measured, and keeps what
it says of other shapes. A tokenizer of a model's size is looked for in `--tokenizers`; without it the guide's serves, and
the estimate of memory is then too high by some hundred bytes a token.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.decode import SHAPES as QWEN2  # noqa: E402 - run by its path, this file must first find the project
from bench.decode import Peak, private_memory, write_model  # noqa: E402


class Model(NamedTuple):
    """The shape of a real model."""

    family: str
    tokenizer: str
    """Folder of one with as many tokens."""
    shape: dict[str, Any]


MODELS = {
    "qwen2-0.5b": Model("qwen2", "qwen2.5", QWEN2["qwen2-0.5b"]),
    "qwen3-0.6b": Model(
        "qwen3", "qwen2.5",
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    ),
    "tinyllama-1.1b": Model(
        "llama", "llama2",
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
         "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False},
    ),
    "qwen2-1.5b": Model("qwen2", "qwen2.5", QWEN2["qwen2-1.5b"]),
}  # fmt: skip
"""Name -> what is written."""

FORMATS = ("sym_int4", "asym_int4", "asym_int5", "sym_int8", "nf4", "fp8_e5m2", "bf16")
AIM = {"peak_bytes": 0.15, "steady_bytes": 0.15, "tokens_per_s": 0.30}
"""How far an estimate may lie from what is measured, as a share of the latter."""

DOCUMENT = ROOT / "docs" / "estimates.md"
FIGURES = ROOT / "docs" / "estimates.json"
ANSWERS, ANSWER_TOKENS, PATIENCE_S = 5, 24, 30
CHAT_WORDS, WORDS_A_TOKEN = 96, 1


def measure(folder: Path, low_bit: str, context: int, priority: int) -> dict[str, float]:
    """Load, answer and measure, in this process."""
    from nibble.engines.base import Sampling
    from nibble.engines.local import LocalEngine

    start = time.perf_counter()
    with Peak() as loading:
        engine = LocalEngine.load(folder, low_bit, "cpu")
    load_s = time.perf_counter() - start

    def answer(words: int, tokens: int) -> Any:
        message = [{"role": "user", "content": "warm " * words}]
        sampling = Sampling(max_new_tokens=tokens, temperature=0)
        return list(engine.stream(message, sampling, threading.Event()))[-1]

    if priority:
        for thread in os.listdir("/proc/self/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), priority)
    start, speed, short = time.perf_counter(), 0.0, None
    for _ in range(ANSWERS):
        short = answer(CHAT_WORDS, ANSWER_TOKENS)
        speed = max(speed, short.tokens_per_s)
        if time.perf_counter() - start > PATIENCE_S:
            break
    with Peak() as answering:
        long = answer(CHAT_WORDS + context - short.prompt_tokens - 2 * ANSWER_TOKENS, ANSWER_TOKENS // 3)
    held = private_memory() + mapped_weights()
    return {
        "peak_bytes": max(loading.bytes, answering.bytes + mapped_weights()), "steady_bytes": held,
        "tokens_per_s": speed, "context": long.prompt_tokens + long.tokens, "load_s": load_s,
    }  # fmt: skip


def mapped_weights() -> int:
    """Resident bytes of weight files that this process has mapped."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            counts = line.endswith(".safetensors")
        elif first == "Rss:" and counts:
            total += 1024 * int(line.split()[1])
    return total


def write(folder: Path, model: Model, tokenizers: Path) -> None:
    """A random model of this shape, with a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, model.shape, model.family)
    (folder / "generation_config.json").unlink(missing_ok=True)
    source = tokenizers / model.tokenizer
    source = source if source.is_dir() else ROOT / "guide" / "model"
    for pattern in ("tokenizer*", "vocab*", "merges*", "special_tokens*", "chat_template*"):
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)


def compare(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Estimates and measurements of one shape, a row for each format; printed as they come."""
    from nibble.estimate import estimates
    from nibble.probe import ensure

    with tempfile.TemporaryDirectory(dir=arguments.work) as temporary:
        folder = Path(temporary) / name
        write(folder, MODELS[name], arguments.tokenizers)
        rows = []
        for low_bit in arguments.formats:
            command = [sys.executable, __file__, "--measure", str(folder), "--formats", low_bit]
            command += ["--context", str(arguments.context), "--priority", str(arguments.priority)]
            # A fresh process each: what the last one had allocated would hide a peak.
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            measured = json.loads(output.splitlines()[-1])
            told = estimates(folder, ensure(arguments.home), formats=[low_bit], context=measured["context"])[0]
            rows.append({"shape": name, "format": low_bit, "told": asdict(told), "measured": measured})
            print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    cells = [row["shape"], row["format"]]
    for key, aim in AIM.items():
        told, measured = row["told"][key], row["measured"][key]
        ratio = told / measured if measured else 0.0
        figures = f"{told:.1f} / {measured:.1f}" if key == "tokens_per_s" else f"{told / 1e6:.0f} / {measured / 1e6:.0f}"
        cells += [figures, f"{ratio:.2f}" + ("" if abs(ratio - 1) <= aim else " !")]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| shape | format | peak, MB | ratio | between answers, MB | ratio | tokens/s | ratio |\n"
    "|---|---|---|---|---|---|---|---|"
)


def document(rows: list[dict[str, Any]], machine: str, context: int) -> str:
    """docs/estimates.md."""
    missed = {key: sum(abs(row["told"][key] / row["measured"][key] - 1) > aim for row in rows) for key, aim in AIM.items()}
    return (ROOT / "bench" / "estimates.md.in").read_text(encoding="utf-8").format(
        table="\n".join([HEAD, *map(line, rows)]), machine=machine, context=context, rows=len(rows),
        date=time.strftime("%Y-%m-%d"), command="python bench/estimates.py --write",
        missed_peak=missed["peak_bytes"], missed_steady=missed["steady_bytes"], missed_speed=missed["tokens_per_s"],
    )  # fmt: skip


def main() -> int:
    """Write, estimate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), metavar="NAME")
    parser.add_argument("--context", type=int, default=512, help="tokens of the conversation that memory is measured with")
    parser.add_argument("--priority", type=int, default=0, help="of the timed part, where other work shares the machine")
    parser.add_argument("--tokenizers", type=Path, default=ROOT.parent / "shared" / "data" / "tokenizers")
    parser.add_argument("--home", type=Path, default=Path("~/.nibble").expanduser(), help="where machine.json is kept")
    parser.add_argument("--work", type=Path, help="folder for the random models; they are removed")
    parser.add_argument("--machine", default="2 cores of an AVX512 server CPU", help="the machine in words")
    parser.add_argument("--write", action="store_true", help="renew docs/estimates.md")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.formats[0], arguments.context, arguments.priority)))
        return 0
    print(HEAD)
    rows = [row for name in arguments.shapes for row in compare(name, arguments)]
    if arguments.write:
        DOCUMENT.write_text(document(rows, arguments.machine, arguments.context), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
