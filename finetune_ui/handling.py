"""What every handler of the Fine-tune tab shares: how work is begun, shown, stopped, loaded and refused.

Knows nothing of data sets, settings and reports.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import gradio as gr

from finetune_ui import forms
from finetune_ui.frame import Frame
from finetune_ui.scene import Changes, Scene
from finetune_ui.view import Say
from finetune_ui.widgets import Widgets
from nibble.border import sentence
from nibble.errors import ModelError, NibbleError
from nibble.operator import Operator
from nibble.wishes import Finetune
from nibble.words import language_of
from parts.joblist import title
from parts.view import told

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
QUICK: dict[str, Any] = {**PRIVATE, "queue": False}
LATEST: dict[str, Any] = {**PRIVATE, "trigger_mode": "always_last"}

UNFOLDED = 6
"""Of what a handler is told, the values before the form's: the run that is looked at, four lists of jobs, the plots."""

CHAT = "chat"
"""Id of the tab to which a model leads that was loaded."""


def say_from(request: gr.Request) -> Say:
    """The words in the caller's language."""
    return Say(language_of(request.headers.get("accept-language")))


class Handling:
    """The widgets of one page, and what its handlers have in common."""

    def __init__(self, widgets: Widgets, operator: Operator, frame: Frame) -> None:
        self.w = widgets
        self.operator = operator
        self.frame = frame
        self.scene = Scene(widgets, operator)

    @property
    def here(self) -> list[Any]:
        """The inputs by which a handler knows what the page shows: `UNFOLDED` of them, then the form's."""
        w = self.w
        return [w.runs, w.data.job, w.dry.job, w.train.job, w.after.jobs, w.train.drawn, *w.fields]

    async def work(self, say: Say, *here: Any, settle: bool = False) -> Changes:
        """What the page shows of jobs, runs and the console lines.

        Args:
            here: the values of `here`.
            settle: whether a run was chosen or has ended, so that the last step follows it.
        """
        chosen, *opened, drawn = here[:UNFOLDED]
        fields = here[UNFOLDED:]
        unfolded = [each for each in opened if isinstance(each, str)]
        return await self.scene.work(say, chosen, unfolded, drawn, checked(fields), settle=settle)

    def refused(self, error: Exception, say: Say) -> str:
        """Why something was not done, as it stands on the page."""
        return told(say.plain("refused", error=sentence(error, say.language)), wrong=True)

    async def begin(
        self, request: gr.Request, said: gr.HTML, start: Callable[[], dict[str, Any]], here: Sequence[Any]
    ) -> Changes:
        """Start a job and show it; or say why not."""
        say = say_from(request)
        try:
            job = await asyncio.to_thread(start)
        except Exception as error:  # noqa: BLE001 - the border of the page
            return {said: self.refused(error, say)}
        chosen, *rest = here
        trains = job["task"] == "finetune" and not job["spec"].get("dry_run")
        changes = await self.work(say, job["id"] if trains else chosen, *rest)
        if trains:
            changes[self.w.runs] |= {"value": job["id"]}
        return {said: told(say.plain("began", what=title(job, say.language)))} | changes

    async def load(self, request: gr.Request, name: str, said: gr.HTML, say: Say, worn: str = "") -> Changes:
        """Load a model by its name, let it wear an adapter or none, and lead to the chat."""
        try:
            info = await self.operator.load(name or "")
            await self.frame.wear(request, worn)
        except Exception as error:  # noqa: BLE001 - the border of the page
            return {said: self.refused(error, say)}
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
                yield await self.load(request, subject, said, say)
                return
            changes: Changes = {}
            try:
                if name not in ("stop", "resume"):
                    raise ModelError(f"There is no button {name[:40]!r}.")
                await asyncio.to_thread(getattr(self.operator, name), subject)
            except Exception as error:  # noqa: BLE001 - the border of the page
                changes = {said: self.refused(error, say)}
            yield await self.work(say, *here, settle=name == "stop") | changes

        return act


def checked(fields: Sequence[Any]) -> dict[str, Any] | None:
    """The form as a task is told it; None where a setting cannot be."""
    try:
        return Finetune(forms.settings(*fields)).recipe().as_spec()
    except NibbleError:
        return None
