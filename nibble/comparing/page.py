"""A comparison as one HTML file: opened from a disk, mailed, read on a phone, in light and in dark.

Promises that it asks no other host for anything and runs nothing, and that model output, which is foreign text, stays
text. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from os.path import commonprefix
from typing import Any

from nibble.comparing.table import rows, sentences, title

STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d8dbe2, #3a3f4b); --soft: light-dark(#5b6270, #a3aab8);
  --card: light-dark(#ffffff, #1e222b); --page: light-dark(#f5f6f9, #14171d); --text: light-dark(#1b1f28, #e8eaf0);
  --accent: light-dark(#3b5bdb, #8ea6ff); }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.25rem 1rem 3rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "PingFang SC", "Microsoft YaHei", sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; white-space: pre-wrap; overflow-wrap: anywhere; }
p, small { color: var(--soft); margin: .15rem 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; background: var(--card); border: 1px solid var(--line); width: 100%; }
th, td { padding: .4rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
.answers { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
article { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .75rem .9rem; }
article h3 { font-size: .85rem; margin: 0 0 .35rem; color: var(--accent); }
article div { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
article small { display: block; margin-top: .5rem; font-size: .8rem; }
.same { color: var(--soft); }
"""

ENDED = {"stop": "ended by itself", "length": "cut off at the limit", "stopped": "stopped"}
"""Finish reason -> what it means to a reader."""


def render(report: Mapping[str, Any]) -> str:
    """The page of a report, as `nibble.comparing.bench` makes it."""
    heading, *figures = rows(report)
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in heading)
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in figures)
    notes = "".join(f"<p>{text(sentence)}</p>" for sentence in sentences(report))
    sections = "".join(_section(report, number, prompt) for number, prompt in enumerate(report["prompts"]))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="referrer" content="no-referrer">'
        f"<title>{text(title(report))}</title><style>{STYLE}</style></head>\n"
        f'<body><h1>{text(title(report))}</h1>{notes}\n<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>\n{sections}"
        f"<p><small>{text(_made_by(report))}</small></p></body></html>\n"
    )


def _section(report: Mapping[str, Any], number: int, prompt: str) -> str:
    """One prompt and the answers to it."""
    base = report["subjects"][0]["answers"][number]["text"]
    cards = "".join(
        _card(subject["name"], subject["answers"][number], base if place else "")
        for place, subject in enumerate(report["subjects"])
    )
    return f'<section><h2 dir="auto">{text(prompt)}</h2><div class="answers">{cards}</div></section>\n'


def _card(name: str, answer: Mapping[str, Any], base: str) -> str:
    """One answer; as far as it is the base's own, it stands back."""
    said = answer["text"]
    same = len(commonprefix([said, base]))
    shown = f'<span class="same">{text(said[:same])}</span>{text(said[same:])}' if same else text(said)
    facts = f"{answer['tokens']:,} tokens, {ENDED.get(answer['finish_reason'], '')}"
    if base and said == base:
        facts += "; the same as the base"
    return f'<article><h3>{text(name)}</h3><div dir="auto">{shown}</div><small>{text(facts)}</small></article>'


def _made_by(report: Mapping[str, Any]) -> str:
    sampling = ", ".join(f"{key} {value}" for key, value in report["sampling"].items())
    versions = ", ".join(f"{key} {value}" for key, value in report["versions"].items())
    return f"The same for all: {sampling}. Made with {versions}."


def text(value: object) -> str:
    """Foreign text as HTML: escaped, without characters that no page may hold."""
    return escape("".join(sign for sign in str(value) if sign in "\n\t" or _visible(sign)))


def _visible(sign: str) -> bool:
    """Whether it is no control character and none that turns the direction of the text after it."""
    code = ord(sign)
    return not (
        code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or code in (0xFFFE, 0xFFFF)
        or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    )  # fmt: skip
