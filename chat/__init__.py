"""The Chat tab: widgets, then wiring, then the endpoints for scripts."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import gradio as gr

from chat.desk import Desk, Host
from chat.endpoints import build_endpoints
from chat.operating import ModelWiring
from chat.widgets import build_widgets
from chat.wiring import PRIVATE, RECALL, Changes, Wiring, visitor_from
from chat.words import WORDS
from nibble.config import Settings
from nibble.errors import NibbleError
from nibble.operator import Operator

__all__ = ["WORDS", "Contact", "Desk", "Frame", "Host", "build", "load_first"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frame:
    """What stands around the tab."""

    i18n: gr.I18n
    """Knows the words of every tab."""
    page: gr.Blocks
    tab: gr.Tab
    status: gr.HTML
    """The line over the tabs, kept up to date from here."""


@dataclass(frozen=True)
class Contact:
    """What the other tabs may ask of this one."""

    standing: Callable[[gr.Request], str]
    """The line over the tabs."""
    wear: Callable[[gr.Request, str], Awaitable[object]]
    """Let the model wear an adapter, or none, in the caller's open conversation; as `Desk.wear`."""


def build(frame: Frame, host: Host, operator: Operator, settings: Settings) -> Contact:
    """Lay the tab out, within the Tab that is open, and wire it.

    Args:
        frame: what stands around the tab.
        host: whoever holds the model.
        operator: loads models; in public mode nothing here is wired to it.
        settings: public mode, and the defaults of the model drawer.

    Returns:
        What the other tabs may ask.
    """
    desk = Desk(host, settings)
    # First, so that they get their names: the page's own events are named after their functions.
    build_endpoints(desk)
    widgets = build_widgets(frame.i18n, operator=not settings.public)
    wiring = Wiring(widgets, desk, frame.status)
    wiring.wire()
    drawer = ModelWiring(widgets.model, operator, settings, wiring) if widgets.model else None
    outputs = list(wiring.outputs)
    if drawer is not None:
        drawer.wire()
        outputs += drawer.shown

    async def enter(request: gr.Request, remembered: str) -> Changes:
        """The page was opened."""
        return await wiring.enter(request, remembered) | (await drawer.enter() if drawer else {})

    async def back(request: gr.Request) -> Changes:
        """The tab was chosen again: models may have come and gone."""
        visitor = visitor_from(request)
        return wiring.greeted(visitor) | await wiring.worn(visitor) | (await drawer.enter() if drawer else {})

    frame.page.load(enter, widgets.remembered, outputs, js=RECALL, **PRIVATE)
    frame.tab.select(back, None, outputs, **PRIVATE)
    frame.page.unload(wiring.leave)
    return Contact(
        lambda request: wiring.standing(visitor_from(request)),
        lambda request, adapter: desk.wear(visitor_from(request), adapter),
    )


async def load_first(host: Host, settings: Settings) -> None:
    """Load the model in the settings; why it could not be stands in the log and on the page."""
    try:
        await host.load(settings.model, settings.low_bit, settings.device, paths=True)
    except NibbleError as error:
        log.error("%s", error)
