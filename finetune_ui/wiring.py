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
from finetune_ui.aftermath import Aftermath
from finetune_ui.handling import LATEST, PRIVATE, QUICK, UNFOLDED, Handling, checked, say_from
from finetune_ui.scene import Changes
from nibble.data.store import NotHere
from nibble.training.launch import launch_command
from nibble.wishes import Download, Finetune
from parts.console import command
from parts.scripts import SAVE_FILE
from parts.view import told

FETCHED = "-download-"
"""Part of the id of a job that gets a data set."""


class Wiring(Handling):
    """The handlers of the steps from the data to the adapter."""

    def wire(self) -> None:
        """Attach every handler, those of the last step too."""
        Aftermath(self.w, self.operator, self.frame).wire()
        w, here = self.w, self.here
        data, settings, dry, train, after = w.data, w.settings, w.dry, w.train, w.after
        fields, work = list(w.fields), self.scene.working
        seen = [data.found, data.columns, data.leave_out, data.fetch, data.trained, data.looked]
        lines = [settings.form, dry.console, train.console, dry.result]

        self.frame.tab.select(self.opened, here, [*self.scene.choices, settings.form, *work], **PRIVATE)
        w.timer.tick(self.tick, [w.live, *here], [*work, *self.scene.choices, data.looked, self.frame.status], **QUICK)

        changed = [field.change for field in fields]
        # One listener for all: of two, the slower would show what is no longer chosen.
        looks = [self.frame.tab.select, *changed, data.looked.change]
        gr.on(looks, self.look, [data.looked, *fields], seen, **LATEST)
        gr.on(changed, self.written, fields, lines, **QUICK)
        data.data.input(lambda: ({}, ""), None, [data.columns, data.said], **QUICK)
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

    def rest_behind(self, *others: gr.Tab) -> None:
        """Look no longer at the jobs while another tab is open."""
        for tab in others:
            tab.select(lambda: gr.Timer(active=False), None, self.w.timer, **QUICK)

    # What the page shows.

    async def opened(self, request: gr.Request, *here: Any) -> Changes:
        """The tab was opened."""
        say = say_from(request)
        model, data = here[UNFOLDED : UNFOLDED + 2]
        choices = await self.scene.choose_from(model, data)
        # A plot that was drawn while nobody saw it is empty: it is drawn anew.
        work = await self.work(say, *here[: UNFOLDED - 1], "", *here[UNFOLDED:], settle=True)
        return choices | work | {self.w.settings.form: gr.update(rows=view.form(say))}

    async def tick(self, request: gr.Request, lived: Sequence[str], *here: Any) -> Changes:
        """A second has gone by while a job lives."""
        changes = await self.work(say_from(request), *here)
        ended = set(lived) - set(changes[self.w.live])
        if ended:
            changes = await self.work(say_from(request), *here, settle=True)
        if any(FETCHED in each for each in ended):
            # The data set that was fetched is looked at.
            changes |= await self.scene.choose_from(*here[UNFOLDED : UNFOLDED + 2]) | {self.w.data.looked: ""}
        return changes | {self.frame.status: self.frame.standing(request)}

    async def again(self, request: gr.Request, *here: Any) -> Changes:
        """Something has changed."""
        return await self.work(say_from(request), *here)

    async def choose(self, request: gr.Request, *here: Any) -> Changes:
        """A run was chosen."""
        return await self.work(say_from(request), *here, settle=True)

    async def look(self, request: gr.Request, looked: str, *fields: Any) -> AsyncIterator[Changes]:
        """Model, data set, columns or the longest sample may be others: what is trained, then."""
        say, settings = say_from(request), forms.settings(*fields)
        names = ("model", "data", "columns", "leave_out", "max_length")
        wrong = forms.problems(settings)
        told_ = {name: settings[name] for name in names if settings.get(name) not in (None, "") and name not in wrong}
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
            refused = gr.update(rows=self.refused(error, say))
            fetched = gr.update(visible=isinstance(error, NotHere))
            yield {data.found: refused, data.trained: nothing, data.fetch: fetched, data.looked: key}
            return
        if good:
            try:
                yield await self.scene.trained(say, told_)
            except Exception as error:  # noqa: BLE001 - the border of the page
                yield {data.trained: gr.update(rows=self.refused(error, say))}

    async def written(self, request: gr.Request, *fields: Any) -> Changes:
        """A setting was written: what is wrong with it stands beside it, and the console lines follow."""
        settings = forms.settings(*fields)
        found = forms.problems(settings)
        spec = checked(fields)
        lines = ["", ""]
        if spec is not None and spec["model"] and spec["data"]:
            told_ = spec | self.operator.surroundings
            several = [say_from(request).plain("more_devices"), launch_command("run.yaml")]
            several += [launch_command("run.yaml", 8, machines=2, machine=number) for number in (0, 1)]
            alone = command("finetune", told_)
            # What is copied whole starts one training.
            lines = [command("finetune", told_ | {"dry_run": True}), "\n# ".join([alone, *several])]
        return {
            self.w.settings.form: gr.update(problems=found),
            self.w.dry.console: lines[0],
            self.w.train.console: lines[1],
            **await self.scene.dry(say_from(request), spec),
        }

    # What an operator does.

    async def keep(self, request: gr.Request, file: str, data: str) -> Changes:
        """A file was dropped: it is kept, and chosen."""
        say, w = say_from(request), self.w.data
        try:
            name = await asyncio.to_thread(self.operator.keep_data, Path(file))
            sets = await asyncio.to_thread(self.operator.data_sets)
        except Exception as error:  # noqa: BLE001 - the border of the page
            return {w.upload: None, w.said: self.refused(error, say)}
        said = told(say.plain("kept_data", name=name))
        return {w.upload: None, w.data: gr.update(choices=sets, value=name), w.columns: {}, w.said: said}

    async def save(self, request: gr.Request, *fields: Any) -> Changes:
        """The button that gives the form as a run.yaml."""
        w, say = self.w.settings, say_from(request)
        try:
            text = forms.as_yaml(forms.settings(*fields))
        except Exception as error:  # noqa: BLE001 - the border of the page
            return {w.file: None, w.said: self.refused(error, say)}
        return {w.file: {"name": "run.yaml", "type": "application/yaml", "text": text}, w.said: ""}

    async def open(self, request: gr.Request, file: str) -> Changes:
        """A run.yaml was opened: its settings stand in the form."""
        say, w, data = say_from(request), self.w.settings, self.w.data
        path = Path(file)
        try:
            text = await asyncio.to_thread(path.read_text, encoding="utf-8", errors="replace")
            spec = forms.from_yaml(text)
        except Exception as error:  # noqa: BLE001 - the border of the page
            return {w.said: self.refused(error, say)}
        finally:
            path.unlink(missing_ok=True)
        return {
            data.model: spec["model"], data.data: spec["data"], data.columns: spec["columns"],
            data.leave_out: spec["leave_out"], w.form: gr.update(value=forms.fill(spec)),
            w.said: told(say.plain("form_opened", name=path.name)),
        }  # fmt: skip

    async def fetch(self, request: gr.Request, *here: Any) -> Changes:
        """The button that gets a data set from a hub."""
        wish = Download(forms.settings(*here[UNFOLDED:])["data"], dataset=True)
        return await self.begin(request, self.w.data.said, lambda: self.operator.download(wish), here)

    async def dry_run(self, request: gr.Request, *here: Any) -> Changes:
        """The button that tries two steps."""
        return await self._try(request, self.w.dry.said, self.operator.dry_run, here)

    async def train(self, request: gr.Request, *here: Any) -> Changes:
        """The button Start."""
        return await self._try(request, self.w.train.said, self.operator.finetune, here)

    async def _try(
        self, request: gr.Request, said: gr.HTML, start: Callable[[Finetune], dict[str, Any]], here: Sequence[Any]
    ) -> Changes:
        """Start what the form says; where fields of it cannot be, name them all."""
        say, settings = say_from(request), forms.settings(*here[UNFOLDED:])
        wrong = [say.plain(f"f_{name}") for name in forms.problems(settings)]
        if wrong:
            return {said: told(say.plain("settings_wrong", names=", ".join(wrong)), wrong=True)}
        return await self.begin(request, said, lambda: start(Finetune(settings)), here)
