"""What Nibble says that a model will take, against what it then takes: memory at its peak and between answers; speed.

    python bench/estimates.py [--shapes NAME ...] [--formats NAME ...] [--context 512] [--answers 5] [--write]

Writes random weights in the shape of a real model, estimates from the headers, then loads it with the real engine in
a fresh process for each format. Memory is private memory (RssAnon of /proc) and the resident pages of mapped weights,
with which a dense model is left; while loading it is private memory alone, as mapped pages can be given up then. Speed
is the engine's own figure for the fastest of several short answers. `--write` renews the table in docs/estimates.md row
by row, and rows not measured now stay. A tokenizer of the model's size is looked for in `--tokenizers`; without
it the guide's serves, and the estimate of memory is then too high, by a kilobyte for each token of the model.
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
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.decode import SHAPES as QWEN2  # noqa: E402 - run by its path, this file must first find the project
from bench.decode import Peak, private_memory, write_model  # noqa: E402
from nibble.lowbit.formats import FORMATS as ALL  # noqa: E402


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
BEGIN, END = "<!-- bench/estimates.py -->", "<!-- end -->"
"""What stands between these marks in the document is written by `--write`."""
ANSWER_TOKENS, LAST_TOKENS, PATIENCE_S = 24, 4, 30
CHAT_WORDS = 96


def measure(folder: Path, low_bit: str, context: int, answers: int) -> dict[str, float]:
    """Load, answer and measure, in this process; no answers leave the speed unmeasured."""
    from nibble.engines.base import Message, Sampling
    from nibble.engines.local import LocalEngine

    start = time.perf_counter()
    with Peak() as loading:
        engine = LocalEngine.load(folder, low_bit, "cpu")
    load_s = time.perf_counter() - start

    def answer(words: int, tokens: int) -> Any:
        message: list[Message] = [{"role": "user", "content": "warm " * words}]
        sampling = Sampling(max_new_tokens=tokens, temperature=0)
        return list(engine.stream(message, sampling, threading.Event()))[-1]

    start, speed = time.perf_counter(), 0.0
    for _ in range(answers):
        speed = max(speed, answer(CHAT_WORDS, ANSWER_TOKENS).tokens_per_s)
        if time.perf_counter() - start > PATIENCE_S:
            break
    with Peak() as answering:
        long = answer(context - CHAT_WORDS // 2, LAST_TOKENS)
    mapped = mapped_weights()
    return {
        "peak_bytes": max(loading.bytes, answering.bytes + mapped), "steady_bytes": private_memory() + mapped,
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


def write(folder: Path, model: Model, tokenizers: Path | None) -> None:
    """A random model of this shape, with a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, model.shape, model.family)
    (folder / "generation_config.json").unlink(missing_ok=True)
    source = tokenizers / model.tokenizer if tokenizers else ROOT / "guide" / "model"
    for pattern in ("tokenizer*", "vocab*", "merges*", "special_tokens*", "chat_template*"):
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)


def compare(name: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Estimates and measurements of one shape, a row for each format."""
    from nibble.estimate import estimates
    from nibble.probe import ensure

    machine = ensure(arguments.home)
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.work) as temporary:
        folder = Path(temporary) / name
        write(folder, MODELS[name], arguments.tokenizers)
        for low_bit in arguments.formats:
            command = [sys.executable, __file__, "--measure", str(folder), "--formats", low_bit]
            command += ["--context", str(arguments.context), "--answers", str(arguments.answers)]
            # A fresh process each: what the last one had allocated would hide a peak.
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            measured = json.loads(output.splitlines()[-1])
            told = estimates(folder, machine, formats=[low_bit], context=measured["context"])[0]
            yield {"shape": name, "format": low_bit, "told": asdict(told), "measured": measured}


def cells(row: dict[str, Any], key: str) -> tuple[str, str]:
    """One figure: told / measured, and their ratio; `!` where it misses the aim."""
    told, measured = row["told"][key], row["measured"][key]
    if not told or not measured:
        return "not measured", ""
    figures = f"{told:.1f} / {measured:.1f}" if key == "tokens_per_s" else f"{told / 1e6:.0f} / {measured / 1e6:.0f}"
    return figures, f"{told / measured:.2f}" + ("" if abs(told / measured - 1) <= AIM[key] else " !")


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    return "| " + " | ".join([row["shape"], row["format"], *(cell for key in AIM for cell in cells(row, key))]) + " |"


HEAD = (
    "| shape | format | peak, MB | ratio | between answers, MB | ratio | tokens/s | ratio |\n"
    "|---|---|---|---|---|---|---|---|"
)


def keep(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Renew the table between its marks, and how it came about; a speed that was not measured now stays as it was."""
    known = {(row["shape"], row["format"]): row for row in json.loads(FIGURES.read_text())} if FIGURES.exists() else {}
    for row in rows:
        before = known.get((row["shape"], row["format"]))
        if before and not arguments.answers:
            row["told"]["tokens_per_s"] = before["told"]["tokens_per_s"]
            row["measured"]["tokens_per_s"] = before["measured"]["tokens_per_s"]
        known[row["shape"], row["format"]] = row
    merged = sorted(known.values(), key=lambda row: (list(MODELS).index(row["shape"]), list(ALL).index(row["format"])))
    FIGURES.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    within = {key: [cells(row, key)[1] for row in merged if cells(row, key)[1]] for key in AIM}
    held = "; ".join(
        f"{words} {sum('!' not in ratio for ratio in within[key])} of {len(within[key])} within {AIM[key]:.0%}"
        for key, words in (("peak_bytes", "peak"), ("steady_bytes", "between answers"), ("tokens_per_s", "speed"))
    )
    facts = f"{time.strftime('%Y-%m-%d')}, {arguments.machine}, torch {metadata.version('torch')}, transformers "
    facts += f"{metadata.version('transformers')}, conversations of about {arguments.context} tokens: {held}."
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    table = "\n".join([HEAD, *map(line, merged)])
    DOCUMENT.write_text(f"{before}{BEGIN}\n{facts}\n\n{table}\n{END}{after}", encoding="utf-8")


def main() -> int:
    """Write, estimate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--formats", nargs="+", choices=list(ALL), default=list(FORMATS), metavar="NAME")
    parser.add_argument(
        "--context", type=int, default=512, help="tokens of the conversation that memory is measured with"
    )
    parser.add_argument("--answers", type=int, default=5, help="of which the fastest counts; 0 leaves speed unmeasured")
    parser.add_argument("--tokenizers", type=Path, help="folder of the models' tokenizers (default: the guide's)")
    parser.add_argument("--home", type=Path, default=Path("~/.nibble").expanduser(), help="where machine.json is kept")
    parser.add_argument("--work", type=Path, help="folder for the random models; they are removed")
    parser.add_argument("--machine", default=f"{os.cpu_count()} cores", help="the machine in words")
    parser.add_argument("--write", action="store_true", help="renew docs/estimates.md")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.formats[0], arguments.context, arguments.answers)))
        return 0
    print(HEAD)
    for name in arguments.shapes:
        for row in compare(name, arguments):
            print(line(row), flush=True)
            if arguments.write:
                keep([row], arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
