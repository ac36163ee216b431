"""An engine in a child process, seen from the page: starts it, asks it, and outlives it.

Promises that torch is never imported here, that a child which dies gives every open request one sentence and is
started again by the next message, and that none is left behind. Knows nothing of how the child answers; any interpreter
that can run `nibble.engines.child` will do.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nibble.engines.base import Chunk, EngineInfo, LoadSpec, Message, Sampling
from nibble.engines.threaded import BEAT_S, Reading, Request, Sink, Stalled, read_box, unloaded
from nibble.engines.wire import line, pack_request, parse, unpack_chunk, unpack_error
from nibble.errors import EngineDied, NibbleError

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
"""Where `nibble` is imported from; the child starts there, so that no other folder's modules come first."""

CLOSE_S = 2.0
"""How long a child may take to end by itself, and then to obey a signal."""

COMMAND = (sys.executable, "-m", "nibble.engines.child")

Start = concurrent.futures.Future[EngineInfo]


class WorkerEngine:
    """An engine whose model lives in a process of its own. All methods may be called from any thread."""

    def __init__(self, spec: LoadSpec, command: Sequence[str] = COMMAND) -> None:
        """
        Args:
            spec: what the child loads. Nothing starts before `start`, or the first request.
            command: how to start the child; another interpreter than this one will do.
        """
        self.spec = spec
        self._command = list(command)
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._known: EngineInfo | None = None
        self._closed = False

    def start(self) -> Start:
        """Begin to load, unless it has begun; the future of what was loaded, or of the `NibbleError` why not."""
        return self._living().ready

    def load(self) -> EngineInfo:
        """Load and wait for it.

        Raises:
            NibbleError: it cannot be loaded.
        """
        return self.start().result()

    @property
    def info(self) -> EngineInfo:
        """What is loaded, with the memory last told; waits while it is being loaded.

        Raises:
            NibbleError: it cannot be loaded.
        """
        child = self._living()
        return replace(child.ready.result(), memory_bytes=child.memory_bytes)

    @property
    def known(self) -> EngineInfo | None:
        """What is loaded, or was when the child last ran; None before that. Never waits, never starts anything."""
        child = self._child
        if child is not None and child.ready.done() and child.ready.exception() is None:
            self._known = replace(child.ready.result(), memory_bytes=0 if child.dead else child.memory_bytes)
        return self._known

    @property
    def waiting(self) -> int:
        """Requests that are open: being answered, or in line."""
        child = self._child
        return len(child.sinks) if child else 0

    @property
    def pid(self) -> int | None:
        """The child's process id; None where none runs."""
        child = self._child
        return child.process.pid if child and child.process and not child.dead else None

    def stream(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        stop: threading.Event,
        visitor: str | None = None,
        adapter: str = "",
    ) -> Iterator[Chunk]:
        """As `nibble.engines.base.Engine.stream`; chunks are marked `loading` until the model is there."""
        child = self._living()
        while not child.ready.done():
            if stop.is_set():
                yield Chunk(finish_reason="stopped")
                return
            yield Chunk(loading=True)
            concurrent.futures.wait([child.ready], timeout=BEAT_S)
        child.ready.result()
        box: queue.SimpleQueue[Chunk | NibbleError] = queue.SimpleQueue()
        number = child.ask(Request(messages, sampling, visitor, adapter), box.put)
        try:
            yield from read_box(box, Reading(stop, lambda: child.stop(number)))
        except Stalled as error:
            child.kill(error)
            raise
        finally:
            child.stop(number)

    async def astream(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        stop: threading.Event,
        visitor: str | None = None,
        adapter: str = "",
    ) -> AsyncGenerator[Chunk, None]:
        """As `stream`, for an event loop: takes no thread while it waits."""
        child = self._living()
        while not child.ready.done():
            if stop.is_set():
                yield Chunk(finish_reason="stopped")
                return
            yield Chunk(loading=True)
            await asyncio.sleep(BEAT_S)
        child.ready.result()
        loop = asyncio.get_running_loop()
        box: asyncio.Queue[Chunk | NibbleError] = asyncio.Queue()

        def sink(item: Chunk | NibbleError) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(box.put_nowait, item)

        number = child.ask(Request(messages, sampling, visitor, adapter), sink)
        reading = Reading(stop, lambda: child.stop(number))
        try:
            while True:
                try:
                    item = await asyncio.wait_for(box.get(), BEAT_S)
                except (TimeoutError, asyncio.TimeoutError):  # noqa: UP041 - two types before Python 3.11
                    item = None
                chunk = reading.take(item)
                yield chunk
                if chunk.finish_reason is not None:
                    return
        except Stalled as error:
            child.kill(error)
            raise
        finally:
            child.stop(number)

    def close(self) -> None:
        """End the child and whatever it started, within a few seconds. A second call does nothing."""
        with self._lock:
            self._closed = True
            child = self._child
        if child is not None:
            child.close()

    def _living(self) -> _Child:
        with self._lock:
            if self._closed:
                raise unloaded()
            if self._child is None or self._child.dead:
                self._child = _Child(self.spec, self._command)
            return self._child


