"""What stands around the Fine-tune tab."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import gradio as gr


@dataclass(frozen=True)
class Frame:
    """What the tab is handed."""

    i18n: gr.I18n
    """Knows the words of every tab."""
    tab: gr.Tab
    tabs: gr.Tabs
    """All of them: a loaded model leads to the chat."""
    status: gr.HTML
    """The line over the tabs."""
    standing: Callable[[gr.Request], str]
    """What that line says now."""
    wear: Callable[[gr.Request, str], Awaitable[object]]
    """Puts an adapter on the model, or takes it off, in the caller's open conversation."""
