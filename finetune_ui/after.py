"""What comes after a training: the comparison side by side, and the proof of a merge. Pure HTML.

Promises that what a model said is shown as text and never obeyed. Knows nothing of Gradio; the forms are those of
`nibble.tasks.compare` and `nibble.tasks.merge`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from finetune_ui.view import Say, small
from nibble.jobs.progress import size
from parts.view import NOTHING, nats, table

Plain = Mapping[str, Any]


def checkpoints(run: Plain | None) -> list[int]:
    """Steps of the checkpoints that a run has left."""
    kept = ((run or {}).get("result") or {}).get("checkpoints") or ()
    return [int(each["step"]) for each in kept if isinstance(each, Mapping) and "step" in each]


def report(found: Plain, say: Say) -> str:
    """A comparison: the figures of each subject, then each prompt with the answers side by side."""
    subjects = list(found.get("subjects") or ())
    if not subjects:
        return ""
    head = [say(f"th_{key}") for key in ("subject", "heldout", "forgot", "perplexity_short")]
    figures = table(head, (_figures(subject, say) for subject in subjects), "compared")
    held = found.get("heldout") or {}
    under = str(held.get("why") or "") if not held.get("samples") else say.plain(
        "heldout_of", samples=held["samples"], data=held.get("data", "")
    )  # fmt: skip
    prompts = "".join(_prompt(place, str(prompt), subjects, say) for place, prompt in enumerate(found["prompts"]))
    told = small(say("compared_of", name=found.get("adapter") or found.get("run") or "", base=found.get("base", "")))
    return (
        f"{told}<div class='wide'>{figures}</div>{small(escape(under))}{small(say('forgot_of'))}"
        f"{small(escape(str(found.get('chat_why') or '')))}{prompts}"
    )


def _figures(subject: Plain, say: Say) -> str:
    cells = [
        _number(subject.get("loss"), ".4f"), nats(subject.get("kl_mean")),
        _number(subject.get("perplexity"), ",.2f"),
    ]  # fmt: skip
    return f"<tr><th scope='row'>{_called(subject, say)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _called(subject: Plain, say: Say) -> str:
    name = str(subject.get("name"))
    if subject.get("step") is not None:
        return say("subject_step", step=subject["step"])
    return say(f"subject_{name}") if name in ("base", "tuned") else escape(name)


def _prompt(place: int, prompt: str, subjects: Sequence[Plain], say: Say) -> str:
    cells = []
    base = str(subjects[0]["answers"][place]["text"])
    for subject in subjects:
        answer = subject["answers"][place]
        same = subject is not subjects[0] and answer["text"] == base
        more = "" if answer.get("finish_reason") == "stop" else "<i>…</i>"
        note = f"<small>{say('same_as_base')}</small>" if same else ""
        cells.append(
            f"<div><h6>{_called(subject, say)}</h6><p>{escape(str(answer['text']).strip())}{more}</p>{note}</div>"
        )
    return f"<section class='prompt'><h5>{escape(prompt)}</h5><div class='answers'>{''.join(cells)}</div></section>"


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else NOTHING


def proof(job: Plain, say: Say) -> str:
    """What a merge has proven of itself: each sentence, and the models that it made."""
    result = job["result"] or {}
    told = result.get("report") or {}
    low_bit = [line for row in told.get("low_bit") or () for line in row.get("sentences") or ()]
    notes = list(told.get("notes") or ())
    lines = [line for line in told.get("sentences") or () if line not in notes and line not in low_bit]
    parts = [f"<h5>{say('proven', name=result.get('name', ''))}</h5>"]
    parts += [f"<p class='check good'>{escape(str(line))}</p>" for line in lines]
    parts += [small(escape(str(line))) for line in (*low_bit, *notes)]
    rows = [
        f"<tr><th scope='row'>{escape(str(model['name']))}</th><td>{escape(str(model.get('format', '')))}</td>"
        f"<td>{size(model['bytes']) if model.get('bytes') else NOTHING}</td></tr>"
        for model in result.get("models") or ()
    ]
    head = [say("th_subject"), say("th_form"), say("th_bytes")]
    return "".join(parts) + (f"<div class='wide'>{table(head, rows, 'made')}</div>" if rows else "")
