"""The widgets of the Fine-tune tab and where they stand; nothing happens in them until `finetune_ui.wiring` says so.

The form, the tokens and the runs are HTML of our own: one table of settings draws the form, and it can be read on a
phone. Knows neither models nor jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from finetune_ui import forms
from nibble.comparing.order import PROMPTS
from nibble.data import SUFFIXES
from nibble.lowbit.formats import FORMATS
from nibble.wishes import MOST_CHARACTERS
from parts.scripts import ACT, CHOOSE, FILL_IN, KEEP_OPEN, MAP

MOST_PROMPT_LINES = 20_000
"""Characters of all prompts together."""


@dataclass(frozen=True)
class Data:
    """The steps that choose a model and a data set, and show what is trained."""

    model: gr.Dropdown
    data: gr.Dropdown
    upload: gr.File
    found: gr.HTML
    columns: gr.HTML
    leave_out: gr.Checkbox
    said: gr.HTML
    fetch: gr.Button
    """Seen where the data set is on a hub and not here."""
    job: gr.HTML
    trained: gr.HTML
    looked: gr.State
    """What `found` and `trained` are about."""


@dataclass(frozen=True)
class Settings:
    """The form, and what is done with it as a whole."""

    form: gr.HTML
    save: gr.Button
    open: gr.UploadButton
    reset: gr.Button
    said: gr.HTML
    file: gr.JSON
    """What the browser is given to save."""


@dataclass(frozen=True)
class Dry:
    """The dry run."""

    start: gr.Button
    said: gr.HTML
    job: gr.HTML
    result: gr.HTML
    console: gr.Code


@dataclass(frozen=True)
class Train:
    """The training, and the run that is looked at."""

    start: gr.Button
    said: gr.HTML
    job: gr.HTML
    result: gr.HTML
    curves: gr.HTML
    """Which colour is which."""
    plots: gr.Row
    loss: gr.LinePlot
    rate: gr.LinePlot
    steps: gr.HTML
    console: gr.Code
    drawn: gr.State
    """What the plots show: id of the run, and rows."""


@dataclass(frozen=True)
class After:
    """Comparing and merging."""

    adapter: gr.Dropdown
    prompts: gr.Textbox
    checkpoints: gr.CheckboxGroup
    tokens: gr.Textbox
    compare: gr.Button
    compare_line: gr.Code
    report: gr.HTML
    save: gr.Button
    out: gr.Textbox
    formats: gr.CheckboxGroup
    merge: gr.Button
    merge_line: gr.Code
    proof: gr.HTML
    chat: gr.Button
    said: gr.HTML
    merge_said: gr.HTML
    jobs: gr.HTML


@dataclass(frozen=True)
class Widgets:
    """Every widget of the tab that something is wired to."""

    data: Data
    settings: Settings
    dry: Dry
    train: Train
    after: After
    runs: gr.HTML
    """Value: id of the run that is looked at."""
    live: gr.State
    """Ids of the jobs that lived when the page last looked."""
    timer: gr.Timer

    @property
    def fields(self) -> Sequence[Any]:
        """In the order of `finetune_ui.forms.settings`."""
        data = self.data
        return [data.model, data.data, data.columns, data.leave_out, self.settings.form]


def build_widgets(i18n: gr.I18n) -> Widgets:
    """Lay the tab out, within the Tab that is open.

    Args:
        i18n: knows the words of `finetune_ui.words` by their keys, and those of `parts.words`.
    """
    with gr.Column(elem_id="finetune-page", elem_classes="bench"), gr.Row(elem_id="path"):
        with gr.Column(elem_id="steps"):
            with gr.Column(elem_classes="card", elem_id="step-data"):
                chosen = _data(i18n)
            with gr.Column(elem_classes="card", elem_id="step-trained"):
                _heading(i18n, "step_trained", "step_trained_intro")
                trained = _html("trained", js_on_load=KEEP_OPEN)
            data = Data(*chosen, trained, gr.State(""))  # type: ignore[call-arg]
            with gr.Column(elem_classes="card", elem_id="step-settings"):
                settings = _settings(i18n)
            with gr.Column(elem_classes="card", elem_id="step-dry"):
                dry = _dry(i18n)
            with gr.Column(elem_classes="card", elem_id="step-train"):
                train = _train(i18n)
            with gr.Column(elem_classes="card", elem_id="step-after"):
                after = _after(i18n)
        with gr.Column(elem_id="side"):
            gr.Markdown(i18n("runs"), elem_classes="heading")
            runs = _html("runs", js_on_load=CHOOSE)
    return Widgets(data, settings, dry, train, after, runs, gr.State([]), gr.Timer(1.0, active=False))


def _html(name: str, value: Any = "", **more: Any) -> gr.HTML:
    """HTML of our own: the prop `rows` is shown, the value is what a person does in it."""
    return gr.HTML(value, html_template="${rows}", rows="", elem_id=name, apply_default_css=False, **more)


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


def _data(i18n: gr.I18n) -> tuple[Any, ...]:
    _heading(i18n, "step_data", "step_data_intro")
    with gr.Row(elem_classes="pair"):
        model = gr.Dropdown(
            [], label=i18n("base_model"), info=i18n("base_model_info"), elem_id="tune-model", interactive=True,
            min_width=160,
        )  # fmt: skip
        data = gr.Dropdown(
            [], label=i18n("data_set"), info=i18n("data_set_info"), allow_custom_value=True, elem_id="tune-data",
            interactive=True, min_width=160,
        )  # fmt: skip
    upload = gr.File(label=i18n("drop"), file_types=list(SUFFIXES), height=104, elem_id="tune-upload", show_label=True)
    said = _said("data-said")
    found = _html("found", js_on_load=KEEP_OPEN)
    fetch = gr.Button(i18n("start_fetch"), elem_classes="plain", elem_id="start-fetch", visible=False)
    job = _html("data-job", js_on_load=ACT)
    # A fold of its own: what lies in a closed one of Gradio's is not there to be changed.
    columns = _html("columns", {}, js_on_load=MAP)
    leave_out = gr.Checkbox(False, label=i18n("leave_out"), elem_id="leave-out")
    return model, data, upload, found, columns, leave_out, said, fetch, job


def _settings(i18n: gr.I18n) -> Settings:
    _heading(i18n, "step_settings")
    form = _html("form", forms.defaults(), js_on_load=FILL_IN, problems={})
    with gr.Row(elem_classes="tools"):
        save = gr.Button(i18n("save_form"), size="sm", elem_classes="plain", elem_id="save-form")
        opened = gr.UploadButton(
            i18n("load_form"),  # type: ignore[arg-type]
            file_types=[".yaml", ".yml"],
            size="sm",
            elem_classes="plain",
            elem_id="load-form",
        )
        reset = gr.Button(i18n("reset_form"), size="sm", elem_classes="plain", elem_id="reset-form")
    return Settings(form, save, opened, reset, _said("form-said"), gr.JSON(visible=False))


def _dry(i18n: gr.I18n) -> Dry:
    _heading(i18n, "step_dry", "step_dry_intro")
    start = gr.Button(i18n("start_dry"), elem_classes="plain", elem_id="start-dry")
    said, job = _said("dry-said"), _html("dry-job", js_on_load=ACT)
    return Dry(start, said, job, _html("dry-result"), _console(i18n))


def _train(i18n: gr.I18n) -> Train:
    _heading(i18n, "step_train")
    start = gr.Button(i18n("start_train"), variant="primary", elem_id="start-train")
    said, job = _said("train-said"), _html("train-job", js_on_load=ACT)
    curves = _html("curves")
    with gr.Row(elem_id="plots", visible=False) as plots:
        loss, rate = (
            gr.LinePlot(
                x="step",
                y="value",
                color="curve",
                title="",
                x_title=" ",
                y_title=" ",
                color_title=" ",
                height=220,
                label=i18n(f"plot_{name}"),
                show_label=True,
                color_map={},
                min_width=240,
                buttons=[],
                elem_id=f"plot-{name}",
                tooltip="all",
                colors_in_legend=[],
            )  # fmt: skip
            for name in ("loss", "rate")
        )
    result, steps = _html("train-result", js_on_load=KEEP_OPEN), _html("train-steps", js_on_load=KEEP_OPEN)
    return Train(start, said, job, result, curves, plots, loss, rate, steps, _console(i18n), gr.State(""))


def _after(i18n: gr.I18n) -> After:
    _heading(i18n, "step_after", "step_after_intro")
    adapter = gr.Dropdown([], label=i18n("adapter_choice"), elem_id="tune-adapter", interactive=True)
    prompts = gr.Textbox(
        "\n".join(PROMPTS), label=i18n("prompts"), lines=3, max_lines=8, max_length=MOST_PROMPT_LINES,
        elem_id="tune-prompts",
    )  # fmt: skip
    checkpoints = gr.CheckboxGroup([], label=i18n("checkpoints"), elem_id="tune-checkpoints", visible=False)
    with gr.Row(elem_classes="pair"):
        tokens = gr.Textbox(
            "32", label=i18n("new_tokens"), max_lines=1, max_length=5, min_width=120, elem_id="tune-tokens"
        )
        compare = gr.Button(i18n("start_compare"), elem_classes="plain", elem_id="start-compare", min_width=160)
    said, jobs = _said("after-said"), _html("after-jobs", js_on_load=ACT)
    compare_line = _console(i18n)
    report = _html("comparison", js_on_load=KEEP_OPEN)
    save = gr.Button(i18n("save_report"), size="sm", elem_classes="plain", elem_id="save-report", visible=False)
    with gr.Row(elem_classes="pair"):
        out = gr.Textbox(
            label=i18n("merge_out"), info=i18n("merge_out_info"), max_lines=1, max_length=MOST_CHARACTERS,
            min_width=160, elem_id="merge-out",
        )  # fmt: skip
        merge = gr.Button(i18n("start_merge"), elem_classes="plain", elem_id="start-merge", min_width=120)
    merge_said = _said("merge-said")
    formats = gr.CheckboxGroup(
        [name for name, row in FORMATS.items() if row.quantized], label=i18n("merge_formats"), elem_id="merge-formats"
    )
    merge_line = _console(i18n)
    proof = _html("proof", js_on_load=KEEP_OPEN)
    chat = gr.Button(i18n("chat_with"), size="sm", elem_classes="plain", elem_id="chat-adapter", interactive=False)
    return After(
        adapter, prompts, checkpoints, tokens, compare, compare_line, report, save, out, formats, merge, merge_line,
        proof, chat, said, merge_said, jobs,
    )  # fmt: skip


def words_of(value: str) -> str:
    """A field's text; empty where a script left it out."""
    return value if isinstance(value, str) else ""
