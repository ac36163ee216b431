"""A quality report as lines of text, for the console. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("format", "format", str),
    ("bits", "bits_per_weight", "{:.2f}".format),
    ("size", "size_bytes", lambda value: f"{value / 1e6:,.1f} MB"),
    ("perplexity", "perplexity", "{:.3f}".format),
    ("KL mean", "kl_mean", "{:.5f}".format),
    ("KL p95", "kl_p95", "{:.5f}".format),
    ("top-1", "top1", lambda value: f"{100 * value:.2f} %"),
    ("tok/s", "tokens_per_s", "{:,.1f}".format),
    ("peak", "peak_bytes", lambda value: f"{value / 1e6:,.0f} MB"),
    ("steady", "steady_bytes", lambda value: f"{value / 1e6:,.0f} MB"),
    ("load", "load_s", "{:.2f} s".format),
)
"""Heading, key of a row, and how its value is written; what is not known is a dash."""

FULL = " (full)"
"""Marks the reference's row."""


def lines(report: Mapping[str, Any]) -> list[str]:
    """The table: a row for the reference, where there is one, and one for each format; then on what it was measured."""
    rows = [[cell(row, key, show) for _, key, show in COLUMNS] for row in report["formats"]]
    several = len({row["name"] for row in report["formats"]}) > 1
    for row, cells in zip(report["formats"], rows, strict=True):
        cells[0] += f" ({row['name']})" if several else " mixed" if row.get("overrides") else ""
    if report["reference"]:
        full = [cell(report["reference"], key, show) for _, key, show in COLUMNS]
        rows.insert(0, [full[0] + FULL, *full[1:]])
    text = report["text"]
    against = f" against {report['reference']['name']} in full precision" if report["reference"] else ""
    return [
        *aligned([[heading for heading, _, _ in COLUMNS], *rows]),
        f"{report['model']} on {report['device']}, {text['tokens']:,} tokens of {text['name']}{against}; KL in nats.",
    ]


def worst_layers(report: Mapping[str, Any]) -> list[str]:
    """The layers that differ most from their dense weights: ten lines for one format, a line each for several."""
    rows = [row for row in report["formats"] if row["layers"]]
    if len(rows) == 1:
        layers = [[f"  {layer['name']}", layer["format"], f"{layer['error']:.4f}"] for layer in rows[0]["layers"]]
        return ["Worst layers, by relative error of the weight:", *aligned(layers)]
    short = [[f"  {row['format']}", *(_short(layer) for layer in row["layers"][:3])] for row in rows]
    return ["Worst layers in each format, by relative error of the weight:", *aligned(short)] if short else []


def _short(layer: Mapping[str, Any]) -> str:
    return f"{layer['name'].removeprefix('model.')} {layer['error']:.4f}"


def cell(row: Mapping[str, Any], key: str, show: Callable[[Any], str]) -> str:
    """One value of a row, or a dash."""
    return "-" if row.get(key) is None else show(row[key])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: the first column flush left, the others flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(text.rjust(width) if column else text.ljust(width)
                  for column, (text, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]  # fmt: skip
