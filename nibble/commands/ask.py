"""`nibble ask QUESTION`: one answer, streamed, then its timing; with --json one object instead."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

from nibble.commands.speaking import SETTINGS, add_speaking, find_both, load_engine, sampling_from
from nibble.config import Settings
from nibble.engines.base import Chunk, Message
from nibble.errors import NibbleError

__all__ = ["SETTINGS", "configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's own flags."""
    parser.add_argument("question", metavar="QUESTION", help="what to ask; `-` reads it from standard input")
    parser.add_argument("--json", action="store_true", help="print one JSON object when the answer is whole")
    add_speaking(parser)


def run(arguments: argparse.Namespace, settings: Settings) -> None:
    """Load the model, stream the answer to standard output, print the timing on standard error."""
    question = sys.stdin.read() if arguments.question == "-" else arguments.question
    if not question.strip():
        raise NibbleError("The question is empty.", 'Write it after the command: python -m nibble ask "What is nf4?"')
    sampling = sampling_from(arguments)
    messages: list[Message] = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages.append({"role": "user", "content": question})
    # Looked up before torch is imported: a wrong name answers at once.
    folder, adapter = find_both(settings, arguments)
    engine = load_engine(settings, folder)
    try:
        pieces: list[str] = []
        last = Chunk()
        for chunk in engine.stream(messages, sampling, threading.Event(), adapter=adapter):
            pieces.append(chunk.text)
            last = chunk if chunk.tokens else last
            if not arguments.json:
                print(chunk.text, end="", flush=True)
        answer = "".join(pieces) if last.full_text is None else last.full_text
        info = engine.info
    finally:
        engine.close()
    if arguments.json:
        timing = replace(last, text="", full_text=None)
        report = {
            "question": question, "answer": answer, "model": info.model, "adapter": Path(adapter).name,
            "format": info.format, "device": info.device,
            "template": info.template, "load_s": round(info.load_s, 3), "tokens": timing.tokens,
            "prompt_tokens": timing.prompt_tokens, "tokens_per_s": round(timing.tokens_per_s, 2),
            "first_token_s": timing.first_token_s, "finish_reason": timing.finish_reason,
        }  # fmt: skip
        print(json.dumps(report, ensure_ascii=False, indent=2))
        return
    print()
    print(timing_line(last), file=sys.stderr)


def timing_line(chunk: Chunk) -> str:
    """How long an answer took, as one line."""
    first = "-" if chunk.first_token_s is None else f"{chunk.first_token_s:.2f} s"
    total = (chunk.first_token_s or 0.0) + (
        max(chunk.tokens - 1, 0) / chunk.tokens_per_s if chunk.tokens_per_s else 0.0
    )
    return (
        f"[{chunk.tokens} tokens, {chunk.tokens_per_s:.1f} tokens/s, first token after {first}, "
        f"inference time {total:.2f} s, {chunk.finish_reason}]"
    )
