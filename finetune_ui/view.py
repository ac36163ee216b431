"""How data, tokens, settings and runs look. Pure HTML.

Promises that nothing a file or a visitor wrote reaches the page's own markup unescaped. Knows nothing of Gradio.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import PurePath
from typing import Any

from finetune_ui import forms
from finetune_ui.words import WORDS
from nibble.data.forms import FORMS
from nibble.jobs.progress import duration, size
from nibble.lowbit.formats import FORMATS
from parts import view
from parts.joblist import STATES
from parts.view import NOTHING, table

Plain = Mapping[str, Any]

MOST_STEPS = 200
"""Rows of the table of steps: the latest."""


class Say(view.Say):
    """The words of this tab in one language, escaped for HTML."""

    words = view.Say.words | WORDS


def small(text: str) -> str:
    """A quiet line; ready HTML."""
    return f"<p class='small'>{text}</p>"


# The data set.


def found(report: Plain, say: Say) -> str:
    """What a data set was recognised as, how much it holds, what is wrong with it, and its first rows."""
    known = report["detection"]
    parts = [f"<p class='why'>{_recognised(known, say)}</p>"] if known else []
    if report["rows"]:
        key = "counted" if report["complete"] else "counted_part"
        parts.append(small(say(key, **{name: report[name] for name in ("rows", "usable", "characters")})))
    if not report["ok"]:
        parts.append(f"<p class='wrong'>{say('refused_data')}</p>")
    parts.append(problems(report["problems"]))
    if report["first"] and any(report["first"]):
        parts.append(_first_rows(report, say))
    return "".join(parts)


def _recognised(known: Plain, say: Say) -> str:
    if say.language == "en":
        return escape(known["why"])
    columns = "、".join(known["columns"].values())
    return escape(say.plain("recognised", form=say.plain(f"form_{known['form']}"), columns=columns))


def problems(found: Sequence[Plain]) -> str:
    """What is wrong with a data set, what refuses it first."""
    lines = [
        f"<li class='{'wrong' if problem['fatal'] else 'small'}'>{escape(problem['sentence'])}</li>"
        for problem in sorted(found, key=lambda problem: not problem["fatal"])
    ]
    return f"<ul class='problems'>{''.join(lines)}</ul>" if lines else ""


def _first_rows(report: Plain, say: Say) -> str:
    used = set(report["detection"]["columns"].values()) if report["detection"] else set()
    items = []
    for row in report["first"]:
        cells = "".join(
            f"<div{'' if name in used else ' class=unused'}><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
            for name, value in row.items()
        )
        items.append(f"<dl>{cells}</dl>")
    fold = "<details data-fold='rows'><summary>{}</summary>{}</details>"
    return fold.format(say("first_rows"), "".join(items))


def mapper(report: Plain, say: Say) -> str:
    """The form of a data set and the column of each of its fields, each to be chosen; empty without columns."""
    known = report["detection"] or {"form": "", "columns": {}, "given": False}
    names = known.get("found") or list(dict.fromkeys(name for row in report["first"] for name in row))
    if not names:
        return ""
    options = [f"<option value=''>{say('as_found')}</option>"]
    options += [f"<option value='{name}'>{say(f'form_{name}')}</option>" for name in FORMS]
    head = f"<label class='field'><b>{say('form_kind')}</b><select data-form>{''.join(options)}</select></label>"
    columns = "".join(f"<option>{escape(name)}</option>" for name in names)
    rows = [
        f"<label class='field' data-of='{form.name}' hidden><b>{field}</b><select data-column='{field}'>"
        + ("" if field in form.needs else f"<option value=''>{say('no_column')}</option>")
        + f"{columns}</select></label>"
        for form in FORMS.values()
        for field in (*form.needs, *form.may)
    ]
    now = escape(json.dumps({key: known[key] for key in ("form", "columns", "given")}))
    fields = f"<div class='fields' data-now='{now}'>{head}{''.join(rows)}</div>"
    fold = "<details>" if known["form"] else "<details open>"
    return f"{fold}<summary>{say('columns_fold')}</summary>{fields}</details>"


# What is trained.


def trained(seen: Plain, say: Say) -> str:
    """The samples, their tokens marked by whether they are trained on, and what to know of all of them."""
    if seen["model_problem"]:
        return f"<p class='wrong'>{escape(seen['model_problem'])}</p>"
    parts = [] if seen["ok"] else [problems([problem for problem in seen["problems"] if problem["fatal"]])]
    parts += [
        f"<p class='legend'><span class='t'>{say('mark_trained')}</span><span>{say('mark_read')}</span></p>",
        *(_sample(sample, seen["unit"], say) for sample in seen["samples"]),
    ]
    if seen["tokens"]:
        parts.append(small(say("counted_tokens", tokens=seen["tokens"], trained=seen["trained_tokens"] or 0)))
        key = "truncated" if seen["truncated"] else "truncated_none"
        parts.append(small(say(key, share=100 * seen["truncated_share"], length=seen["max_length"])))
    return "".join([*parts, *(small(escape(note)) for note in seen["notes"])])


def _sample(sample: Plain, unit: str, say: Say) -> str:
    head = say(
        "sample_head", unit=say.plain(f"unit_{unit}"), row=sample["row"], trained=sample["trained"],
        tokens=sample["tokens"],
    )  # fmt: skip
    tokens = "".join(
        f"<span{' class=t' if piece['trained'] else ''}>{_visible(piece['text'])}</span>" for piece in sample["pieces"]
    ) + ("<span>…</span>" if sample.get("cut") else "")
    checks = [_check("ends_well", say) if sample["ends"] else _check(_end(sample), say, wrong=True)]
    if sample["begins"] > 1:
        checks.append(_check("begins_twice", say, wrong=True, count=sample["begins"]))
    elif sample["begins"] == 1:
        checks.append(_check("begins_well", say))
    return f"<article class='sample'><h5>{head}</h5><div class='tokens'>{tokens}</div>{''.join(checks)}</article>"


def _end(sample: Plain) -> str:
    return "ends_cut" if sample["truncated"] else "ends_not"


def _check(key: str, say: Say, *, wrong: bool = False, **values: object) -> str:
    return f"<p class='check {'bad' if wrong else 'good'}'>{say(key, **values)}</p>"


def _visible(text: str) -> str:
    """A piece as it is read; a line's end is shown, and taken."""
    return escape(text).replace("\n", "<i>↵</i>\n") if text.strip("\n") or "\n" in text else escape(text)


