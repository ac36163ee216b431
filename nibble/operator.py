"""What an operator of the page may do: load and let go models, get them, shrink them, judge them, delete them, and see
to the jobs that do so.

Promises that a model is named, by its name here or its id on a hub, and never given as a path; that whatever is wrong
with a wish is said before any work starts; and that nothing here blocks longer than reading small files does, but for
`stop`, which says so. In public mode the page lists the models through it, and nothing that reaches its other methods
is built. Knows nothing of Gradio, torch and languages.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nibble import disk, jobs, library, probe, publish, removal
from nibble.config import Settings
from nibble.disk import DiskUse
from nibble.engines.base import EngineInfo
from nibble.engines.bigdl import judge, models
from nibble.errors import ModelError, NibbleError
from nibble.estimate import estimates
from nibble.jobs import Job
from nibble.library import ModelCard
from nibble.lowbit.formats import resolve
from nibble.probe import Machine
from nibble.quality.kept import kept, merge
from nibble.tasks.download import refuse_trust, request_from
from nibble.tuning import Tuning
from nibble.wishes import Download, Evaluate, Quantize, text

MOST_JOBS = 200

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""What has a slash and is no path."""

Result = TypeVar("Result")


class Host(Protocol):
    """Whoever holds the model: the part of `nibble.engines.host.ModelHost` that an operator needs."""

    loading: str

    @property
    def info(self) -> EngineInfo | None: ...

    async def load(self, name: str, low_bit: str = "", device: str = "", *, paths: bool = False) -> EngineInfo: ...

    async def unload(self) -> None: ...


