"""The Fine-tune tab: what it will do, and the Python lines that fine-tune a low-bit model today."""

from __future__ import annotations

import gradio as gr

from finetune_ui.words import WORDS

__all__ = ["WORDS", "build"]


def build(i18n: gr.I18n) -> None:
    """Lay the tab out, within the Tab that is open."""
    with gr.Column(elem_classes="page"):
        gr.Markdown(i18n("finetune_intro"))
