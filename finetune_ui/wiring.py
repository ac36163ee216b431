"""What happens when an operator does something in the Fine-tune tab.

A handler reads the values, calls one method of the operator, and says what changes on the page; what blocks goes to a
thread. Every event here is private; the endpoints for scripts stand in `finetune_ui.endpoints`. Knows nothing of how
work is done: a job goes on whatever becomes of the page.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from finetune_ui import forms, view
from finetune_ui.frame import Frame
from finetune_ui.scene import Changes, Scene
from finetune_ui.view import Say
from finetune_ui.widgets import Widgets
from nibble.border import sentence
from nibble.data.store import NotHere
from nibble.errors import ModelError, NibbleError
from nibble.operator import Operator
from nibble.training.launch import launch_command
from nibble.wishes import Compare, Download, Finetune, Merge
from nibble.words import language_of
from parts.console import command
from parts.joblist import title
from parts.scripts import SAVE_FILE
from parts.view import told

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
QUICK: dict[str, Any] = {**PRIVATE, "queue": False}
LATEST: dict[str, Any] = {**PRIVATE, "trigger_mode": "always_last"}

UNFOLDED = 6
"""Of what a handler is told, the values before the form's: the run that is looked at, four lists of jobs, the plots."""

FETCHED = "-download-"
"""Part of the id of a job that gets a data set."""

CHAT = "chat"
"""Id of the tab to which a model leads that was loaded."""


def say_from(request: gr.Request) -> Say:
    """The words in the caller's language."""
    return Say(language_of(request.headers.get("accept-language")))


