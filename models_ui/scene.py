"""What the Models tab shows: the library, the chosen model, the formats of the source, the jobs.

Promises that what blocks is done in a thread. Knows nothing of what is pressed.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import gradio as gr

from models_ui import view
from models_ui.report import report
from models_ui.view import Say
from models_ui.widgets import Widgets
from nibble.errors import NibbleError
from nibble.jobs import LIVE
from nibble.jobs.progress import size
from nibble.lowbit.formats import FORMATS
from nibble.operator import Operator
from parts.joblist import joblist

Changes = dict[Any, Any]
"""Widget -> what becomes of it."""

SHOWN_JOBS = 12
LOG_LINES = 40


class Scene:
    """What one page shows."""

    def __init__(self, widgets: Widgets, operator: Operator) -> None:
        self.w = widgets
        self.operator = operator
        keep, shrink = widgets.keep, widgets.shrink
        self.shelves = [
            keep.library, keep.known, keep.disk, keep.load, keep.unload, keep.judge, keep.delete, keep.really,
            keep.asks, shrink.source, shrink.formats,
        ]  # fmt: skip
        """What `shelf` changes."""
        self.working = [widgets.jobs, widgets.live, widgets.timer]
        """What `work` changes."""

    async def shelf(self, say: Say, chosen: str, source: str) -> Changes:
        """The library, the chosen model, and the formats of the source.

        Says nothing of what is chosen but where it is gone: the next choice may be on its way already.
        """
        return await asyncio.to_thread(self._shelf, say, chosen, source)

    def _shelf(self, say: Say, chosen: str, source: str) -> Changes:
        models = self.operator.shelf()
        by_name = {view.key(model): model for model in models}
        dense = [name for name, model in by_name.items() if not model["problem"] and _can_shrink(model)]
        first = {} if source else {"value": dense[0] if dense else None}
        source = source or (dense[0] if dense else "")
        model = by_name.get(chosen)
        usable = model is not None and not model["problem"]
        loadable = usable and model is not None and model["kind"] == "model"
        loaded = model is not None and model["loaded"]
        keep = self.w.keep
        changes: Changes = {
            keep.library: gr.update(rows=view.library(models, chosen, say)) | ({} if model else {"value": ""}),
            keep.known: self._known(model, say),
            keep.disk: f"<p class='small'>{self._disk(say)}</p>",
            keep.load: gr.update(interactive=loadable and not loaded),
            keep.unload: gr.update(interactive=loaded),
            keep.judge: gr.update(interactive=loadable),
            keep.delete: gr.update(interactive=model is not None and not loaded and chosen != "guide"),
            keep.really: gr.update(visible=False),
            self.w.shrink.source: gr.update(choices=dense) | first,
        }
        return changes | {self.w.shrink.formats: gr.update(rows=self._formats(say, source, by_name.get(source)))}

    async def pick(self, say: Say, chosen: str, source: str) -> Changes:
        """As `shelf`, where the page itself chooses the model."""
        changes = await self.shelf(say, chosen, source)
        shown = changes[self.w.keep.library]
        return changes | {self.w.keep.library: {"value": chosen} | shown}

    async def formats(self, say: Say, source: str) -> Changes:
        """What each format costs of another source."""
        return await asyncio.to_thread(self._source, say, source)

    def _source(self, say: Say, source: str) -> Changes:
        model = next((model for model in self.operator.cards() if view.key(model) == source), None)
        return {self.w.shrink.formats: gr.update(rows=self._formats(say, source, model))}

    def _known(self, model: dict[str, Any] | None, say: Say) -> str:
        if model is None:
            return f"<p class='small'>{say('choose_one')}</p>"
        facts = view.facts(model, say)
        if model["problem"] or model["kind"] != "model":
            return facts
        return facts + report(self._report(model["name"]), model["name"], say)

    def _report(self, name: str) -> dict[str, Any]:
        """What is known of a model's quality; empty too where the model is gone since the page looked."""
        try:
            return self.operator.report(name)
        except NibbleError:
            return {}

    def _disk(self, say: Say) -> str:
        use = self.operator.disk_use()
        line = say("disk_use", used=size(use.models + use.adapters), free=size(use.free))
        return f"{line} {say('unfinished', size=size(use.unfinished))}" if use.unfinished else line

    def _formats(self, say: Say, source: str, model: dict[str, Any] | None) -> str:
        if model is None:
            return view.formats((), {}, say)
        try:
            estimates = self.operator.estimates(source)
        except NibbleError:  # a form whose headers tell too little
            estimates = []
        note = "" if self.operator.measured or self.operator.unmeasurable else "measuring"
        stored = model["kind"] == "source"
        return view.formats(estimates, self._report(source), say, source=stored, note=note)

    async def work(self, say: Say, unfolded: str) -> Changes:
        """The jobs, and whether there is something to look at."""
        return await asyncio.to_thread(self._work, say, unfolded)

    def _work(self, say: Say, unfolded: str) -> Changes:
        jobs = self.operator.jobs(SHOWN_JOBS)
        log = ""
        if unfolded in [job["id"] for job in jobs]:
            with contextlib.suppress(NibbleError):  # its folder may be gone since
                log = "\n".join(self.operator.job(unfolded).log().splitlines()[-LOG_LINES:])
        live = [job["id"] for job in jobs if job["state"] in LIVE]
        shown = gr.update(rows=joblist(jobs, unfolded, log, say))
        return {self.w.jobs: shown, self.w.live: live, self.w.timer: gr.Timer(active=bool(live))}


def _can_shrink(model: dict[str, Any]) -> bool:
    """Whether low-bit models can be made of it: it is in full precision, or in a form that is converted."""
    form = FORMATS.get(model["format"])
    return model["kind"] == "source" or (model["kind"] == "model" and (form is None or not form.quantized))
