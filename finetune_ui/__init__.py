"""The Fine-tune tab: from a data set to an adapter, step by step. Widgets, then wiring; endpoints for scripts."""

from __future__ import annotations

import gradio as gr

from finetune_ui.endpoints import build_endpoints
from finetune_ui.frame import Frame
from finetune_ui.widgets import build_widgets
from finetune_ui.wiring import Wiring
from finetune_ui.words import WORDS
from nibble.operator import Operator

__all__ = ["WORDS", "Frame", "build", "build_endpoints", "build_public"]


def build(frame: Frame, operator: Operator) -> Wiring:
    """Lay the tab out, within the Tab that is open, and wire it. Not for public mode."""
    wiring = Wiring(build_widgets(frame.i18n), operator, frame)
    wiring.wire()
    return wiring


def build_public(i18n: gr.I18n) -> None:
    """What stands in the tab in public mode: a sentence."""
    with gr.Column(elem_classes="page"):
        gr.Markdown(i18n("finetune_public"))
