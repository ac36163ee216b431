"""The languages of the page: which one a visitor reads, and sentences in it.

Promises that every key has a sentence in every language. Knows no sentence itself: each tab brings its table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = get_args(Language)


def language_of(accept_language: str | None) -> Language:
    """The first of our languages in an Accept-Language header, by weight (RFC 9110, 12.5.4); English where none is."""
    wanted: list[tuple[float, Language]] = []
    for part in (accept_language or "").split(","):
        tag, _, weight = part.strip().partition(";q=")
        name = tag.strip().lower().partition("-")[0]
        try:
            rank = float(weight) if weight else 1.0
        except ValueError:
            continue
        wanted += [(rank, language) for language in LANGUAGES if language == name and rank > 0]
    return max(wanted, key=lambda item: item[0])[1] if wanted else "en"


class Words:
    """A table of sentences: key -> one for each language, in `str.format` form.

    Raises:
        ValueError: a key that has not exactly one sentence for each language.
    """

    def __init__(self, table: Mapping[str, tuple[str, ...]]) -> None:
        odd = [key for key, sentences in table.items() if len(sentences) != len(LANGUAGES)]
        if odd:
            raise ValueError(f"not one sentence for each of {LANGUAGES}: {odd}")
        self._table = dict(table)

    def __or__(self, other: Words) -> Words:
        """Both tables in one.

        Raises:
            ValueError: a key that stands in both.
        """
        twice = sorted(self._table.keys() & other._table.keys())
        if twice:
            raise ValueError(f"these keys stand in two tables: {twice}")
        return Words({**self._table, **other._table})

    def say(self, key: str, language: Language, **values: object) -> str:
        """The sentence of that key, with its values filled in."""
        return self._table[key][LANGUAGES.index(language)].format(**values)

    def of(self, language: Language) -> dict[str, str]:
        """Every key with its sentence in one language, unfilled, as gr.I18n takes them."""
        place = LANGUAGES.index(language)
        return {key: sentences[place] for key, sentences in self._table.items()}
