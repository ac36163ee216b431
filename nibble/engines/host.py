"""The one model that the page holds: loaded, exchanged and let go while people chat.

Promises that an answer comes whole from one model, that a chat that arrives while one is being loaded waits and is
told so, and that a load that fails leaves the model before it answering. Imports no torch and takes no thread while it
waits. Knows nothing of how answers are shown.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal

from nibble import adapters, library
from nibble.config import Settings
from nibble.devices import free_memory
from nibble.engines.base import Chunk, EngineInfo, LoadSpec, Message, Sampling
from nibble.engines.bigdl import judge, make_worker
from nibble.engines.threaded import BEAT_S
from nibble.engines.worker import WorkerEngine
from nibble.errors import ModelError, NibbleError
from nibble.estimate import needed_bytes
from nibble.lowbit.formats import resolve

log = logging.getLogger(__name__)

State = Literal["empty", "loading", "ready", "failed"]

PROCESS_BYTES = 2**30
"""Memory of a process with torch and a short conversation, beside weights of a form that is not known here; a generous
guess."""


@dataclass(frozen=True)
class Wanted:
    """A model to load: where it lies, and how much memory it will take at most."""

    spec: LoadSpec
    bytes: int


class ModelHost:
    """Holds one model, in a process of its own. Everything asynchronous belongs to one event loop."""

    def __init__(self, settings: Settings, command: Sequence[str] = ()) -> None:
        """
        Args:
            settings: home, the default format and device, and whose own code may run. Nothing is loaded yet.
            command: as `WorkerEngine`'s; empty is that of the engine in the settings.
        """
        self._settings = settings
        self._command = command
        self._turn = asyncio.Lock()
        self._engine: WorkerEngine | None = None
        self._alive: set[WorkerEngine] = set()
        self._tasks: set[asyncio.Task[EngineInfo] | asyncio.Task[None]] = set()
        self.loading = ""
        """Name of the model that is being loaded; empty where none is."""
        self.error: NibbleError | None = None
        """Why the last load failed; None where it did not."""

    @property
    def state(self) -> State:
        """How it stands with the model: "failed" only where none is left to answer."""
        if self.loading:
            return "loading"
        if self._engine is not None:
            return "ready"
        return "failed" if self.error else "empty"

    @property
    def sentence(self) -> str:
        """Why the last load failed; empty where it did not."""
        return str(self.error or "")

    @property
    def info(self) -> EngineInfo | None:
        """What is loaded, with the memory last told; None where nothing is. Never waits."""
        return self._engine.known if self._engine else None

    @property
    def waiting(self) -> int:
        """Requests that are being answered or stand in line."""
        return sum(engine.waiting for engine in self._alive)

    async def load(self, name: str, low_bit: str = "", device: str = "", *, paths: bool = False) -> EngineInfo:
        """Load a model in place of the one that is there, once the loads before it are done.

        Running answers are finished by the model that began them; new ones wait for the new model. Goes on when the
        caller is cancelled.

        Args:
            name: as `nibble.library.find`; an adapter's name loads the model that it belongs to.
            low_bit: a format; empty is the one in the settings.
            device: empty is the one in the settings.
            paths: whether `name` may be a folder.

        Raises:
            NibbleError: it cannot be loaded; the model before it answers again, where there was one.
        """
        try:
            wanted = await asyncio.to_thread(self._find, name, low_bit, device, paths)
        except NibbleError as error:
            self.error = error
            raise
        task = asyncio.create_task(self._load(wanted))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def unload(self) -> None:
        """Let the model go, and the memory with it. Answers that it was giving end with a sentence."""
        async with self._turn:
            engine, self._engine, self.error = self._engine, None, None
            if engine is not None:
                await self._close(engine)

    async def astream(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        stop: threading.Event,
        visitor: str | None = None,
        adapter: str = "",
    ) -> AsyncGenerator[Chunk, None]:
        """As `WorkerEngine.astream`, of the model that is there once nothing is being loaded.

        `adapter` is a name in home/adapters.

        Raises:
            NibbleError: no model is loaded, no adapter of that name, or what went wrong while answering.
        """
        worn = str(library.find_adapter(adapter, self._settings.home_folder).resolve()) if adapter else ""
        while self.loading:
            if stop.is_set():
                yield Chunk(finish_reason="stopped")
                return
            yield Chunk(loading=True)
            await asyncio.sleep(BEAT_S)
        if self._engine is None:
            raise self.error or ModelError("No model is loaded.", "Load one, then send the message again.")
        chunks = self._engine.astream(messages, sampling, stop, visitor, worn)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()

    def close(self) -> None:
        """End every process within a few seconds. A second call does nothing."""
        engines = list(self._alive)
        self._engine = None
        threads = [threading.Thread(target=engine.close) for engine in engines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _find(self, name: str, low_bit: str, device: str, paths: bool) -> Wanted:
        folder, adapter = adapters.find_model(name, self._settings.home_folder, paths=paths)
        trusted = folder.name in self._settings.trust_remote_code
        format_ = resolve(low_bit or self._settings.low_bit)
        # An adapter's base goes by its own name: what a conversation wears is settled there.
        own = library.GUIDE if folder == library.GUIDE_FOLDER else folder.name
        called = name if adapter is None and library.NAME.fullmatch(name) else own
        card = judge(folder, called, trusted=trusted, settings=self._settings)
        spec = LoadSpec(
            str(folder.resolve()), format_.name, device or self._settings.device, card.name, trust_remote_code=trusted
        )
        try:
            needed = needed_bytes(folder, format_.name, self._settings.home_folder)
        except NibbleError:  # a folder for BigDL-LLM, say, whose library loads what is not read here
            needed = 2 * card.size_bytes + PROCESS_BYTES
        return Wanted(spec, needed)

    async def _load(self, wanted: Wanted) -> EngineInfo:
        async with self._turn:
            before, self.loading, self.error = self._engine, wanted.spec.name, None
            engine = make_worker(wanted.spec, self._settings, self._command)
            try:
                if before is not None and not await asyncio.to_thread(self._fits_beside, wanted):
                    await self._finish(before)
                self._alive.add(engine)
                info = await asyncio.wrap_future(engine.start())
            except NibbleError as error:
                self.error = error
                await self._close(engine)
                if before is not None and before not in self._alive:
                    self._engine = self._start_again(before.spec)
                raise
            except BaseException:
                await self._close(engine)
                raise
            else:
                self._engine = engine
                if before is not None and before in self._alive:
                    task = asyncio.create_task(self._finish(before))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                return info
            finally:
                self.loading = ""

    def _fits_beside(self, wanted: Wanted) -> bool:
        """Whether there is memory for the new model beside the old one; of a GPU that is not known here."""
        before = self.info
        return before is not None and before.device == "cpu" and wanted.bytes < free_memory("cpu")

    def _start_again(self, spec: LoadSpec) -> WorkerEngine:
        engine = make_worker(spec, self._settings, self._command)
        self._alive.add(engine)
        engine.start()
        return engine

    async def _finish(self, engine: WorkerEngine) -> None:
        """Close an engine once its last answer is given."""
        while engine.waiting:
            await asyncio.sleep(BEAT_S)
        await self._close(engine)

    async def _close(self, engine: WorkerEngine) -> None:
        await asyncio.to_thread(engine.close)
        self._alive.discard(engine)