class Wiring:
    """The handlers of one page, and the widgets that they change."""

    def __init__(self, widgets: Widgets, operator: Operator, frame: Frame) -> None:
        self.w = widgets
        self.operator = operator
        self.frame = frame
        self.scene = Scene(widgets, operator)

    def wire(self) -> None:
        """Attach every handler."""
        w = self.w
        data, settings, dry, train, after = w.data, w.settings, w.dry, w.train, w.after
        fields, work = list(w.fields), self.scene.working
        here = [w.runs, data.job, dry.job, train.job, after.jobs, train.drawn, *fields]
        seen = [data.found, data.columns, data.leave_out, data.fetch, data.trained, data.looked]
        lines = [settings.form, dry.console, train.console]

        self.frame.tab.select(self.opened, here, [*self.scene.choices, settings.form, *work], **PRIVATE)
        w.timer.tick(self.tick, [w.live, *here], [*work, *self.scene.choices, data.looked, self.frame.status], **QUICK)

        changed = [field.change for field in fields]
        # One listener for all: of two, the slower would show what is no longer chosen.
        looks = [self.frame.tab.select, *changed, data.looked.change]
        gr.on(looks, self.look, [data.looked, *fields], seen, **LATEST)
        gr.on(changed, self.written, fields, lines, **QUICK)
        data.data.input(lambda: {}, None, data.columns, **QUICK)
        data.upload.upload(
            self.keep, [data.upload, data.data], [data.upload, data.data, data.columns, data.said], **PRIVATE
        )

        settings.save.click(self.save, fields, [settings.file, settings.said], **PRIVATE).then(
            None, settings.file, None, js=SAVE_FILE, **PRIVATE
        )
        filled = [data.model, data.data, data.columns, data.leave_out, settings.form, settings.said]
        settings.open.upload(self.open, settings.open, filled, **PRIVATE)
        settings.reset.click(forms.defaults, None, settings.form, **QUICK)

        dry.start.click(self.dry_run, [*here], [dry.said, *work], **PRIVATE)
        train.start.click(self.train, [*here], [train.said, *work], **PRIVATE)
        w.runs.change(self.choose, here, work, **QUICK)
        data.fetch.click(self.fetch, here, [data.said, *work], **PRIVATE)
        for jobs, said in (
            (data.job, data.said),
            (dry.job, dry.said),
            (train.job, train.said),
            (after.jobs, after.said),
        ):
            jobs.change(self.again, here, work, **QUICK)
            jobs.act(self.acting(said), here, [said, self.frame.status, self.frame.tabs, *work], **PRIVATE).then(
                self.again, here, work, **QUICK
            )

        comparing: list[Any] = [after.adapter, after.prompts, after.checkpoints, after.tokens]
        merging: list[Any] = [after.adapter, after.out, after.formats]
        after.compare.click(self.compare, [*comparing, *here], [after.said, *work], **PRIVATE)
        after.merge.click(self.merge, [*merging, *here], [after.said, *work], **PRIVATE)
        gr.on([each.change for each in comparing], self.compare_line, comparing, after.compare_line, **QUICK)
        gr.on([each.change for each in merging], self.merge_line, merging, after.merge_line, **QUICK)
        after.chat.click(
            self.chat, after.adapter, [after.chat, after.said, self.frame.status, self.frame.tabs], **PRIVATE
        )
        after.save.click(self.save_report, None, [settings.file, after.said], **PRIVATE).then(
            None, settings.file, None, js=SAVE_FILE, **PRIVATE
        )

    def rest_behind(self, *others: gr.Tab) -> None:
        """Look no longer at the jobs while another tab is open."""
        for tab in others:
            tab.select(lambda: gr.Timer(active=False), None, self.w.timer, **QUICK)

    # What the page shows.

    async def _work(self, say: Say, *here: Any, settle: bool = False) -> Changes:
        chosen, *opened, drawn = here[:UNFOLDED]
        fields = here[UNFOLDED:]
        unfolded = [each for each in opened if isinstance(each, str)]
        return await self.scene.work(say, chosen, unfolded, drawn, _checked(fields), settle=settle)

    async def opened(self, request: gr.Request, *here: Any) -> Changes:
        """The tab was opened."""
        say = say_from(request)
        model, data = here[UNFOLDED : UNFOLDED + 2]
        choices = await self.scene.choose_from(model, data)
        # A plot that was drawn while nobody saw it is empty: it is drawn anew.
        work = await self._work(say, *here[: UNFOLDED - 1], "", *here[UNFOLDED:], settle=True)
        return choices | work | {self.w.settings.form: gr.update(rows=view.form(say))}

    async def tick(self, request: gr.Request, lived: Sequence[str], *here: Any) -> Changes:
        """A second has gone by while a job lives."""
        changes = await self._work(say_from(request), *here)
        ended = set(lived) - set(changes[self.w.live])
        if ended:
            changes = await self._work(say_from(request), *here, settle=True)
        if any(FETCHED in each for each in ended):
            # The data set that was fetched is looked at.
            changes |= await self.scene.choose_from(*here[UNFOLDED : UNFOLDED + 2]) | {self.w.data.looked: ""}
        return changes | {self.frame.status: self.frame.standing(request)}

    async def again(self, request: gr.Request, *here: Any) -> Changes:
        """Something has changed."""
        return await self._work(say_from(request), *here)

    async def choose(self, request: gr.Request, *here: Any) -> Changes:
        """A run was chosen."""
        return await self._work(say_from(request), *here, settle=True)

    async def look(self, request: gr.Request, looked: str, *fields: Any) -> AsyncIterator[Changes]:
        """Model, data set, columns or the longest sample may be others: what is trained, then."""
        say, settings = say_from(request), forms.settings(*fields)
        names = ("model", "data", "columns", "leave_out", "max_length")
        told_ = {name: settings[name] for name in names if settings.get(name) not in (None, "")}
        key = json.dumps([say.language, told_], sort_keys=True, default=str)
        if key == looked or not told_.get("data"):
            yield {self.w.data.looked: looked}
            return
        data = self.w.data
        waits = gr.update(rows=view.small(say("looking")))
        nothing = gr.update(rows=view.small(say("no_preview")))
        try:
            shown, good = await self.scene.data(say, told_)
            hidden = gr.update(visible=False)
            yield shown | {data.trained: waits if good else nothing, data.fetch: hidden, data.looked: key}
        except Exception as error:  # noqa: BLE001 - the border of the page
            refused = gr.update(rows=self._refused(error, say))
            fetched = gr.update(visible=isinstance(error, NotHere))
            yield {data.found: refused, data.trained: nothing, data.fetch: fetched, data.looked: key}
            return
        if good:
            try:
                yield await self.scene.trained(say, told_)
            except Exception as error:  # noqa: BLE001 - the border of the page
                yield {data.trained: gr.update(rows=self._refused(error, say))}

    async def written(self, request: gr.Request, *fields: Any) -> Changes:
        """A setting was written: what is wrong with it stands beside it, and the console lines follow."""
        settings = forms.settings(*fields)
        found = forms.problems(settings)
        spec = _checked(fields)
        lines = ["", ""]
        if spec is not None and spec["model"] and spec["data"]:
            spec |= self.operator.surroundings
            several = [f"# {say_from(request).plain('more_devices')}", launch_command("run.yaml")]
            several += [launch_command("run.yaml", 8, machines=2, machine=number) for number in (0, 1)]
            alone = command("finetune", spec)
            lines = [command("finetune", spec | {"dry_run": True}), "\n".join([alone, "", *several])]
        return {
            self.w.settings.form: gr.update(problems=found),
            self.w.dry.console: lines[0],
            self.w.train.console: lines[1],
        }

    # What an operator does.

    def _refused(self, error: Exception, say: Say) -> str:
        return told(say.plain("refused", error=sentence(error, say.language)), wrong=True)

    async def keep(self, request: gr.Request, file: str, data: str) -> Changes:
        """A file was dropped: it is kept, and chosen."""
        say, w = say_from(request), self.w.data
        try:
            name = await asyncio.to_thread(self.operator.keep_data, Path(file))
            sets = await asyncio.to_thread(self.operator.data_sets)
        except Exception as error:  # noqa: BLE001 - the border of the page
            return {w.upload: None, w.said: self._refused(error, say)}
        said = told(say.plain("kept_data", name=name))
        return {w.upload: None, w.data: gr.update(choices=sets, value=name), w.columns: {}, w.said: said}

    async def save(self, request: gr.Request, *fields: Any) -> Changes:
        """The button that gives the form as a run.yaml."""
        w, say = self.w.settings, say_from(request)
        try:
            text = forms.as_yaml(forms.settings(*fields))
        except Exception as error:  # noqa: BLE001 - the border of the page
            return {w.file: None, w.said: self._refused(error, say)}
        return {w.file: {"name": "run.yaml", "type": "application/yaml", "text": text}, w.said: ""}

    async def open(self, request: gr.Request, file: str) -> Changes:
        """A run.yaml was opened: its settings stand in the form."""
        say, w, data = say_from(request), self.w.settings, self.w.data
        path = Path(file)
        try:
            text = await asyncio.to_thread(path.read_text, encoding="utf-8", errors="replace")
            spec = forms.from_yaml(text)
        except Exception as error:  # noqa: BLE001 - the border of the page
            return {w.said: self._refused(error, say)}
        finally:
            path.unlink(missing_ok=True)
        return {
            data.model: spec["model"], data.data: spec["data"], data.columns: spec["columns"],
            data.leave_out: spec["leave_out"], w.form: gr.update(value=forms.fill(spec)),
            w.said: told(say.plain("form_opened", name=path.name)),
        }  # fmt: skip

    async def _begin(
        self, request: gr.Request, said: gr.HTML, start: Callable[[], dict[str, Any]], here: Sequence[Any]
    ) -> Changes:
        """Start a job and show it; or say why not."""
        say = say_from(request)
        try:
            job = await asyncio.to_thread(start)
        except Exception as error:  # noqa: BLE001 - the border of the page
            return {said: self._refused(error, say)}
        chosen, *rest = here
        trains = job["task"] == "finetune" and not job["spec"].get("dry_run")
        changes = await self._work(say, job["id"] if trains else chosen, *rest)
        if trains:
            changes[self.w.runs] |= {"value": job["id"]}
        return {said: told(say.plain("began", what=title(job, say.language)))} | changes

    async def fetch(self, request: gr.Request, *here: Any) -> Changes:
        """The button that gets a data set from a hub."""
        wish = Download(forms.settings(*here[UNFOLDED:])["data"], dataset=True)
        return await self._begin(request, self.w.data.said, lambda: self.operator.download(wish), here)

    async def dry_run(self, request: gr.Request, *here: Any) -> Changes:
        """The button that tries two steps."""
        wish = self._wish(here)
        return await self._begin(request, self.w.dry.said, lambda: self.operator.dry_run(wish), here)

    async def train(self, request: gr.Request, *here: Any) -> Changes:
        """The button Start."""
        wish = self._wish(here)
        return await self._begin(request, self.w.train.said, lambda: self.operator.finetune(wish), here)

    def _wish(self, here: Sequence[Any]) -> Finetune:
        return Finetune(forms.settings(*here[UNFOLDED:]))

    async def compare(
        self, request: gr.Request, adapter: str, prompts: str, steps: Sequence[Any], tokens: str, *here: Any
    ) -> Changes:
        """The button that compares."""
        start = lambda: self.operator.compare(_compare(adapter, prompts, steps, tokens))  # noqa: E731
        return await self._begin(request, self.w.after.said, start, here)

    async def compare_line(self, adapter: str, prompts: str, steps: Sequence[Any], tokens: str) -> str:
        """The same in the console; nothing while the fields make no wish."""
        return self._line("compare", lambda: _compare(adapter, prompts, steps, tokens).spec())

    async def merge(self, request: gr.Request, adapter: str, out: str, low_bit: Sequence[str], *here: Any) -> Changes:
        """The button Merge."""
        wish = Merge(adapter or "", out or "", low_bit or ())
        return await self._begin(request, self.w.after.said, lambda: self.operator.merge(wish), here)

    async def merge_line(self, adapter: str, out: str, low_bit: Sequence[str]) -> str:
        """The same in the console."""
        return self._line("merge", lambda: Merge(adapter or "", out or "", low_bit or ()).spec())

    def _line(self, task: str, spec: Callable[[], dict[str, Any]]) -> str:
        try:
            made = spec()
        except NibbleError:
            return ""
        return command(task, made | self.operator.surroundings) if made.get("adapter") else ""

    async def chat(self, request: gr.Request, name: str) -> AsyncIterator[Changes]:
        """The button that loads an adapter's base, puts it on, and leads to the chat."""
        say, w = say_from(request), self.w.after
        yield {w.said: told(say.plain("loading_now", model=name)), w.chat: gr.update(interactive=False)}
        changes = await self._load(request, name, w.said, say, worn=name)
        yield changes | {w.chat: gr.update(interactive=True)}

    async def _load(self, request: gr.Request, name: str, said: gr.HTML, say: Say, worn: str = "") -> Changes:
        try:
            info = await self.operator.load(name or "")
            await self.frame.wear(request, worn)
        except Exception as error:  # noqa: BLE001 - the border of the page
            return {said: self._refused(error, say)}
        loaded = say.plain(
            "is_loaded", model=info.model, format=info.format, device=info.device, seconds=info.load_s
        )  # fmt: skip
        return {
            said: told(loaded),
            self.frame.status: self.frame.standing(request),
            self.frame.tabs: gr.Tabs(selected=CHAT),
        }

    def acting(self, said: gr.HTML) -> Callable[..., AsyncIterator[Changes]]:
        """What the buttons of the jobs in one place do; `said` is where it is told."""

        async def act(request: gr.Request, event: gr.EventData, *here: Any) -> AsyncIterator[Changes]:
            # A script may leave either out.
            name, subject = str(getattr(event, "act", "")), str(getattr(event, "subject", ""))
            say = say_from(request)
            if name == "load":
                yield {said: told(say.plain("loading_now", model=subject))}
                yield await self._load(request, subject, said, say)
                return
            changes: Changes = {}
            try:
                if name not in ("stop", "resume"):
                    raise ModelError(f"There is no button {name[:40]!r}.")
                await asyncio.to_thread(getattr(self.operator, name), subject)
            except Exception as error:  # noqa: BLE001 - the border of the page
                changes = {said: self._refused(error, say)}
            yield await self._work(say, *here) | changes

        return act

    async def save_report(self, request: gr.Request) -> Changes:
        """The button that gives the latest comparison as a page."""
        w, say = self.w, say_from(request)
        try:
            report = await asyncio.to_thread(self.operator.compare_report)
        except Exception as error:  # noqa: BLE001 - the border of the page
            return {w.settings.file: None, w.after.said: self._refused(error, say)}
        file = {"name": "compare.html", "type": "text/html", "text": report["html"]}
        return {w.settings.file: file, w.after.said: ""}


def _checked(fields: Sequence[Any]) -> dict[str, Any] | None:
    """The form as a task is told it; None where a setting cannot be."""
    try:
        return Finetune(forms.settings(*fields)).recipe().as_spec()
    except NibbleError:
        return None


def _compare(adapter: str, prompts: str, steps: Sequence[Any], tokens: str) -> Compare:
    longest: Any = (tokens or "").strip() or None
    longest = int(longest) if isinstance(longest, str) and longest.isdecimal() else longest
    return Compare(adapter or "", checkpoints=list(steps or ()), prompts=prompts or "", max_new_tokens=longest)