# The form.


def form(say: Say) -> str:
    """Every setting with its field: those that matter, and the rest folded."""
    groups = "".join(
        f"<h5>{say(group)}</h5><div class='fields'>{''.join(_field(name, say) for name in names)}</div>"
        for group, names in forms.GROUPS.items()
    )
    return (
        f"<div class='fields simple'>{''.join(_field(name, say) for name in forms.SIMPLE)}</div>"
        f"<details class='more' data-fold='more'><summary>{say('more_settings')}</summary>{groups}</details>"
    )


def _field(name: str, say: Say) -> str:
    usual = forms.default(name)
    choices = forms.FIELDS[name].metadata["choices"] or (
        [form for form, row in FORMATS.items() if row.quantized] if name == "low_bit" else ()
    )
    box = f"id='set-{name}' data-field='{name}'"
    if isinstance(usual, bool):
        control = f"<input type='checkbox' {box}>"
    elif choices:
        options = (
            f"<option value='{escape(choice)}'>{escape(choice) or say('automatic')}</option>" for choice in choices
        )
        control = f"<select {box}>{''.join(options)}</select>"
    else:
        keys = "decimal" if isinstance(usual, (int, float)) else "text"
        control = f"<input type='text' inputmode='{keys}' maxlength='1000' autocomplete='off' {box}>"
    told = f"<b>{say(f'f_{name}')}</b>"
    prose = f"<small>{say(f'p_{name}')}</small>"
    kind = "field tick" if isinstance(usual, bool) else "field"
    return f"<label class='{kind}'>{told}{control}{prose}<em data-problem='{name}' role='alert'></em></label>"


# Dry run.


def dry(job: Plain, *, changed: bool, say: Say) -> str:
    """What a dry run measured."""
    result = job["result"] or {}
    if job["state"] != "done":
        return ""
    verdict = _check("dry_fits", say) if result["fits"] else _check("dry_not", say, wrong=True)
    whole = say.plain
    pairs = [
        ("dry_step", duration(result["seconds_per_step"]) if result["seconds_per_step"] >= 10 else
         f"{result['seconds_per_step']:.2f} s"),
        ("dry_total", duration(result["total_s"])),
        ("dry_memory", size(result["peak_memory_bytes"])),
        ("dry_free", size(result["free_memory_bytes"]) if result.get("free_memory_bytes") else ""),
        ("dry_samples", f"{result['samples']:,}"),
        ("dry_tokens", f"{result['trained_tokens']:,}"),
        ("dry_weights", whole("dry_of", part=f"{result['trainable_parameters']:,}",
                              whole=f"{result['parameters']:,}")),
        ("dry_cut", f"{100 * result['truncated_share']:.1f} %"),
    ]  # fmt: skip
    note = small(say("dry_changed")) if changed else ""
    return f"{verdict}{note}{facts(pairs, say)}{_notes(result, say)}"


