"""The Chat tab: widgets, then wiring, then the endpoints for scripts."""

from __future__ import annotations

import logging

import gradio as gr

from chat.desk import Desk, Host
from chat.endpoints import build_endpoints
from chat.operating import ModelWiring, Operator
from chat.widgets import build_widgets
from chat.wiring import PRIVATE, RECALL, Changes, Wiring
from chat.words import WORDS
from nibble.config import Settings
from nibble.errors import NibbleError

__all__ = ["WORDS", "Desk", "Host", "build", "load_first"]

log = logging.getLogger(__name__)


def build(i18n: gr.I18n, page: gr.Blocks, host: Host, settings: Settings, status: gr.HTML) -> None:
    """Lay the tab out, within the Tab that is open, and wire it.

    Args:
        i18n: knows the words of this tab.
        page: the Blocks that the tab stands in.
        host: whoever holds the model.
        settings: in public mode nothing that loads a model is built.
        status: the line over the tabs, kept up to date from here.
    """
    desk = Desk(host, settings)
    operator = Operator(host, settings)
    # First, so that they get their names: the page's own events are named after their functions.
    build_endpoints(desk, operator, public=settings.public)
    widgets = build_widgets(i18n, operator=not settings.public)
    wiring = Wiring(widgets, desk, status)
    wiring.wire()
    drawer = ModelWiring(widgets.model, operator, settings, wiring) if widgets.model else None
    outputs = list(wiring.outputs)
    if drawer is not None:
        drawer.wire()
        outputs += drawer.shown

    async def enter(request: gr.Request, remembered: str) -> Changes:
        """The page was opened."""
        return await wiring.enter(request, remembered) | (drawer.enter() if drawer else {})

    page.load(enter, widgets.remembered, outputs, js=RECALL, **PRIVATE)
    page.unload(wiring.leave)


async def load_first(host: Host, settings: Settings) -> None:
    """Load the model in the settings; why it could not be stands in the log and on the page."""
    try:
        await host.load(settings.model, settings.low_bit, settings.device, paths=True)
    except NibbleError as error:
        log.error("%s", error)
