"""Loading and unloading models: what an operator can do, on the page and from a script.

Promises that a model is named, never given as a path. In public mode nothing of this is built. Knows nothing of chats.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from chat.desk import Host
from chat.talk import Visitor
from chat.widgets import ModelWidgets
from chat.wiring import PRIVATE, Changes, Wiring, visitor_from
from nibble.config import Settings
from nibble.engines.bigdl import judge, models
from nibble.errors import ModelError, NibbleError
from nibble.library import ModelCard, find

log = logging.getLogger(__name__)


class Operator:
    """What may be done to the model."""

    def __init__(self, host: Host, settings: Settings) -> None:
        self.host = host
        self._settings = settings

    def cards(self) -> list[dict[str, Any]]:
        """The models on this machine as plain data, without their paths."""
        loaded = self.host.info.model if self.host.info else ""
        cards = models(self._settings)
        own = self._own()
        if own is not None and own.name not in [card.name for card in cards]:
            cards.insert(0, judge(own, own.name, trusted=False, settings=self._settings))
        return [_plain(card, loaded) for card in cards]

    def names(self) -> Sequence[str]:
        """The models that can be loaded: those in the library, and the folder that the page was started with."""
        names = [card.name for card in models(self._settings) if not card.problem]
        own = self._own()
        return names if own is None or own.name in names else [own.name, *names]

    def _own(self) -> Path | None:
        """The folder that the page was started with, where it is none of the library's."""
        folder = Path(self._settings.model).expanduser()
        return folder if folder.is_dir() and folder.name != self._settings.model else None

    async def load(self, visitor: Visitor, name: str, low_bit: str = "", device: str = "") -> str:
        """Load a model by its name; the sentence that says so.

        Raises:
            NibbleError: there is no such model, format or device, or it cannot be loaded.
        """
        if not all(isinstance(value, str) for value in (name, low_bit, device)):
            raise ModelError(visitor.say("not_text"))
        own = self._own()
        if own is not None and name == own.name:
            info = await self.host.load(str(own), low_bit, device, paths=True)
        else:
            find(name, self._settings.home_folder)
            info = await self.host.load(name, low_bit, device)
        return visitor.say("loaded", model=info.model, format=info.format, device=info.device, seconds=info.load_s)

    async def unload(self, visitor: Visitor) -> str:
        """Let the model go; the sentence that says so."""
        await self.host.unload()
        return visitor.say("unloaded")


def _plain(card: ModelCard, loaded: str) -> dict[str, Any]:
    fields = asdict(card)
    del fields["folder"]
    return {**fields, "problem": card.problem.replace(str(card.folder), card.name), "loaded": card.name == loaded}


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
        outputs = [self.w.report, self.w.load, self.w.unload, self._page.w.conversation, self._page.status]
        self.w.load.click(self.load, self.shown, outputs, **PRIVATE)
        self.w.unload.click(self.unload, None, outputs, **PRIVATE)

    def enter(self) -> Changes:
        """What the drawer shows when the page is opened."""
        info = self.operator.host.info
        name = info.model if info else self.operator.host.loading
        names = list(self.operator.names())
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
            said = await self.operator.load(visitor, name or "", low_bit or "", device or "")
        except NibbleError as error:
            said = str(error)
        except Exception as error:  # noqa: BLE001 - the border of the page: the buttons must come back
            number = secrets.token_hex(3)
            log.error("loading failed, id %s", number, exc_info=error)
            said = visitor.say("internal", value=number)
        yield self._busy(False, escape(said)) | self._page.greeted(visitor)

    async def unload(self, request: gr.Request) -> Changes:
        """The button Unload."""
        visitor = visitor_from(request)
        return self._busy(False, await self.operator.unload(visitor)) | self._page.greeted(visitor)

    def _busy(self, busy: bool, said: str) -> Changes:
        button = gr.update(interactive=not busy)
        return {self.w.report: said, self.w.load: button, self.w.unload: button}