def _notes(result: Plain, say: Say) -> str:
    """What a job has told besides, folded."""
    lines = "".join(small(escape(str(note))) for note in result.get("notes") or ())
    return f"<details data-fold='notes'><summary>{say('notes')}</summary>{lines}</details>" if lines else ""


def facts(pairs: Sequence[tuple[str, str]], say: Say) -> str:
    """Words and what they mean here; what is empty is left out. Values are escaped here."""
    items = "".join(f"<div><dt>{say(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in pairs if value)
    return f"<dl class='facts'>{items}</dl>" if items else ""


# Runs.


def base_name(job: Plain) -> str:
    """The base of a run, without a path's folders."""
    name = str(job["spec"].get("model") or "")
    return PurePath(name).name if job["spec"].get("paths") else name


def runs(jobs: Sequence[Plain], chosen: str, say: Say) -> str:
    """The trainings, each with a button to choose it."""
    if not jobs:
        return small(say("no_runs"))
    return "".join(_run(job, chosen, say) for job in jobs)


def _run(job: Plain, chosen: str, say: Say) -> str:
    spec, result = job["spec"], job["result"] or {}
    began = time.strftime("%m-%d %H:%M", time.localtime(job["started"] or job["created"]))
    picked = "true" if job["id"] == chosen else "false"
    name = escape(str(result.get("name") or spec.get("out") or base_name(job)))
    model, data = base_name(job), str(spec.get("data") or "")
    state = say(STATES.get(job["state"]) or job["state"])
    share = job["progress"]["done"] / job["progress"]["total"] if job["progress"]["total"] else 0.0
    if job["state"] == "running" and share:
        state = f"{state} {100 * share:.0f} %"
    fell = _arrow(result.get("loss_first"), result.get("loss_last"))
    facts = " · ".join(escape(part) for part in (f"{model} ← {data}", fell) if part)
    return (
        f"<button type='button' class='run {escape(job['state'])}' data-name='{escape(job['id'])}' "
        f"aria-pressed='{picked}'><span class='state'>{state}</span><time>{began}</time><b>{name}</b>"
        f"<small>{facts}</small></button>"
    )


def _arrow(before: float | None, after: float | None) -> str:
    return f"{before:.2f} → {after:.2f}" if before is not None and after is not None else ""


def result(job: Plain, say: Say) -> str:
    """What a run has come to."""
    known = job["result"] or {}

    def fell(before: float | None, after: float | None) -> str:
        if before is None or after is None or not before:
            return ""
        return say.plain(
            "fact_fell", before=f"{before:.3f}", after=f"{after:.3f}", change=100 * (after - before) / before
        )

    name, done = str(known.get("name") or ""), job["progress"]
    if not name and job["state"] == "stopped" and done["unit"] == "step" and done["done"]:
        name = say.plain("fact_partial", name=job["spec"].get("out") or "", steps=int(done["done"]))
    pairs = [
        ("fact_loss", fell(known.get("loss_first"), known.get("loss_last"))),
        ("fact_eval", fell(known.get("eval_loss_before"), known.get("eval_loss"))),
        ("fact_step", f"{known['seconds_per_step']:.2f} s" if known.get("seconds_per_step") else ""),
        ("fact_memory", size(known["peak_memory_bytes"]) if known.get("peak_memory_bytes") else ""),
        ("fact_adapter", name),
    ]
    return facts(pairs, say) + _notes(known, say)


def legend(names: Sequence[str], say: Say) -> str:
    """Which colour is which curve; nothing where there is but one."""
    marks = "".join(f"<span class='c{place}'>{escape(name)}</span>" for place, name in enumerate(names))
    return f"<p class='curves'>{marks}</p>" if len(names) > 1 else ""


def steps(rows: Sequence[Plain], say: Say) -> str:
    """The table of steps, folded; the latest first. Empty without rows."""
    if not rows:
        return ""
    lines = [
        f"<tr><th scope='row'>{row['step']:,.0f}</th><td>{_number(row.get('loss'), '.4f')}</td>"
        f"<td>{_number(row.get('eval_loss'), '.4f')}</td><td>{_number(row.get('learning_rate'), '.2e')}</td>"
        f"<td>{_number(row.get('epoch'), '.2f')}</td></tr>"
        for row in list(rows)[: -MOST_STEPS - 1 : -1]
    ]
    head = [say(f"th_{key}") for key in ("step", "loss", "eval", "rate", "epoch")]
    return (
        f"<details data-fold='steps'><summary>{say('steps_table')}</summary>"
        f"<div class='wide'>{table(head, lines, 'steps')}</div></details>"
    )


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else NOTHING
