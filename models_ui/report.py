"""The report on what a model lost in low bit: its table, its chart, its worst layers. Pure HTML and SVG.

Promises that nothing of a file reaches the page unescaped. Knows nothing of Gradio, nor of how it was measured: the
form is that of `nibble.quality.measure`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from models_ui.view import Say, speed
from models_ui.words import WORDS
from nibble.jobs.progress import size
from parts.view import NOTHING, nats, table

Plain = Mapping[str, Any]

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 96, 14, 34
"""Of the chart, in its own units: it is as wide as its card. The names of the rightmost points need room."""

LINE, LETTER, POINT = 13, 6.4, 9
"""Height of a name in the chart, width of one of its letters, and how near a name may come to a point."""


def report(known: Plain, chosen: str, say: Say) -> str:
    """The whole report; says so where nothing was measured yet.

    Args:
        known: as `Operator.report` gives it; may be empty.
        chosen: name of the model that it is about; its rows are marked among those of its kin.
        say: the words.
    """
    rows = list(known.get("formats", ()))
    if not rows:
        return f"<h5>{say('report')}</h5><p class='small'>{say('no_report')}</p>"
    text = known["text"]
    name = WORDS.say("shipped", say.language) if text["name"] == "shipped" else text["name"]
    under = say("report_of", tokens=text["tokens"], text=name, device=known["device"])
    rows.sort(key=lambda row: (row.get("size_bytes") or 0, row.get("kl_mean") or 0))
    own = [row for row in rows if row.get("name") == chosen]
    mark = chosen if len(own) < len(rows) else ""
    lines = [_row(row, say, marked=row.get("name") == mark) for row in rows]
    lines += [_row(known["reference"], say, reference=True)] if known.get("reference") else []
    keys = ("format", "perplexity", "kl", "kl95", "top1", "size", "speed")
    figures = table([say(f"th_{key}") for key in keys], lines, "quality")
    parts = [f"<h5>{say('report')}</h5><div class='wide'>{figures}</div><p class='small'>{under}</p>"]
    return "".join([*parts, chart(rows, mark, say), worst(own or rows, say)])


def _row(row: Plain, say: Say, *, reference: bool = False, marked: bool = False) -> str:
    name = escape(row["format"]) + (f"<small>{say('reference')}</small>" if reference else "")
    top1 = row.get("top1")
    perplexity = row.get("perplexity")
    cells = [
        f"{perplexity:,.3f}" if perplexity is not None else NOTHING,
        NOTHING if reference else nats(row.get("kl_mean")),
        NOTHING if reference else nats(row.get("kl_p95")),
        NOTHING if reference or top1 is None else f"{100 * top1:.1f} %",
        size(row["size_bytes"]) if row.get("size_bytes") else NOTHING,
        speed(row.get("tokens_per_s")),
    ]
    mark = " class='chosen'" if marked else ""
    return f"<tr{mark}><th scope='row'>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def worst(rows: Sequence[Plain], say: Say) -> str:
    """The layers with the largest error of each format, folded."""
    parts = []
    for row in rows:
        lines = [
            f"<tr><th scope='row'>{escape(layer['name'])}</th><td>{100 * layer['error']:.2f} %</td></tr>"
            for layer in row.get("layers") or ()
        ]
        if lines:
            parts.append(table([escape(row["format"]), say("th_error")], lines, "layers"))
    return f"<details><summary>{say('worst')}</summary>{''.join(parts)}</details>" if parts else ""


@dataclass(frozen=True)
class Point:
    """A format in the chart, in its units."""

    name: str
    x: float
    y: float
    told: str
    marked: bool


def chart(rows: Sequence[Plain], chosen: str, say: Say) -> str:
    """Size against KL, one point for each format; the loss by its logarithm. Empty for fewer than two formats."""
    kept = [row for row in rows if row.get("size_bytes") and (row.get("kl_mean") or 0) > 0]
    if len(kept) < 2:
        return ""
    sizes = [row["size_bytes"] for row in kept]
    losses = [math.log10(row["kl_mean"]) for row in kept]
    low, high = math.floor(min(losses)), math.ceil(max(losses))
    high = max(high, low + 1)
    least, most = 0.95 * min(sizes), 1.02 * max(sizes)
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(value: float) -> float:
        return LEFT + across * (value - least) / (most - least)

    def y(value: float) -> float:
        return TOP + down * (high - value) / (high - low)

    grid = "".join(
        f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y(power):.1f}' y2='{y(power):.1f}'/>"
        f"<text x='{LEFT - 6}' y='{y(power) + 4:.1f}' text-anchor='end'>{10.0**power:.{max(0, -power)}f}</text>"
        for power in range(low, high + 1)
    )
    marks = (least + share * (most - least) for share in (0, 0.5, 1))
    grid += "".join(
        f"<text x='{x(mark):.1f}' y='{HEIGHT - 16}' text-anchor='middle'>{size(mark)}</text>" for mark in marks
    )
    grid += f"<text x='{WIDTH - RIGHT}' y='{HEIGHT - 2}' text-anchor='end'>{say('th_size')}</text>"
    grid += f"<text x='{LEFT - 44}' y='{TOP - 4}'>KL</text>"
    points = [
        Point(
            row["format"],
            x(row["size_bytes"]),
            y(loss),
            f"{size(row['size_bytes'])}, KL {nats(row['kl_mean'])}",
            row.get("name") == chosen,
        )  # fmt: skip
        for row, loss in zip(kept, losses, strict=True)
    ]
    drawn = "".join(_point(point, line) for point, line in zip(points, _lines(points), strict=True))
    return (
        f"<figure><figcaption>{say('chart')}</figcaption><svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' "
        f"aria-label='{say('chart')}'>{grid}{drawn}</svg></figure>"
    )


def _point(point: Point, line: float) -> str:
    lead = f"<line class='lead' x1='{point.x:.1f}' y1='{point.y:.1f}' x2='{point.x + 10:.1f}' y2='{line:.1f}'/>"
    mark = " class='chosen'" if point.marked else ""
    return (
        f"<g{mark}><title>{escape(point.name)}: {escape(point.told)}</title>{lead}"
        f"<circle cx='{point.x:.1f}' cy='{point.y:.1f}' r='4'/>"
        f"<text class='name' x='{point.x + 12:.1f}' y='{line + 4:.1f}'>{escape(point.name)}</text></g>"
    )


def _lines(points: Sequence[Point]) -> list[float]:
    """Where each point's name stands: as near to it as the other names and points leave room."""
    taken = [(point.x - 5, point.x + 5, point.y, POINT) for point in points]
    lines = dict.fromkeys(range(len(points)), 0.0)
    for number in sorted(lines, key=lambda number: points[number].y):
        point = points[number]
        left, right = point.x + 10, point.x + 12 + LETTER * len(point.name)
        near = (point.y + sign * LINE * step for step in range(2 * len(points)) for sign in (1, -1))
        lines[number] = next(
            (y for y in near if not any(a < right and left < b and abs(y - z) < gap for a, b, z, gap in taken)), point.y
        )
        taken.append((left, right, lines[number], LINE))
    return list(lines.values())