class Operator(Tuning):
    """What may be done, and what there is to know, with the models and jobs of one home."""

    def __init__(self, host: Host, settings: Settings, config: str = "") -> None:
        """
        Args:
            host: holds the model that answers.
            settings: home, device, hubs and whose own code may run.
            config: absolute path of the settings file that the server was started with; empty where there was none.
        """
        self.host = host
        self._settings = settings
        self._config = config
        self._measuring: Future[Machine] | None = None

    @property
    def home(self) -> Path:
        """Nibble's home folder."""
        return self._settings.home_folder

    @property
    def device(self) -> str:
        """The kind of device on which models are judged: of two jobs there, one waits."""
        if self._settings.device != "auto":
            return self._settings.device
        return self.host.info.device.partition(":")[0] if self.host.info else "cpu"

    # The models that are here.

    def cards(self) -> list[dict[str, Any]]:
        """The models and adapters on this machine as plain data, without their paths; in public mode no adapters."""
        adapters = [] if self._settings.public else library.adapters(self.home)
        return [self._plain(card) for card in (*self._models(), *adapters)]

    def shelf(self) -> list[dict[str, Any]]:
        """As `cards`, each with its estimate (in the format that it would be loaded in) and what it has lost there."""
        machine = self._machine()
        return [self._with_figures(card, machine) for card in self.cards()]

    def _with_figures(self, card: dict[str, Any], machine: Machine) -> dict[str, Any]:
        if card["kind"] != "model" or card["problem"]:
            return card | {"estimate": None, "quality": None}
        wanted = [resolve(self._settings.low_bit).name]
        try:
            estimate = asdict(estimates(self._folder(card["name"]), machine, formats=wanted)[0])
        except NibbleError:  # the headers of a form that few use may tell too little
            estimate = None
        lost = (
            row
            for row in self._kept(card["name"]).get("formats", ())
            # A row of mixed bits tells of its own model alone.
            if row["format"] == card["format"] and (row["name"] == card["name"] or not row.get("overrides"))
        )
        return card | {"estimate": estimate, "quality": next(lost, None)}

    @property
    def measured(self) -> bool:
        """Whether this machine's speed, on which the estimates rest, is known."""
        return probe.known(self.home) is not None

    @property
    def unmeasurable(self) -> bool:
        """Whether the last try to measure this machine failed."""
        tried = self._measuring
        return tried is not None and tried.done() and tried.exception() is not None

    async def measure(self) -> None:
        """Measure this machine, where that has not been done; takes some seconds then.

        Raises:
            DeviceError: it could not be measured. Asked again, it is tried again.
        """
        tried = self._measuring
        if tried is None or tried.done():
            tried = self._measuring = _aside(lambda: probe.ensure(self.home))
        await asyncio.shield(asyncio.wrap_future(tried))

    def _machine(self) -> Machine:
        """This machine as far as it is known."""
        return (probe.known(self.home) or probe.unmeasured()).on(self._settings.device)

    def estimates(self, name: str) -> list[dict[str, Any]]:
        """What a model would take in each format; one in low bit already has one row.

        Raises:
            ModelError: there is no such model, or it cannot be read.
        """
        return [asdict(row) for row in estimates(self._folder(name), self._machine())]

    def report(self, name: str) -> dict[str, Any]:
        """What a model and its kin, made from the same one, have lost; empty where nothing was measured.

        The form is that of `nibble.quality.measure`. Only what was measured on the same text is put side by side.

        Raises:
            ModelError: there is no such model.
        """
        self._folder(name)
        own = self._kept(name)
        base = (own.get("reference") or {}).get("name") or name
        # A folder's own word is heard of itself alone: it may have come from anywhere.
        kin = [self._kept(card.name, brought=False) for card in self._models() if card.name != name]
        kin = sorted((r for r in kin if (r.get("reference") or {}).get("name") == base), key=lambda r: r["measured"])
        whole = own or (kin.pop() if kin else {})
        for report in kin:
            # The whole keeps its own rows, and its own text where that differs.
            whole = merge(report, whole)
        rows = {(row["format"], str(row.get("overrides") or "")): row for row in whole.get("formats", ())}
        return whole | {"formats": list(rows.values())} if whole else {}

    def _kept(self, name: str, *, brought: bool = True) -> dict[str, Any]:
        return kept(name, self.home, brought=brought) or {} if library.NAME.fullmatch(name) else {}

    def _folder(self, name: object) -> Path:
        """The folder of a model that is here."""
        own, wanted = self._own(), text(name)
        return own if own is not None and wanted == own.name else library.find(wanted, self.home)

    def delete(self, name: str, kind: str = "") -> int:
        """Delete a model or an adapter, `kind` as its card says; the bytes that this frees.

        Raises:
            ModelError: nothing of that name, two things and no kind, the guide, or something uses it.
        """
        loaded = {self.answering, self.host.loading} - {""}
        return removal.delete(text(name), self.home, loaded=loaded, kind=text(kind))

    def disk_use(self) -> DiskUse:
        """What home takes on its disk, and what is left there."""
        return disk.disk_use(self.home)

    def names(self) -> list[str]:
        """The models that can be loaded: those in the library, and the folder that the page was started with."""
        return [card.name for card in self._models() if card.loadable]

    def _models(self) -> list[ModelCard]:
        cards = models(self._settings)
        own = self._own()
        if own is not None and own.name not in [card.name for card in cards]:
            cards.insert(0, judge(own, own.name, trusted=False, settings=self._settings))
        return cards

    def _own(self) -> Path | None:
        """The folder that the page was started with, where it is none of the library's."""
        folder = Path(self._settings.model).expanduser()
        return folder if folder.is_dir() and folder.name != self._settings.model else None

    def _plain(self, card: ModelCard) -> dict[str, Any]:
        fields = asdict(card)
        del fields["folder"]
        problem = card.problem.replace(str(card.folder), card.name)
        base = card.base if HUB_ID.fullmatch(card.base) else re.split(r"[\\/]", card.base.rstrip("\\/"))[-1]
        loaded = card.kind != "adapter" and card.name == self.answering
        return {**fields, "problem": problem, "base": base, "loaded": loaded}

    @property
    def answering(self) -> str:
        """Name of the model that answers; empty where none does."""
        return self.host.info.model if self.host.info else ""

    async def load(self, name: str, low_bit: str = "", device: str = "") -> EngineInfo:
        """Load a model by its name, or the one that an adapter of that name belongs to; empty takes the settings.

        Raises:
            NibbleError: there is no such model, format or device, or it cannot be loaded.
        """
        name, low_bit, device = (text(value) for value in (name, low_bit, device))
        own = self._own()
        if own is not None and name == own.name:
            return await self.host.load(str(own), low_bit, device, paths=True)
        if not library.has_adapter(name, self.home):
            library.find(name, self.home)
        return await self.host.load(name, low_bit, device)

    def wearable(self) -> list[str]:
        """Adapters for the model that answers, by what they say of their base; the engine looks at the weights."""
        return [name for name, base in self.adapters() if base == self.answering]

    def adapters(self) -> list[tuple[str, str]]:
        """Each adapter with the model that it is for: the one that answers, where that is one, else its base here."""
        source: object = None
        try:
            if self.answering:
                source = publish.read_manifest(self._folder(self.answering)).get("source")
        except ModelError:  # taken out of the library since
            pass
        cards = [self._plain(card) for card in library.adapters(self.home) if not card.problem]
        here = set(self.names()) if cards else set()
        bases = [(card["name"], self.answering if card["base"] == source else card["base"]) for card in cards]
        return [(name, base) for name, base in bases if base and base in {self.answering, *here}]

    async def unload(self) -> None:
        """Let the model go, and the memory with it."""
        await self.host.unload()

    # Work that takes long: each starts a job, and the job is returned at once.

    def download(self, wish: Download) -> dict[str, Any]:
        """Get a model from a hub.

        Raises:
            NibbleError: no such hub, not a model's id, or the same is being fetched already.
        """
        spec = wish.spec()
        request_from(spec, self._settings)
        return self._start("download", spec | {"hubs": list(self._settings.hubs)}, alone=False)

    def quantize(self, wish: Quantize) -> dict[str, Any]:
        """Make low-bit models of a model.

        Raises:
            NibbleError: a name, a format or a limit that cannot be; or the same is under way already.
        """
        spec = self._source(wish.model) | wish.spec()
        name, out = text(wish.model), spec.get("out", "")
        source = request_from({"repo": name}, self._settings).target if "/" in name else name
        made = [out, *(f"{out or source}-{low_bit}" for low_bit in spec["low_bit"])]
        refuse_trust(made, source, self._settings.trust_remote_code)
        return self._start("quantize", spec)

    def evaluate(self, wish: Evaluate) -> dict[str, Any]:
        """Measure what a model loses in low bit.

        Raises:
            NibbleError: as `quantize`.
        """
        spec = self._local(wish.model) | wish.spec()
        if wish.against:
            spec |= self._local(wish.against, "against")
        return self._start("evaluate", spec)

    def _start(self, task: str, spec: Mapping[str, Any], *, alone: bool = True) -> dict[str, Any]:
        """Start a job; `alone` on its device, or beside any other."""
        whole = {**spec, **({"device": self.device} if alone else {}), **self.surroundings}
        return jobs.start(task, whole, home=self.home, exclusive=self.device if alone else None).as_dict()

    @property
    def surroundings(self) -> dict[str, str]:
        """The part of every spec that is the server's to say: its home and its settings file."""
        return {"home": str(self.home), **({"config": self._config} if self._config else {})}

    def _source(self, model: object) -> dict[str, Any]:
        """The part of a spec that says which model: one that is here, or an id on a hub."""
        name = text(model)
        if "/" not in name:
            return self._local(name)
        request_from({"repo": name}, self._settings)
        return {"model": name}

    def _local(self, model: object, key: str = "model") -> dict[str, Any]:
        """The same, of a model that is here."""
        folder = self._folder(model)
        own = {key: str(folder.resolve()), "paths": True}
        return own if folder == self._own() else {key: text(model)}

    # The jobs.

    def jobs(self, limit: int = 20) -> list[dict[str, Any]]:
        """The jobs that work, those that wait, then those that have ended, the newest of each first."""
        if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MOST_JOBS:
            raise ModelError(f"limit is {limit!r}.", f"It must be a whole number from 1 to {MOST_JOBS}.")
        live = sorted(jobs.live_jobs(self.home), key=lambda job: job.state == "waiting")
        # One may have ended between the two looks.
        found = {job.id: job for job in (*live, *jobs.list_jobs(self.home, limit=limit))}
        return [job.as_dict() for job in list(found.values())[:limit]]

    def job(self, job_id: str) -> Job:
        """One job.

        Raises:
            JobError: there is none of that id.
        """
        return jobs.find(text(job_id), self.home)

    def stop(self, job_id: str) -> dict[str, Any]:
        """Stop a job and all its processes; returns once they are gone, which may take ten seconds.

        Raises:
            JobError: there is no such job, or a process could not be ended.
        """
        return jobs.stop(text(job_id), self.home).as_dict()

    def resume(self, job_id: str) -> dict[str, Any]:
        """Start a job again that ended before its time.

        Raises:
            JobError: there is no such job, or it waits, runs or is done.
        """
        return jobs.resume(text(job_id), self.home).as_dict()


def _aside(work: Callable[[], Result]) -> Future[Result]:
    """Work in a thread that a server which ends does not wait for."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed over, never lost
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
