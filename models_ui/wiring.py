"""What happens when an operator does something in the Models tab.

A handler reads the values, calls one method of the operator, and says what changes on the page; what blocks goes to a
thread. Every event here is private; the endpoints for scripts stand in `models_ui.endpoints`. Knows nothing of how work
is done: a job goes on whatever becomes of the page.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

import gradio as gr

from models_ui import forms, view
from models_ui.scene import Changes, Scene
from models_ui.view import Say
from models_ui.widgets import Widgets
from models_ui.words import WORDS
from nibble.border import sentence
from nibble.errors import ModelError, NibbleError
from nibble.jobs.progress import size
from nibble.operator import Operator
from nibble.wishes import Download, Evaluate
from nibble.words import language_of
from parts.console import command
from parts.joblist import made, title
from parts.view import told

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
QUICK: dict[str, Any] = {**PRIVATE, "queue": False}


def say_from(request: gr.Request) -> Say:
    """The words in the caller's language."""
    return Say(language_of(request.headers.get("accept-language")))


class Wiring:
    """The handlers of one page, and the widgets that they change."""

    def __init__(
        self, widgets: Widgets, operator: Operator, status: gr.HTML, standing: Callable[[gr.Request], str]
    ) -> None:
        self.w = widgets
        self.operator = operator
        self.scene = Scene(widgets, operator)
        self.status = status
        self.standing = standing

    def wire(self, tab: gr.Tab) -> None:
        """Attach every handler."""
        get, shrink, keep = self.w.get, self.w.shrink, self.w.keep
        here = [keep.library, shrink.source, self.w.jobs]
        shelf, work = self.scene.shelves, self.scene.working
        opened = tab.select(self.opened, here, [*shelf, *work], **PRIVATE)
        measured = opened.then(self.measured, None, keep.said, **PRIVATE)
        self.w.timer.tick(self.tick, [*here, self.w.live], [*shelf, *work, self.status], **QUICK)

        get.start.click(self.get, get.fields, [get.said, *work], **PRIVATE)
        gr.on([field.change for field in get.fields], self.get_line, get.fields, get.console, **QUICK)

        shrink.source.change(self.formats, shrink.source, shrink.formats, **QUICK)
        shrink.start.click(self.shrink, shrink.fields, [shrink.said, *work], **PRIVATE)
        shrink.pick.click(self.pick, [*shrink.fields, shrink.memory, shrink.loss], [shrink.said, *work], **PRIVATE)
        gr.on([field.change for field in shrink.fields], self.shrink_line, shrink.fields, shrink.console, **QUICK)

        keep.library.change(self.choose, here, [*shelf, keep.said], **QUICK)
        loaded = keep.load.click(self.load, keep.library, [keep.load, keep.said, self.status], **PRIVATE)
        keep.unload.click(self.unload, here, [*shelf, keep.said, self.status], **PRIVATE)
        keep.judge.click(self.judge, keep.library, [keep.said, *work], **PRIVATE)
        keep.delete.click(self.ask, keep.library, [keep.really, keep.asks], **QUICK)
        keep.keep.click(lambda: gr.Column(visible=False), None, keep.really, **QUICK)
        keep.delete_really.click(self.delete, here, [*shelf, keep.said], **PRIVATE)

        self.w.jobs.change(self.unfold, self.w.jobs, work, **QUICK)
        acted = self.w.jobs.act(self.act, self.w.jobs, [*work, keep.load, keep.said, self.status], **PRIVATE)
        # What took a while must not bring back what was chosen when it began.
        for waited in (measured, loaded, acted):
            waited.then(self.again, here, shelf, **QUICK)

    def rest_behind(self, *others: gr.Tab) -> None:
        """Look no longer at the jobs while another tab is open."""
        for tab in others:
            tab.select(lambda: gr.Timer(active=False), None, self.w.timer, **QUICK)

    # What an operator does.

    async def opened(self, request: gr.Request, chosen: str, source: str, unfolded: str) -> Changes:
        """The tab was opened."""
        say = say_from(request)
        chosen = chosen or self.operator.answering
        return await self.scene.pick(say, chosen, source) | await self.scene.work(say, unfolded)

    async def measured(self, request: gr.Request) -> str:
        """The tab is open: once the machine's speed is known, the estimates are whole."""
        try:
            if not await asyncio.to_thread(lambda: self.operator.measured):
                await self.operator.measure()
        except Exception as error:  # noqa: BLE001 - the border of the page
            return self._refused(error, say_from(request))
        return ""

    async def again(self, request: gr.Request, chosen: str, source: str, unfolded: str) -> Changes:
        """Something has changed: the library as it is now."""
        return await self.scene.shelf(say_from(request), chosen, source)

    async def tick(self, request: gr.Request, chosen: str, source: str, unfolded: str, lived: Sequence[str]) -> Changes:
        """A second has gone by while a job lives. What a job has made is in the library at once."""
        say = say_from(request)
        changes = await self.scene.work(say, unfolded)
        ended = set(lived) - set(changes[self.w.live])
        if not ended:
            return changes
        for job_id in sorted(ended):
            try:
                job = (await asyncio.to_thread(self.operator.job, job_id)).as_dict()
            except NibbleError:  # its folder is gone
                continue
            judged = (
                [PurePath(job["spec"]["model"]).name] if job["task"] == "evaluate" and job["state"] == "done" else []
            )
            chosen = next(reversed(made(job) or judged), chosen)
        return changes | await self.scene.pick(say, chosen, source) | {self.status: self.standing(request)}

    async def _begin(self, request: gr.Request, said: gr.HTML, start: Callable[[], dict[str, Any]]) -> Changes:
        """Start a job, and show it among the others; or say why not."""
        say = say_from(request)
        try:
            job = await asyncio.to_thread(start)
        except Exception as error:  # noqa: BLE001 - the border of the page
            return {said: self._refused(error, say)}
        began = say.plain("began", what=title(job, say.language))
        return {said: told(began)} | await self.scene.work(say, "")

    def _refused(self, error: Exception, say: Say) -> str:
        return told(say.plain("refused", error=sentence(error, say.language)), wrong=True)

    async def get(self, request: gr.Request, *fields: str) -> Changes:
        """The button Download."""
        wish = _download(fields)
        return await self._begin(request, self.w.get.said, lambda: self.operator.download(wish))

    async def get_line(self, *fields: str) -> str:
        """The same in the console; nothing while the fields make no wish."""
        try:
            spec = _download(fields).spec()
        except NibbleError:
            return ""
        return command("download", spec | self.operator.surroundings) if spec.get("repo") else ""

    async def formats(self, request: gr.Request, source: str) -> Changes:
        """Another source was chosen: what each format costs there."""
        return await self.scene.formats(say_from(request), source)

    async def shrink(self, request: gr.Request, *fields: Any) -> Changes:
        """The button Start."""
        language = say_from(request).language
        return await self._begin(
            request, self.w.shrink.said, lambda: self.operator.quantize(forms.quantize(language, *fields))
        )

    async def pick(self, request: gr.Request, *values: Any) -> Changes:
        """The button Pick for me: the formats that are ticked do not count."""
        language = say_from(request).language
        *fields, memory, loss = values

        def start() -> dict[str, Any]:
            most = forms.limit(language, "pick_memory", memory, 1e9)
            worst = forms.limit(language, "pick_kl", loss)
            if most is None and worst is None:
                raise NibbleError(WORDS.say("no_limit", language))
            wish = forms.quantize(language, fields[0], [view.STORED], *fields[2:])
            return self.operator.quantize(replace(wish, memory_bytes=most, max_kl=worst))

        return await self._begin(request, self.w.shrink.said, start)

    async def shrink_line(self, request: gr.Request, *fields: Any) -> str:
        """The same in the console; nothing while the fields make no wish."""
        try:
            wish = forms.quantize(say_from(request).language, *fields)
            spec = {"model": wish.model, **wish.spec(), **self.operator.surroundings}
            return command("quantize", spec) if wish.model else ""
        except NibbleError:
            return ""

    async def choose(self, request: gr.Request, chosen: str, source: str, unfolded: str) -> Changes:
        """A model was chosen."""
        return await self.scene.shelf(say_from(request), chosen, source) | {self.w.keep.said: ""}

    async def load(self, request: gr.Request, chosen: str) -> AsyncIterator[Changes]:
        """The button Load."""
        say, keep = say_from(request), self.w.keep
        waits = told(say.plain("loading_now", model=chosen))
        yield {keep.said: waits, keep.load: gr.update(interactive=False)}
        try:
            info = await self.operator.load(chosen)
            said = told(
                say.plain("is_loaded", model=info.model, format=info.format, device=info.device,
                    seconds=info.load_s,
                )
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - the border of the page
            said = self._refused(error, say)
        yield {keep.said: said, self.status: self.standing(request)}

    async def unload(self, request: gr.Request, chosen: str, source: str, unfolded: str) -> Changes:
        """The button Unload."""
        say = say_from(request)
        await self.operator.unload()
        said = {self.w.keep.said: told(WORDS.say("is_unloaded", say.language)), self.status: self.standing(request)}
        return await self.scene.shelf(say, chosen, source) | said

    async def judge(self, request: gr.Request, chosen: str) -> Changes:
        """The button Evaluate."""
        return await self._begin(request, self.w.keep.said, lambda: self.operator.evaluate(Evaluate(chosen)))

    async def ask(self, request: gr.Request, chosen: str) -> Changes:
        """The button Delete asks first."""
        models = await asyncio.to_thread(self.operator.cards)
        taken = next((model["size_bytes"] for model in models if view.key(model) == chosen), 0)
        name, kind = view.named(chosen)
        language = say_from(request).language
        asks = WORDS.say("delete_asks", language, model=name, size=size(taken))
        worn = [model["name"] for model in models if model["kind"] == "adapter" and model["base"] == name]
        if worn and kind != "adapter":
            asks += " " + WORDS.say("delete_worn", language, names=", ".join(worn))
        return {self.w.keep.really: gr.Column(visible=True), self.w.keep.asks: told(asks, wrong=True)}

    async def delete(self, request: gr.Request, chosen: str, source: str, unfolded: str) -> Changes:
        """The button Delete for good."""
        say = say_from(request)
        try:
            name, kind = view.named(chosen)
            freed = await asyncio.to_thread(self.operator.delete, name, kind)
            said = told(WORDS.say("deleted", say.language, model=name, size=size(freed)))
        except Exception as error:  # noqa: BLE001 - the border of the page
            said = self._refused(error, say)
        source = "" if source == chosen else source
        return await self.scene.shelf(say, chosen, source) | {self.w.keep.said: said}

    async def unfold(self, request: gr.Request, unfolded: str) -> Changes:
        """The log of a job is to be seen, or no longer."""
        return await self.scene.work(say_from(request), unfolded)

    async def act(self, request: gr.Request, event: gr.EventData, unfolded: str) -> AsyncIterator[Changes]:
        """A button of a job."""
        # A script may leave either out.
        act, subject = str(getattr(event, "act", "")), str(getattr(event, "subject", ""))
        if act == "load":
            async for changes in self.load(request, subject):
                yield changes
            return
        say = say_from(request)
        said: Changes = {}
        try:
            if act not in ("stop", "resume"):
                raise ModelError(f"There is no button {act[:40]!r}.")
            await asyncio.to_thread(getattr(self.operator, act), subject)
        except Exception as error:  # noqa: BLE001 - the border of the page
            said = {self.w.keep.said: self._refused(error, say)}
        yield await self.scene.work(say, unfolded) | said


def _download(fields: Sequence[str]) -> Download:
    """What the card's fields wish for."""
    repo, hub, revision, file, name = (field or "" for field in fields)
    return Download(repo, hub, revision, file, name)
