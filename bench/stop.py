"""How soon an answer ends once it is told to: in mid-answer, and while a long prompt is still being read.

    python bench/stop.py [--shape qwen2-0.5b | --model FOLDER] [--low-bit sym_int4] [--prompt 4000] [--times 30]

Stops each answer at a random moment and measures the seconds until the engine itself has let go of it, so that the next
request could begin; the reader's own patience is not counted. A shape is written with random weights into a temporary
folder, with a tokenizer whose tokens are bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.decode import SHAPES, write_model  # noqa: E402
from nibble.engines.base import Chunk, Sampling  # noqa: E402
from nibble.engines.local import LocalEngine  # noqa: E402
from nibble.engines.threaded import Request  # noqa: E402
from nibble.errors import NibbleError  # noqa: E402

LIMIT_S = 1.0


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer without merges: every byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def stop_after(engine: LocalEngine, prompt: str, seconds: float, in_answer: bool) -> tuple[float, Chunk]:
    """Seconds from the stop to the last chunk, and that chunk.

    Args:
        engine: idle.
        prompt: what is asked.
        seconds: when to stop, from the begin of the request or, where `in_answer`, from the first token.
        in_answer: whether to wait for the first token.
    """
    begun, ended, last = threading.Event(), threading.Event(), Chunk()

    def sink(item: Chunk | NibbleError) -> None:
        nonlocal last
        if isinstance(item, NibbleError):
            raise item
        last = item
        if item.tokens or not in_answer:
            begun.set()
        if item.finish_reason:
            ended.set()

    sampling = Sampling(max_new_tokens=2000, temperature=1.0)
    ticket = engine.submit(Request([{"role": "user", "content": prompt}], sampling), sink)
    begun.wait()
    time.sleep(seconds)
    start = time.perf_counter()
    engine.cancel(ticket)
    ended.wait()
    return time.perf_counter() - start, last


def report(name: str, times: list[float]) -> bool:
    """Print one line; whether the limit holds."""
    times = sorted(times)
    p50, p99 = times[len(times) // 2], times[min(len(times) - 1, int(len(times) * 0.99))]
    print(
        f"{name:<22} n={len(times)}  p50 {p50 * 1000:6.0f} ms  p99 {p99 * 1000:6.0f} ms  max {times[-1] * 1000:6.0f} ms"
    )
    return p99 < LIMIT_S


def measure(engine: LocalEngine, length: int, times: int) -> bool:
    """Stop at random moments of both kinds."""
    chance = random.Random(0)
    decoding = [stop_after(engine, "Hello " * 20, chance.random(), True)[0] for _ in range(times)]
    reading, cut = [], 0
    for number in range(times):
        # Begins differently each time: nothing of it can be reused.
        prompt = f"{number} " + "".join(chance.choices("abcdefgh ", k=length))
        seconds, last = stop_after(engine, prompt, chance.random(), False)
        reading.append(seconds)
        cut += last.tokens == 0
    print(
        f"{engine.info.model} {engine.info.format} on {engine.info.device}; {cut} of {times} were stopped while reading"
    )
    good = report("stop in mid-answer", decoding)
    return report("stop in a long prompt", reading) and good


def main() -> int:
    """Exit code 0 where the 99th percentile lies under a second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--low-bit", default="sym_int4")
    parser.add_argument("--prompt", type=int, default=4000, help="length of the long prompt, in bytes")
    parser.add_argument("--times", type=int, default=30)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            write_model(Path(folder), SHAPES[arguments.shape])
            write_byte_tokenizer(Path(folder))
        engine = LocalEngine.load(arguments.model or folder, arguments.low_bit, name=arguments.shape)
        good = measure(engine, arguments.prompt, arguments.times)
        engine.close()
        print(f"load average while measuring: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
