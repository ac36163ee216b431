"""The widgets of the Models tab and where they stand; nothing happens in them until `models_ui.wiring` says so.

The tables are HTML of our own: a grid widget cannot be read on a phone. What is chosen in one is its value. Knows
neither models nor jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from nibble.config import HUBS
from nibble.lowbit.formats import DEFAULT
from nibble.wishes import MOST_CHARACTERS
from parts.scripts import ACT, CHOOSE, TICK

MOST_LISTED = 4_000
"""Characters of a field that takes several names."""


@dataclass(frozen=True)
class Get:
    """The card that downloads."""

    repo: gr.Textbox
    hub: gr.Dropdown
    revision: gr.Textbox
    file: gr.Textbox
    name: gr.Textbox
    start: gr.Button
    said: gr.HTML
    console: gr.Code

    @property
    def fields(self) -> Sequence[Any]:
        """In the order of `nibble.wishes.Download`."""
        return [self.repo, self.hub, self.revision, self.file, self.name]


@dataclass(frozen=True)
class Shrink:
    """The card that quantizes."""

    source: gr.Dropdown
    formats: gr.HTML
    out: gr.Textbox
    skip: gr.Textbox
    overrides: gr.Textbox
    judge: gr.Checkbox
    memory: gr.Textbox
    loss: gr.Textbox
    pick: gr.Button
    start: gr.Button
    said: gr.HTML
    console: gr.Code

    @property
    def fields(self) -> Sequence[Any]:
        """In the order of `models_ui.forms.quantize`."""
        return [self.source, self.formats, self.out, self.skip, self.overrides, self.judge]


@dataclass(frozen=True)
class Keep:
    """The card with the library."""

    library: gr.HTML
    load: gr.Button
    unload: gr.Button
    judge: gr.Button
    delete: gr.Button
    really: gr.Row
    asks: gr.HTML
    delete_really: gr.Button
    keep: gr.Button
    said: gr.HTML
    known: gr.HTML
    disk: gr.HTML


@dataclass(frozen=True)
class Widgets:
    """Every widget of the tab that something is wired to."""

    get: Get
    shrink: Shrink
    keep: Keep
    jobs: gr.HTML
    live: gr.State
    """Ids of the jobs that lived when the page last looked."""
    timer: gr.Timer


def build_widgets(i18n: gr.I18n) -> Widgets:
    """Lay the tab out, within the Tab that is open.

    Args:
        i18n: knows the words of `models_ui.words` by their keys, and those of the Chat tab.
    """
    with gr.Column(elem_id="models-page", elem_classes="bench"):
        with gr.Row(elem_id="cards"):
            with gr.Column(elem_classes="card", elem_id="get"):
                get = _get(i18n)
            with gr.Column(elem_classes="card", elem_id="shrink"):
                shrink = _shrink(i18n)
            with gr.Column(elem_classes="card", elem_id="keep"):
                keep = _keep(i18n)
            with gr.Column(elem_id="work"):
                gr.Markdown(i18n("jobs"), elem_classes="heading")
                jobs = gr.HTML(
                    "", html_template="${rows}", rows="", js_on_load=ACT, elem_id="jobs", apply_default_css=False
                )
        live = gr.State([])
        timer = gr.Timer(1.0, active=False)
    return Widgets(get, shrink, keep, jobs, live, timer)


def _heading(i18n: gr.I18n, title: str, intro: str = "") -> None:
    gr.Markdown(i18n(title), elem_classes="heading")
    if intro:
        gr.Markdown(i18n(intro), elem_classes="intro")


def _said(name: str) -> gr.HTML:
    return gr.HTML("", elem_id=name, elem_classes="said", apply_default_css=False)


def _console(i18n: gr.I18n) -> gr.Code:
    with gr.Accordion(i18n("console"), open=False, elem_classes="fold"):
        return gr.Code(
            language="shell", interactive=False, show_label=False, container=False, lines=1, wrap_lines=True,
            show_line_numbers=False, buttons=["copy"], elem_classes="console",
        )  # fmt: skip


def _line(i18n: gr.I18n, key: str, info: str = "", **more: Any) -> gr.Textbox:
    told = {"info": i18n(info)} if info else {}
    return gr.Textbox(label=i18n(key), **{"max_length": MOST_CHARACTERS, "max_lines": 1, **told, **more})


def _get(i18n: gr.I18n) -> Get:
    _heading(i18n, "get", "get_intro")
    repo = _line(i18n, "repo", placeholder="Qwen/Qwen2-1.5B-Instruct", elem_id="repo")
    hub = gr.Dropdown([(i18n("hub_own"), ""), *HUBS], value="", label=i18n("hub"), elem_id="hub")
    with gr.Accordion(i18n("get_more"), open=False, elem_classes="fold"):
        revision = _line(i18n, "revision", "revision_info", elem_id="revision")
        file = _line(i18n, "gguf", "gguf_info", elem_id="gguf")
        name = _line(i18n, "name_here", placeholder="org__name", elem_id="name-here")
    start = gr.Button(i18n("start_get"), variant="primary", elem_id="start-get")
    said = _said("get-said")
    return Get(repo, hub, revision, file, name, start, said, _console(i18n))


def _shrink(i18n: gr.I18n) -> Shrink:
    _heading(i18n, "shrink", "shrink_intro")
    source = gr.Dropdown(
        [], label=i18n("source"), info=i18n("source_info"), allow_custom_value=True, elem_id="source", interactive=True
    )
    formats = gr.HTML(
        [DEFAULT], html_template="${rows}", rows="", js_on_load=TICK, elem_id="formats",
        apply_default_css=False,
    )  # fmt: skip
    with gr.Accordion(i18n("advanced"), open=False, elem_classes="fold"):
        out = _line(i18n, "out", "out_info", elem_id="out")
        skip = _line(i18n, "skip", "skip_info", max_length=MOST_LISTED, elem_id="skip")
        overrides = _line(
            i18n, "overrides", "overrides_info", max_length=MOST_LISTED, lines=2, max_lines=8, elem_id="overrides"
        )
        judge = gr.Checkbox(True, label=i18n("judge_after"), elem_id="judge-after")
        gr.Markdown(i18n("pick_intro"), elem_classes="intro")
        with gr.Row():
            memory = _line(i18n, "pick_memory", min_width=120, elem_id="pick-memory")
            loss = _line(i18n, "pick_kl", min_width=120, elem_id="pick-kl")
        pick = gr.Button(i18n("start_pick"), size="md", elem_classes="plain", elem_id="start-pick")
    start = gr.Button(i18n("start_shrink"), variant="primary", elem_id="start-shrink")
    said = _said("shrink-said")
    return Shrink(
        source, formats, out, skip, overrides, judge, memory, loss, pick, start, said, _console(i18n)
    )  # fmt: skip


def _keep(i18n: gr.I18n) -> Keep:
    _heading(i18n, "keep_models")
    library = gr.HTML(
        "", html_template="${rows}", rows="", js_on_load=CHOOSE, elem_id="library", apply_default_css=False
    )
    with gr.Row(elem_classes="tools"):
        load = gr.Button(i18n("shelf_load"), variant="primary", size="sm", interactive=False, elem_id="shelf-load")
        unload, judge, delete = (
            gr.Button(i18n(f"shelf_{key}"), size="sm", elem_classes="plain", interactive=False, elem_id=f"shelf-{key}")
            for key in ("unload", "judge", "delete")
        )
    with gr.Column(visible=False, elem_id="delete-asks") as really:
        asks = _said("asks")
        with gr.Row(elem_classes="tools"):
            delete_really = gr.Button(
                i18n("shelf_delete_really"), size="sm", variant="stop", elem_id="shelf-delete-really"
            )
            keep = gr.Button(i18n("shelf_keep"), size="sm", elem_classes="plain", elem_id="shelf-keep")
    said = _said("keep-said")
    known = gr.HTML("", elem_id="known", apply_default_css=False)
    disk = gr.HTML("", elem_id="disk", apply_default_css=False)
    return Keep(library, load, unload, judge, delete, really, asks, delete_really, keep, said, known, disk)
