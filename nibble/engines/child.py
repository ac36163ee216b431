"""The process that holds a model for the page: `python -m nibble.engines.child`, driven over its standard input.

Promises that only the protocol of `nibble.engines.wire` is written to what was standard output, whatever a library
prints, and that it ends when its parent does. Knows nothing of the page.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from nibble.engines.base import Chunk, LoadSpec
from nibble.engines.threaded import ThreadedEngine, Ticket
from nibble.engines.wire import line, pack_chunk, pack_error, parse, unpack_request
from nibble.errors import NibbleError
from nibble.lowbit.formats import resolve
from nibble.prompts.trial import refuse_bombs
from nibble.screen import check, templates

BEAT_S = 2.0
"""How often the page is told how much memory the model takes."""

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that this process gets when the thread that started it ends."""


Loader = Callable[[LoadSpec], ThreadedEngine]
"""Makes the engine that a spec asks for, or raises `NibbleError`."""


class Child:
    """One engine, and the requests that the page has open in it."""

    def __init__(self, source: BinaryIO, sink: BinaryIO, loader: Loader) -> None:
        self._source = source
        self._sink = sink
        self._loader = loader
        self._writing = threading.Lock()
        self._engine: ThreadedEngine | None = None
        self._tickets: dict[int, Ticket] = {}

    def serve(self) -> int:
        """Load what the first line asks for, then answer until the input ends; the exit code where it cannot load."""
        message = parse(self._source.readline())
        if message is None:
            return 2
        threading.Thread(target=self._read, name="nibble-input", daemon=True).start()
        try:
            self._engine = self._loader(LoadSpec(**message["load"]))
        except NibbleError as error:
            self._send({"error": pack_error(error)})
            return 1
        self._send({"ready": asdict(self._engine.info)})
        beat = threading.Event()
        while not beat.wait(BEAT_S):
            self._send({"memory": self._engine.info.memory_bytes})
        return 0

    def _read(self) -> None:
        try:
            for text in self._source:
                message = parse(text) or {}
                if "ask" in message:
                    self._ask(message["id"], message["ask"])
                elif "stop" in message and (ticket := self._tickets.get(message["id"])) and self._engine:
                    self._engine.cancel(ticket)
        finally:
            # The page is gone or has let go: nothing here is worth saving, and a model being loaded cannot be asked.
            os._exit(0)

    def _ask(self, number: int, packed: dict[str, Any]) -> None:
        def sink(item: Chunk | NibbleError) -> None:
            if isinstance(item, NibbleError):
                self._send({"id": number, "error": pack_error(item)})
            else:
                self._send({"id": number, "chunk": pack_chunk(item)})
            if isinstance(item, NibbleError) or item.finish_reason is not None:
                self._tickets.pop(number, None)

        assert self._engine is not None, "the page asks only after it was told that the model is ready"
        try:
            ticket = self._engine.submit(unpack_request(packed), sink)
        except NibbleError as error:
            sink(error)
            return
        self._tickets[number] = ticket
        if ticket.done:
            self._tickets.pop(number, None)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            with self._writing:
                self._sink.write(line(message))
                self._sink.flush()
        except OSError:
            os._exit(0)


def load(spec: LoadSpec) -> ThreadedEngine:
    """The engine for a spec.

    Raises:
        NibbleError: it cannot be loaded.
    """
    # Before torch is imported: a wrong folder or name is told at once.
    check(Path(spec.folder), trust_remote_code=spec.trust_remote_code)
    refuse_bombs(templates(Path(spec.folder)))
    if spec.low_bit:
        resolve(spec.low_bit)
    import torch

    from nibble.devices import usable_cores
    from nibble.engines.local import LocalEngine

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())
    return LocalEngine.load(**asdict(spec))


def main(loader: Loader = load) -> int:
    """Take the pipes for the protocol, leave the standard streams to whoever prints, and serve.

    Args:
        loader: makes the engine; another one than `load` may run in an interpreter without transformers 5.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    return Child(source, sink, loader).serve()


if __name__ == "__main__":
    code = main()
    # Threads of torch and of the engine would hold up an ordinary exit.
    sys.stderr.flush()
    os._exit(code)