class _Child:
    """One run of the child process."""

    def __init__(self, spec: LoadSpec, command: list[str]) -> None:
        self._command = command
        self._lock = threading.Lock()
        self._count = 0
        self._closing = False
        self._errors: deque[str] = deque(maxlen=20)
        self.sinks: dict[int, Sink] = {}
        self.ready: Start = concurrent.futures.Future()
        self.ready.set_running_or_notify_cancel()  # nobody who waits for it can cancel it for the others
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.memory_bytes = 0
        self.dead = False
        self._why: NibbleError | None = None
        """Why we ended it ourselves."""
        self.process: subprocess.Popen[bytes] | None = None
        self._send({"load": asdict(spec)})
        # The thread that reads also starts the process: Linux kills the child when the thread that started it ends.
        self._thread = threading.Thread(target=self._run, name="nibble-worker", daemon=True)
        self._thread.start()

    def ask(self, request: Request, sink: Sink) -> int:
        """Send a request; its chunks go to `sink`. The number by which to stop it."""
        with self._lock:
            self._count += 1
            number = self._count
            if not self.dead:
                self.sinks[number] = sink
        if number not in self.sinks:
            sink(self._epitaph())
        self._send({"id": number, "ask": pack_request(request)})
        return number

    def stop(self, number: int) -> None:
        """Stop a request; does nothing for one that has ended."""
        if number in self.sinks:
            self._send({"id": number, "stop": True})

    def kill(self, why: NibbleError) -> None:
        """End the process at once. Whoever waits for it is told why, and whoever comes next gets another one."""
        with self._lock:
            self._why, self.dead = why, True
        if self.process is not None:
            _signal_group(self.process, signal.SIGKILL)

    def close(self) -> None:
        """Let go of the process: it ends by itself when its input does, else by force."""
        self._closing = True
        self._outbox.put(None)
        for number in (signal.SIGTERM, signal.SIGKILL):
            self._thread.join(CLOSE_S)
            if self._thread.is_alive() and self.process is not None:
                _signal_group(self.process, number)
        self._thread.join(CLOSE_S)

    def _send(self, message: dict[str, Any]) -> None:
        self._outbox.put(line(message))

    def _run(self) -> None:
        try:
            process = subprocess.Popen(  # noqa: S603 - our own module, by a list of arguments
                self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True, env={"TOKENIZERS_PARALLELISM": "false", **os.environ},
            )  # fmt: skip
        except OSError as error:
            self._end(
                NibbleError(f"{self._command[0]} cannot be started: {error.strerror}.", "Check the installation.")
            )
            return
        self.process = process
        assert process.stdout is not None
        for target in (self._write, self._drain):
            threading.Thread(
                target=target, args=(process,), name=f"nibble-worker{target.__name__}", daemon=True
            ).start()
        for text in process.stdout:
            message = parse(text)
            if message is None:
                log.warning("a line that is no message from the model's process: %r", text[:200])
            else:
                self._take(message)
        process.wait()
        self._outbox.put(None)
        self._end(self._epitaph())

    def _take(self, message: dict[str, Any]) -> None:
        if "chunk" in message or ("error" in message and "id" in message):
            sink = self.sinks.get(message["id"])
            item = unpack_chunk(message["chunk"]) if "chunk" in message else unpack_error(message["error"])
            if isinstance(item, NibbleError) or item.finish_reason is not None:
                self.sinks.pop(message["id"], None)
            if sink is not None:
                sink(item)
        elif "memory" in message:
            self.memory_bytes = message["memory"]
        elif "ready" in message:
            info = EngineInfo(**message["ready"])
            self.memory_bytes = info.memory_bytes
            self.ready.set_result(info)
        elif "error" in message and not self.ready.done():
            self.ready.set_exception(unpack_error(message["error"]))

    def _end(self, error: NibbleError) -> None:
        with self._lock:
            self.dead = True
            sinks, self.sinks = self.sinks, {}
        told = self.ready.done() and self.ready.exception() is not None
        if not self.ready.done():
            self.ready.set_exception(error)
        for sink in sinks.values():
            sink(error)
        if not self._closing and not told:
            log.warning("%s Its last words: %s", error.message, " | ".join(self._errors))

    def _epitaph(self) -> NibbleError:
        """The sentence for requests that were open when the process ended."""
        code = self.process.returncode if self.process else None
        if self._closing:
            return unloaded()
        if self._why is not None:
            return self._why
        again = "Your next message starts it again."
        if code == -signal.SIGKILL:
            return EngineDied(
                "The model's process was killed by the system, probably because memory ran out.",
                f"{again} If it happens again, choose a smaller model or a format with fewer bits.",
            )
        how = f"with exit code {code}" if code is None or code >= 0 else f"by signal {signal.Signals(-code).name}"
        return EngineDied(f"The model's process ended unexpectedly, {how}.", f"{again} The log has its last words.")

    def _write(self, process: subprocess.Popen[bytes]) -> None:
        """Pass on what is sent, in a thread of its own: a child that does not read must not hold up the page."""
        assert process.stdin is not None
        try:
            while (text := self._outbox.get()) is not None:
                process.stdin.write(text)
                process.stdin.flush()
            process.stdin.close()
        except OSError:
            log.debug("the child no longer reads; the reading thread tells what became of it")

    def _drain(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        while text := process.stderr.readline(4096):
            words = text.decode("utf-8", "replace").rstrip()
            self._errors.append(words)
            log.info("model: %s", words)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Signal a child and whatever it started; it leads a session, hence a group, of its own."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        process.send_signal(number)
