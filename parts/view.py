"""The pieces that every tab's HTML is made of: words, tables, a sentence under a card.

Promises that nothing a file or a visitor wrote reaches the page's own markup unescaped. Knows nothing of Gradio.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from nibble.words import Language, Words
from parts.words import WORDS

NOTHING = "–"
"""Stands where a number is not known."""


class Say:
    """Words in one language, escaped for HTML. A tab adds its own."""

    words: Words = WORDS

    def __init__(self, language: Language) -> None:
        self.language = language

    def __call__(self, key: str, **values: object) -> str:
        return escape(self.plain(key, **values))

    def plain(self, key: str, **values: object) -> str:
        """The same for what is no HTML, or is escaped later."""
        return self.words.say(key, self.language, **values)


def table(head: Sequence[str], rows: Iterable[str], kind: str) -> str:
    """A table of ready rows, under headings that are escaped already."""
    cells = "".join(f"<th scope='col'>{cell}</th>" for cell in head)
    return f"<table class='grid {kind}'><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def nats(value: float | None) -> str:
    """A divergence, for a person: the smaller, the more places."""
    if value is None:
        return NOTHING
    return "0" if value == 0 else f"{value:.{3 if value >= 0.1 else 4 if value >= 0.01 else 5}f}"


def told(text: str, *, wrong: bool = False) -> str:
    """A sentence under a card; empty where there is nothing to say."""
    return f"<p class='{'wrong' if wrong else 'right'}' role='status'>{escape(text)}</p>" if text else ""
