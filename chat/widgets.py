"""The widgets of the Chat tab and where they stand; nothing happens in them until `chat.wiring` says so.

Knows neither the engine nor the conversations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import gradio as gr

from chat.talk import MOST_CHARACTERS
from chat.words import WORDS
from nibble.engines.base import Sampling
from nibble.lowbit.formats import FORMATS

LATEX: list[dict[str, str | bool]] = [
    {"left": left, "right": right, "display": display}
    for left, right, display in (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("$", "$", False))
]
DEVICES = ("auto", "cpu", "xpu", "cuda")


@dataclass(frozen=True)
class ModelWidgets:
    """What an operator loads models with."""

    name: gr.Dropdown
    low_bit: gr.Dropdown
    device: gr.Dropdown
    load: gr.Button
    unload: gr.Button
    adapter: gr.Dropdown
    """What the model wears in the conversation that is open."""
    report: gr.Markdown


@dataclass(frozen=True)
class Widgets:
    """Every widget of the tab that something is wired to."""

    conversation: gr.Chatbot
    message: gr.Textbox
    new_chat: gr.Button
    chats: gr.Radio
    delete: gr.Button
    really: gr.Row
    delete_really: gr.Button
    keep: gr.Button
    markdown: gr.Button
    json: gr.Button
    file: gr.JSON
    remembered: gr.Textbox
    """The chat that this tab had open before it was reloaded; never shown."""
    system: gr.Textbox
    sampling: Sequence[gr.Textbox]
    """One for each field of `Sampling`, in its order; empty is the model's own."""
    model: ModelWidgets | None
    """None in public mode."""


def build_widgets(i18n: gr.I18n, *, operator: bool) -> Widgets:
    """Lay the tab out, within the Blocks and Tab that are open.

    Args:
        i18n: knows the words of `chat.words` by their keys.
        operator: whether the visitor may load and unload models.
    """
    with gr.Sidebar(width=296, elem_id="sidebar"):
        new_chat = gr.Button(i18n("new_chat"), elem_id="new-chat", elem_classes="quiet", size="md")
        chats = gr.Radio(
            [], show_label=False, container=False, elem_id="chats", label=i18n("conversations"), interactive=True
        )
        with gr.Column(elem_id="drawers"):
            model = _model(i18n) if operator else None
            with gr.Accordion(i18n("system_prompt"), open=False, elem_id="system-drawer"):
                system = gr.Textbox(
                    placeholder=i18n("system_placeholder"), lines=3, max_lines=8, show_label=False, container=False,
                    max_length=MOST_CHARACTERS, elem_id="system", label=i18n("system_prompt"),
                )  # fmt: skip
            with gr.Accordion(i18n("sampling"), open=False, elem_id="sampling-drawer"):
                sampling = [
                    gr.Textbox(
                        label=i18n(item.name), placeholder=i18n("own"), max_length=24, elem_id=item.name, max_lines=1
                    )
                    for item in fields(Sampling)
                ]
        with gr.Row(elem_classes="tools"):
            markdown = gr.Button(i18n("download_markdown"), size="sm", elem_classes="plain", elem_id="get-markdown")
            json = gr.Button(i18n("download_json"), size="sm", elem_classes="plain", elem_id="get-json")
            delete = gr.Button(i18n("delete"), size="sm", elem_classes="plain", elem_id="delete")
        with gr.Row(elem_classes="tools", visible=False) as really:
            delete_really = gr.Button(i18n("delete_really"), size="sm", variant="stop", elem_id="delete-really")
            keep = gr.Button(i18n("keep"), size="sm", elem_classes="plain", elem_id="keep")
    file = gr.JSON(visible=False, elem_id="file")
    remembered = gr.Textbox(visible=False)
    conversation = gr.Chatbot(
        elem_id="chatbot", show_label=False, container=False, layout="panel", editable="user", buttons=["copy"],
        latex_delimiters=LATEX, sanitize_html=True, allow_tags=False, label=i18n("chat"), height="100%",
    )  # fmt: skip
    message = gr.Textbox(
        placeholder=i18n("message"), label=i18n("message"), show_label=False, container=False, lines=1, max_lines=8,
        submit_btn=True, stop_btn=False, autofocus=True, max_length=MOST_CHARACTERS, elem_id="message",
    )  # fmt: skip
    return Widgets(
        conversation, message, new_chat, chats, delete, really, delete_really, keep, markdown, json, file, remembered,
        system, sampling, model,
    )  # fmt: skip


def _model(i18n: gr.I18n) -> ModelWidgets:
    with gr.Accordion(i18n("model_settings"), open=False, elem_id="model-drawer"):
        name = gr.Dropdown([], label=i18n("model"), elem_id="model", interactive=True)
        low_bit = gr.Dropdown(list(FORMATS), label=i18n("low_bit"), info=i18n("low_bit_info"), elem_id="low-bit")
        device = gr.Dropdown(list(DEVICES), label=i18n("device"), elem_id="device")
        with gr.Row(elem_classes="tools"):
            load = gr.Button(i18n("load"), variant="primary", size="sm", elem_id="load")
            unload = gr.Button(i18n("unload"), size="sm", elem_classes="plain", elem_id="unload")
        label, told = i18n("chat_adapter"), i18n("adapter_info")
        adapter = gr.Dropdown([], label=label, info=told, elem_id="adapter", interactive=True)
        report = gr.Markdown(elem_id="model-report", sanitize_html=True)
    return ModelWidgets(name, low_bit, device, load, unload, adapter, report)


def fixed_words() -> dict[str, dict[str, str]]:
    """The words of this tab, by language, for gr.I18n."""
    return {language: WORDS.of(language) for language in ("en", "zh")}
