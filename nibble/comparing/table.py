"""A comparison as lines of text, for the console. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nibble.quality.table import aligned, cell

COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("", "name", str),
    ("held-out loss", "loss", "{:.4f}".format),
    ("perplexity", "perplexity", "{:.3f}".format),
    ("KL mean", "kl_mean", "{:.5f}".format),
    ("KL p95", "kl_p95", "{:.5f}".format),
    ("top-1", "top1", lambda value: f"{100 * value:.1f} %"),
)
"""Heading, key of a subject, and how its value is written."""


def rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The figures as cells, headings first; what is not known is a dash."""
    found = [[cell(subject, key, show) for _, key, show in COLUMNS] for subject in report["subjects"]]
    return [[heading for heading, _, _ in COLUMNS], *found]


def sentences(report: Mapping[str, Any]) -> list[str]:
    """What was compared, on what, and what is not known."""
    held, neutral = report["heldout"], report["neutral"]
    losses = (
        f"Held-out loss: {held['samples']:,} samples of {held['data']} that training left out."
        if held["samples"] else held["why"]
    )  # fmt: skip
    return [
        f"{title(report)}, on {report['device']} in {report['dtype']}.",
        losses,
        f"Perplexity and KL against the base, in nats: {neutral['tokens']:,} tokens of {neutral['name']}.",
        report["chat_why"],
    ]


def title(report: Mapping[str, Any]) -> str:
    """What is compared, such as `guide-quotes on guide (nf4)`."""
    base = f"{report['base']} ({report['format']})"
    tuned = report["adapter"] or report["run"]
    return f"{tuned} on {base}" if tuned else base


def lines(report: Mapping[str, Any]) -> list[str]:
    """The whole report: figures, then each prompt with the answers to it."""
    found = [*aligned(rows(report)), "", *sentences(report)]
    width = max(len(subject["name"]) for subject in report["subjects"])
    for number, prompt in enumerate(report["prompts"]):
        found += ["", f"> {_flat(prompt)}"]
        for subject in report["subjects"]:
            answer = subject["answers"][number]
            cut = "" if answer["finish_reason"] == "stop" else " …"
            found.append(f"  {subject['name'].ljust(width)}  {_flat(answer['text'])}{cut}")
    return found


def _flat(text: str) -> str:
    """Foreign text in one line, without what a terminal would obey."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
