"""The drawer with the models: which one answers, in which format, on which device.

Knows nothing of what else can be done with models: that is the Models tab.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from html import escape

import gradio as gr

from chat.view import dressed
from chat.widgets import ModelWidgets
from chat.wiring import PRIVATE, Changes, Wiring, visitor_from
from nibble.border import sentence
from nibble.config import Settings
from nibble.errors import NibbleError
from nibble.operator import Operator


class ModelWiring:
    """The handlers of the drawer with the models."""

    def __init__(self, widgets: ModelWidgets, operator: Operator, settings: Settings, page: Wiring) -> None:
        self.w = widgets
        self.operator = operator
        self._settings = settings
        self._page = page

    @property
    def shown(self) -> list[gr.Dropdown]:
        """What `enter` changes."""
        return [self.w.name, self.w.low_bit, self.w.device]

    def wire(self) -> None:
        """Attach every handler."""
        self._page.adapters = self._adapters
        outputs = [
            self.w.report, self.w.load, self.w.unload, self.w.adapter, self._page.w.conversation, self._page.status,
        ]  # fmt: skip
        self.w.load.click(self.load, self.shown, outputs, **PRIVATE)
        self.w.unload.click(self.unload, None, outputs, **PRIVATE)
        self.w.adapter.input(self.wear, self.w.adapter, [*self._page.outputs, *self.shown], **PRIVATE)

    async def enter(self) -> Changes:
        """What the drawer shows when the page or the tab is opened."""
        info = self.operator.host.info
        name = info.model if info else self.operator.host.loading
        names = await asyncio.to_thread(self.operator.names)
        if name and name not in names:  # loaded, and taken out of the library since
            names.insert(0, name)
        low_bit = info.format if info else self._settings.low_bit
        return {
            self.w.name: gr.update(choices=names, value=name or None),
            self.w.low_bit: gr.update(value=low_bit),
            self.w.device: gr.update(value=self._settings.device),
        }

    async def load(self, request: gr.Request, name: str, low_bit: str, device: str) -> AsyncIterator[Changes]:
        """The button Load."""
        visitor = visitor_from(request)
        yield self._busy(True, visitor.say("state_loading", model=escape(name or "")))
        try:
            info = await self.operator.load(name or "", low_bit or "", device or "")
            said = visitor.say("loaded", model=info.model, format=info.format, device=info.device, seconds=info.load_s)
        except Exception as error:  # noqa: BLE001 - the border of the page: the buttons must come back
            said = sentence(error, visitor.language)
        yield self._busy(False, escape(said)) | self._page.greeted(visitor) | await self._page.worn(visitor)

    async def unload(self, request: gr.Request) -> Changes:
        """The button Unload."""
        visitor = visitor_from(request)
        await self.operator.unload()
        said = self._busy(False, visitor.say("unloaded")) | self._page.greeted(visitor)
        return said | await self._page.worn(visitor)

    async def wear(self, request: gr.Request, adapter: str | None) -> AsyncIterator[Changes]:
        """An adapter was chosen for the open conversation, or none; its model is loaded first where another one is."""
        visitor, desk = visitor_from(request), self._page.desk
        before, name = desk.adapter(visitor), adapter or ""
        try:
            await desk.wear(visitor, name)
            base = dict(await asyncio.to_thread(self.operator.adapters)).get(name, "")
            if base and base != self.operator.answering:
                yield {self._page.status: self._page.standing(visitor)}
                try:
                    await self.operator.load(base)
                except NibbleError:
                    await desk.wear(visitor, before)
                    raise
        except NibbleError as error:
            gr.Warning(escape(str(error)))
        yield await self.enter() | await self._page.worn(visitor) | self._page.greeted(visitor)

    def _adapters(self) -> list[tuple[str, str]]:
        """What to choose from: those of the model that answers by their names, others after their model's."""
        found = self.operator.adapters()
        own = [(name, name) for name, base in found if base == self.operator.answering]
        return own + [(dressed(base, name), name) for name, base in found if base != self.operator.answering]

    def _busy(self, busy: bool, said: str) -> Changes:
        button = gr.update(interactive=not busy)
        return {self.w.report: said, self.w.load: button, self.w.unload: button}
