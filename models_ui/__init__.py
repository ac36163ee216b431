"""The Models tab: get a model, shrink it, know what it lost, keep it. Widgets, then wiring; endpoints for scripts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gradio as gr

from models_ui.endpoints import build_endpoints
from models_ui.widgets import build_widgets
from models_ui.wiring import Wiring
from models_ui.words import WORDS
from nibble.operator import Operator

__all__ = ["WORDS", "Frame", "build", "build_endpoints"]


@dataclass(frozen=True)
class Frame:
    """What stands around the tab."""

    i18n: gr.I18n
    """Knows the words of every tab."""
    tab: gr.Tab
    status: gr.HTML
    """The line over the tabs."""
    standing: Callable[[gr.Request], str]
    """What that line says now."""


def build(frame: Frame, operator: Operator) -> Wiring:
    """Lay the tab out, within the Tab that is open, and wire it. Not for public mode."""
    wiring = Wiring(build_widgets(frame.i18n), operator, frame.status, frame.standing)
    wiring.wire(frame.tab)
    return wiring
