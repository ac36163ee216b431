"""The Models tab: what it will do, and the Python lines that do it today."""

from __future__ import annotations

import gradio as gr

from models_ui.words import WORDS

__all__ = ["WORDS", "build"]


def build(i18n: gr.I18n) -> None:
    """Lay the tab out, within the Tab that is open."""
    with gr.Column(elem_classes="page"):
        gr.Markdown(i18n("models_intro"))
        gr.Code(
            "from nibble.transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2-1.5B-Instruct", load_in_low_bit="sym_int4")\n'
            'model.save_low_bit("qwen2-int4")  # safetensors, tokenizer and all\n'
            'model = AutoModelForCausalLM.load_low_bit("qwen2-int4")  # needs no 16-bit weights\n',
            language="python", interactive=False, show_label=False, container=False, elem_id="models-code",
        )  # fmt: skip
        gr.Markdown(i18n("models_after"))
