"""How jobs look: what each does, how far it is, its log and the equal command, and what can be done to it. Pure HTML.

Promises that a log is shown and never obeyed. Knows nothing of Gradio and of how jobs run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import PurePath
from typing import Any

from nibble.jobs import LIVE
from nibble.jobs.progress import duration, size
from nibble.words import Language
from parts.console import SUBJECT, command
from parts.view import Say
from parts.words import WORDS

Plain = Mapping[str, Any]

STATES = {"failed": "failed_job", "stopped": "stopped_job"}
"""State -> the key of its word, where it is not the state itself."""


MAKERS = ("quantize", "download", "merge")
"""Tasks that make models."""

SLOWEST = 0.05
"""Units a second: below it, a speed would read 0.0."""


def title(job: Plain, language: Language) -> str:
    """What a job does, in a few words; not escaped."""
    spec, task = job["spec"], job["task"]
    what = str(spec.get(SUBJECT.get(task, "model")) or spec.get("run") or "")
    what = PurePath(what).name if spec.get("paths") else what
    if task == "finetune":
        key = "job_dry" if spec.get("dry_run") else "job_finetune"
        return WORDS.say(
            key,
            language,
            what=what,
            data=spec.get("data", ""),
            name=spec.get("out") or (job["result"] or {}).get("name", ""),
        )
    empty = "picked_format" if spec.get("pick") else "own_format"
    chosen = ", ".join(spec.get("low_bit") or ()) or WORDS.say(empty, language)
    key = f"job_{task}" if task in SUBJECT else "job_other"
    return WORDS.say(key, language, what=what, formats=chosen, task=task)


def joblist(jobs: Sequence[Plain], unfolded: str, log: str, say: Say) -> str:
    """All jobs, newest first.

    Args:
        jobs: as `Operator.jobs` gives them.
        unfolded: id of the job whose log is shown; empty is none.
        log: the end of that log.
        say: the words.
    """
    if not jobs:
        return f"<p class='small'>{say('no_jobs')}</p>"
    return "".join(_job(job, log if job["id"] == unfolded else None, say) for job in jobs)


def _job(job: Plain, log: str | None, say: Say) -> str:
    state = job["state"]
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(job["started"] or job["created"]))
    name = escape(title(job, say.language))
    head = (
        f"<div class='head'><span class='state'>{say(STATES.get(state) or state)}</span><b>{name}</b>"
        f"<time>{began}</time><span class='acts'>{_acts(job, log is not None, say)}</span></div>"
    )
    parts = [head, _progress(job, say)]
    if job["note"]:
        parts.append(f"<p class='small'>{escape(job['note'])}</p>")
    if job["cause"]:
        parts.append(f"<p class='{'wrong' if state in ('failed', 'killed') else 'small'}'>{escape(job['cause'])}</p>")
    if log is not None:
        line = command(job["task"], job["spec"])
        parts.append(f"<pre class='command'>{escape(line)}</pre>" if line else "")
        parts.append(f"<pre class='log'>{escape(log) or say('no_log')}</pre>")
    return f"<article class='job {escape(state)}' data-id='{escape(job['id'])}'>{''.join(parts)}</article>"


def _acts(job: Plain, unfolded: bool, say: Say) -> str:
    buttons = []
    for name in made(job):
        buttons.append(_button("load", name, say("do_load", what=name)))
    if job["state"] in LIVE:
        buttons.append(_button("stop", job["id"], say("do_stop")))
    elif job["state"] != "done" and job["task"] and not job["spec"].get("dry_run"):
        buttons.append(_button("resume", job["id"], say("do_resume")))
    buttons.append(_button("log", job["id"], say("do_log"), pressed=unfolded))
    return "".join(buttons)


def _button(act: str, subject: str, label: str, *, pressed: bool = False) -> str:
    mark = " aria-pressed='true'" if pressed else ""
    return f"<button type='button' data-act='{act}' data-subject='{escape(subject)}'{mark}>{label}</button>"


def made(job: Plain) -> list[str]:
    """Names of the models that a job has made and that can be loaded."""
    result = job["result"] or {}
    if job["state"] != "done":
        return []
    # A GGUF file alone is a source: it is shrunk before it is loaded.
    spec = job["spec"]
    found = [] if spec.get("file") or spec.get("dataset") or job["task"] == "quantize" else [result]
    found += result.get("models") or []
    names = (str(model["name"]) for model in found if job["task"] in MAKERS and model.get("name"))
    return list(dict.fromkeys(names))


def _progress(job: Plain, say: Say) -> str:
    """The bar with its line while a job lives; once it is done, how long it took."""
    if job["state"] not in LIVE:
        took = f"<p class='small'>{say('took', value=duration(job['elapsed_s']))}</p>"
        return took if job["state"] == "done" else ""
    progress = job["progress"]
    total = progress["total"]
    share = progress["done"] / total if total else None
    kind, width = ("bar", 100 * share) if share is not None else ("bar unknown", 100.0)
    bar = f"<div class='{kind}'><i style='width:{width:.1f}%'></i></div>"
    return f"{bar}<p class='small'>{_line(progress, share, say)}</p>"


def _line(progress: Plain, share: float | None, say: Say) -> str:
    """`downloading 12 MB/40 MB · 30 % · 4 MB/s · 7 s left`, in the visitor's language."""
    stage, unit = (
        WORDS.say(f"{kind}_{progress[kind]}", say.language) if f"{kind}_{progress[kind]}" in KEYS else progress[kind]
        for kind in ("stage", "unit")
    )
    parts = [stage]
    bytes_ = unit == "B"
    if progress["total"]:
        done, total = (size(progress[key]) if bytes_ else f"{progress[key]:,.0f}" for key in ("done", "total"))
        parts[0] = f"{parts[0]} {done}/{total} {'' if bytes_ else unit}".strip()
    if share is not None:
        parts.append(f"{100 * share:.0f} %")
    if progress["speed"] >= SLOWEST:
        parts.append(f"{size(progress['speed'])}/s" if bytes_ else f"{progress['speed']:,.1f} {unit}/s")
    if progress["seconds_left"] is not None:
        parts.append(WORDS.say("left", say.language, value=duration(progress["seconds_left"])))
    return escape(" · ".join(part for part in parts if part))


KEYS = WORDS.of("en")
