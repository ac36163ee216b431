"""`nibble chat`: a conversation in the console, streamed; the line `stop` ends it, Ctrl+C ends one answer."""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from nibble.commands.ask import timing_line
from nibble.commands.speaking import SETTINGS, add_speaking, find_both, load_engine, sampling_from
from nibble.config import Settings
from nibble.engines.base import Chunk, Engine, Message, Sampling
from nibble.errors import NibbleError

__all__ = ["SETTINGS", "configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's own flags."""
    add_speaking(parser)


def run(arguments: argparse.Namespace, settings: Settings) -> None:
    """Read lines until `stop` or the end of input; answer each with all that was said before in mind."""
    sampling = sampling_from(arguments)
    folder, adapter = find_both(settings, arguments)
    engine = load_engine(settings, folder)
    info = engine.info
    worn = f" + {Path(adapter).name}" if adapter else ""
    print(f"{info.model}{worn} · {info.format} · {info.device} · template: {info.template}. The line `stop` ends it.")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - arrow keys and history in input()
    messages: list[Message] = [{"role": "system", "content": arguments.system}] if arguments.system else []
    try:
        while True:
            try:
                line = input("\n> ").strip()
            except EOFError:
                return
            if line == "stop":
                return
            if line:
                messages = answer(engine, [*messages, {"role": "user", "content": line}], sampling, adapter)
    finally:
        engine.close()


def answer(engine: Engine, messages: Sequence[Message], sampling: Sampling, adapter: str = "") -> list[Message]:
    """Stream one answer to standard output; return the conversation with it, or without the question if it failed."""
    stop = threading.Event()
    pieces: list[str] = []
    last = Chunk()
    try:
        for chunk in engine.stream(messages, sampling, stop, adapter=adapter):
            pieces.append(chunk.text)
            print(chunk.text, end="", flush=True)
            if chunk.dropped_turns and chunk.tokens == 0:
                print(f"[the {chunk.dropped_turns} oldest turns no longer fit into the context and were left out]")
            last = chunk if chunk.tokens or chunk.full_text is not None else last
    except KeyboardInterrupt:
        stop.set()
        print(" [stopped]", end="")
    except NibbleError as error:
        print(f"nibble: {error}", file=sys.stderr)
        return list(messages[:-1])
    print()
    if last.tokens:
        print(timing_line(last), file=sys.stderr)
    said = "".join(pieces) if last.full_text is None else last.full_text
    return [*messages, {"role": "assistant", "content": said}] if said else list(messages[:-1])
