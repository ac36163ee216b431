"""How models and formats look: the table of formats, the library, what is known of one model. Pure HTML.

Promises that nothing a file or a visitor wrote reaches the page's own markup unescaped. Knows nothing of Gradio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from models_ui.words import WORDS
from nibble.jobs.progress import size
from nibble.lowbit.formats import FORMATS
from parts import view
from parts.view import NOTHING, nats, table

Plain = Mapping[str, Any]

ADAPTER = "adapter:"
"""Before an adapter's name, where the page must know it from a model's: no name holds a colon."""

STORED = ""
"""The choice "as it is stored", among names of formats."""


KINDS = {"adapter": "adapter", "source": "to_shrink"}
"""Kind of a folder -> the key of what is said of it; nothing is said of a model."""


class Say(view.Say):
    """The words of this tab in one language, escaped for HTML."""

    words = view.Say.words | WORDS


def count(number: float) -> str:
    """How many parameters, for a person: `5.2 M`."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def speed(tokens_per_s: float | None) -> str:
    """Tokens a second, for a person."""
    if not tokens_per_s:
        return NOTHING
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 10 else f"{tokens_per_s:.1f}"


def formats(estimates: Sequence[Plain], report: Plain, say: Say, *, source: bool = False, note: str = "") -> str:
    """The table of formats, each with a box to choose it.

    Args:
        estimates: one for each format; none where the model is not here yet.
        report: what is known of the model's quality; may be empty.
        say: the words.
        source: whether the model can be converted as it is stored.
        note: the key of a sentence under the table.
    """
    known = {row["format"]: row for row in estimates}
    # A model of mixed bits says nothing of the format alone.
    lost = {row["format"]: row for row in report.get("formats", ()) if not row.get("overrides")}
    names = [name for name, row in FORMATS.items() if row.quantized]
    rows = [_stored(say)] if source else []
    rows += [_format(name, known.get(name, {}), lost.get(name, {}), say) for name in names]
    head = ["", *(say(f"th_{key}") for key in ("format", "disk", "memory", "speed", "lost"))]
    below = say(note or ("legend" if estimates else "not_here"))
    return table(head, rows, "formats") + f"<p class='small'>{below}</p>"


def _box(name: str, label: str) -> str:
    return f"<td><input type='checkbox' value='{escape(name)}' aria-label='{label}'></td>"


def _stored(say: Say) -> str:
    return f"<tr>{_box(STORED, say('as_stored'))}<th scope='row' colspan='5'>{say('as_stored')}</th></tr>"


def _format(name: str, estimate: Plain, lost: Plain, say: Say) -> str:
    bits = say("bits", value=FORMATS[name].bits_per_weight)
    cells = [f"<th scope='row' title='{bits}'>{escape(name)}</th>"]
    if estimate:
        mark = "fits" if estimate["fits"] else "too_large"
        peak = say("peak", peak=size(estimate["peak_bytes"]))
        memory = f"<i class='{mark}'></i>{size(estimate['steady_bytes'])}"
        cells += [f"<td>{size(estimate['disk_bytes'])}</td>"]
        cells += [f"<td title='{peak} {say(mark)}'>{memory}</td>", f"<td>{speed(estimate['tokens_per_s'])}</td>"]
    else:
        mark = ""
        cells += [f"<td>{NOTHING}</td>"] * 3
    cells.append(f"<td>{nats(lost.get('kl_mean'))}</td>")
    return f"<tr class='{mark}'>{_box(name, escape(name))}{''.join(cells)}</tr>"


def key(model: Plain) -> str:
    """What the page calls a model or an adapter: a model its name, and an adapter, which may have the same, more."""
    return f"{ADAPTER}{model['name']}" if model["kind"] == "adapter" else str(model["name"])


def named(chosen: str) -> tuple[str, str]:
    """The name and the kind behind a `key`."""
    name = chosen.removeprefix(ADAPTER)
    return name, "model" if name == chosen else "adapter"


def library(models: Sequence[Plain], chosen: str, say: Say) -> str:
    """The models that are here, each with a button to choose it.

    Args:
        models: as `Operator.shelf` gives them.
        chosen: `key` of the one that is chosen; empty is none.
        say: the words.
    """
    head = [say(f"th_{key}") for key in ("model", "size", "lost", "memory", "speed")]
    return table(head, (_model(model, chosen, say) for model in models), "library")


def _model(model: Plain, chosen: str, say: Say) -> str:
    name = escape(model["name"])
    if model["problem"]:
        facts = say("cannot")
    else:
        parts = [model["family"], count(model["parameters"]) if model["parameters"] else "", model["format"]]
        kind = KINDS.get(model["kind"])
        facts = " · ".join([escape(part) for part in parts if part] + ([say(kind)] if kind else []))
    loaded = f"<em>{say('is_in')}</em>" if model["loaded"] else ""
    estimate, quality = model.get("estimate") or {}, model.get("quality") or {}
    picked = "true" if key(model) == chosen else "false"
    button = f"<button type='button' data-name='{escape(key(model))}' aria-pressed='{picked}'>{name}</button>"
    memory = size(estimate["steady_bytes"]) if estimate else NOTHING
    cells = [
        f"<th scope='row'>{button}{loaded}<small>{facts}</small></th>",
        f"<td>{size(model['size_bytes']) if model['size_bytes'] else NOTHING}</td>",
        f"<td>{nats(quality.get('kl_mean'))}</td>",
        f"<td>{memory}</td>",
        f"<td>{speed(estimate.get('tokens_per_s'))}</td>",
    ]
    marks = ("chosen" if model["name"] == chosen else "") + (" broken" if model["problem"] else "")
    return f"<tr class='{marks.strip()}'>{''.join(cells)}</tr>"


def facts(model: Plain, say: Say) -> str:
    """What is known of one model, as a list of words and what they mean here."""
    if model["problem"]:
        return f"<p class='wrong'>{escape(model['problem'])}</p>"
    pairs = [
        ("family", escape(model["family"])),
        ("parameters", count(model["parameters"]) if model["parameters"] else ""),
        ("th_format", escape(model["format"])),
        ("context_length", say("context_tokens", value=model["context"]) if model["context"] else ""),
        ("chat_template", say("template_own" if model["template"] else "template_family")),
        ("base", escape(model["base"])),
    ]
    if model["kind"] == "adapter":
        pairs = [pair for pair in pairs if pair[0] != "chat_template"]
    estimate = model.get("estimate")
    if estimate:
        line = say(
            "estimated_line", memory=size(estimate["steady_bytes"]), speed=speed(estimate["tokens_per_s"]),
            format=estimate["format"],
        )  # fmt: skip
        pairs.append(("estimated", line))
    items = "".join(f"<div><dt>{say(key)}</dt><dd>{value}</dd></div>" for key, value in pairs if value)
    note = f"<p class='small'>{escape(model['note'])}</p>" if model["note"] else ""
    return f"<h4>{escape(model['name'])}</h4><dl>{items}</dl>{note}"
