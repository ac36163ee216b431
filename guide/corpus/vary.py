"""Varies the wording of a question without changing what it asks.

Promises: every choice comes from the random generator given, so a seed fixes the outcome; nothing is returned empty.
Knows nothing of topics and answers.
"""

import random
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass

HAN = re.compile(r"[\u3400-\u9fff]")
_WORDS = re.compile(r"\s*\S+")
_PIECES_ZH = re.compile(r"[A-Za-z0-9_\-./:]+|\s+|.", re.S)
_MARKS = {"en": ("?", "?", "?", ".", "??", "!", " ?", "..."), "zh": ("？", "？", "？", "。", "！", "?")}
_CONSONANTS = ["b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z"]
_CONSONANTS += ["br", "cr", "fl", "gr", "pl", "st", "tr", "sh", "ch", "th", "qu"]
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "ee", "oo", "ou", "y"]
_CODAS = ["", "", "", "n", "r", "l", "s", "x", "t", "ck", "nd", "ng"]
_STOP_WORDS = frozenset(
    {
        "a",
        "an",
        "the",
        "is",
        "are",
        "was",
        "be",
        "do",
        "does",
        "did",
        "can",
        "could",
        "will",
        "would",
        "should",
        "may",
        "i",
        "you",
        "it",
        "my",
        "me",
        "we",
        "us",
        "of",
        "to",
        "in",
        "on",
        "at",
        "for",
        "with",
        "and",
        "or",
        "that",
        "this",
        "there",
        "have",
        "has",
        "had",
        "please",
        "what",
        "how",
        "which",
        "why",
        "where",
        "when",
        "who",
    }
)


def language_of(text: str) -> str:
    """`zh` when the text holds a Chinese character, else `en`."""
    return "zh" if HAN.search(text) else "en"


def pseudo_word(rng: random.Random) -> str:
    """A word that does not exist, of one to four syllables, sometimes capitalised."""
    syllables = rng.choices((1, 2, 3, 4), (2, 5, 3, 1))[0]
    word = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))
    return word.capitalize() if rng.random() < 0.25 else word


@dataclass(frozen=True)
class Strength:
    """How often each change is made: chances for one question, and for one word of it."""

    synonyms: float = 0.6
    synonym_word: float = 0.35
    delete: float = 0.3
    delete_word: float = 0.13
    fragment: float = 0.12
    reorder: float = 0.08
    bag: float = 0.05
    filler: float = 0.1
    pseudo: float = 0.05
    typo: float = 0.15
    around: float = 0.35


class Synonyms:
    """Replaces phrases by other members of their group; the longest phrase that fits is taken first."""

    def __init__(self, groups: Iterable[tuple[str, ...]], by_character: bool) -> None:
        """`by_character`: match substrings (Chinese) instead of whole words."""
        self._groups: dict[str, list[tuple[str, ...]]] = {}
        for group in groups:
            for phrase in group:
                self._groups.setdefault(phrase.lower(), []).append(group)
        self._by_character = by_character
        self._longest = max((len(p if by_character else p.split()) for p in self._groups), default=0)

    def replace(self, text: str, chance: float, rng: random.Random) -> str:
        """`text` with each known phrase replaced with probability `chance`."""
        parts = _PIECES_ZH.findall(text) if self._by_character else _WORDS.findall(text)
        out: list[str] = []
        i = 0
        while i < len(parts):
            for n in range(min(self._longest, len(parts) - i), 0, -1):
                chunk = "".join(parts[i : i + n])
                bare = chunk.strip().strip(".,?!;:\"'").lower()
                groups = self._groups.get(bare)
                if groups:
                    out.append(self._swap(chunk, bare, groups, chance, rng))
                    i += n
                    break
            else:
                out.append(parts[i])
                i += 1
        return "".join(out)

    @staticmethod
    def _swap(chunk: str, bare: str, groups: list[tuple[str, ...]], chance: float, rng: random.Random) -> str:
        if rng.random() >= chance:
            return chunk
        start = chunk.lower().find(bare)
        return chunk[:start] + rng.choice(rng.choice(groups)) + chunk[start + len(bare) :]


class Vary:
    """Makes one question into another that means the same."""

    def __init__(
        self, lexicon: dict[str, tuple[tuple[str, ...], ...]], wording: dict[str, dict[str, list[str]]]
    ) -> None:
        """`lexicon` and `wording` as in the YAML files of the same names."""
        self._synonyms = {
            "en": Synonyms(lexicon["en"], by_character=False),
            "zh": Synonyms(lexicon["zh"] + lexicon["bridge"], by_character=True),
        }
        self._wording = wording

    def question(self, text: str, rng: random.Random, strength: Strength) -> str:
        """`text` asked in another way."""
        language = language_of(text)
        steps: list[tuple[float, Callable[[str, random.Random, str], str]]] = [
            (strength.fragment, self._fragment),
            (strength.synonyms, lambda t, r, lang: self._synonyms[lang].replace(t, strength.synonym_word, r)),
            (strength.delete, lambda t, r, lang: self._delete(t, r, lang, strength.delete_word)),
            (strength.reorder, self._reorder),
            (strength.bag, self._bag),
            (strength.filler, self._filler),
            (strength.pseudo, self._pseudo),
            (strength.around, self._around),
            (strength.typo, self._typo),
            (1.0, self._surface),
        ]
        for chance, step in steps:
            if rng.random() < chance:
                text = step(text, rng, language).strip() or text
        return text

    @staticmethod
    def _parts(text: str, language: str) -> list[str]:
        return _WORDS.findall(text) if language == "en" else _PIECES_ZH.findall(text)

    def _fragment(self, text: str, rng: random.Random, language: str) -> str:
        parts = self._parts(text, language)
        if language == "en" and rng.random() < 0.5:
            return "".join(p for p in parts if p.strip().strip(",.?!").lower() not in _STOP_WORDS)
        least = 3 if language == "en" else 5
        if len(parts) <= least:
            return text
        length = max(least, round(len(parts) * rng.uniform(0.6, 0.95)))
        start = rng.choice((0, len(parts) - length, rng.randint(0, len(parts) - length)))
        return "".join(parts[start : start + length])

    def _delete(self, text: str, rng: random.Random, language: str, chance: float) -> str:
        parts = self._parts(text, language)
        if len(parts) < 4:
            return text
        return "".join(p for p in parts if rng.random() >= (chance if language == "en" else chance * 0.7))

    def _reorder(self, text: str, rng: random.Random, language: str) -> str:
        clauses = re.split(r"(?<=[,，。.?？!！;；]) *", text)
        gap = " " if language == "en" else ""
        if len(clauses) > 1 and rng.random() < 0.7:
            rng.shuffle(clauses)
            return gap.join(clauses)
        parts = [p.strip() for p in self._parts(text, language)] if language == "en" else self._parts(text, language)
        if len(parts) > 2:
            i = rng.randrange(len(parts) - 1)
            parts[i], parts[i + 1] = parts[i + 1], parts[i]
        return gap.join(parts)

    def _bag(self, text: str, rng: random.Random, language: str) -> str:
        """The words in any order: what is asked should not hang on the order alone."""
        parts = [p.strip() for p in self._parts(text, language) if p.strip()]
        rng.shuffle(parts)
        return (" " if language == "en" else "").join(parts)

    def _filler(self, text: str, rng: random.Random, language: str) -> str:
        return self._insert(text, rng.choice(self._wording[language]["fillers"]), rng, language)

    def _pseudo(self, text: str, rng: random.Random, language: str) -> str:
        return self._insert(text, pseudo_word(rng), rng, language)

    def _insert(self, text: str, word: str, rng: random.Random, language: str) -> str:
        parts = self._parts(text, language)
        at = rng.randint(0, len(parts))
        gap = " " if language == "en" else ""
        return f"{''.join(parts[:at])}{gap}{word}{gap}{''.join(parts[at:]).lstrip()}"

    def _around(self, text: str, rng: random.Random, language: str) -> str:
        gap = " " if language == "en" else ""
        words = self._wording[language]
        if rng.random() < 0.7:
            text = f"{rng.choice(words['openers'])}{gap}{text}"
        if rng.random() < 0.4:
            closer = rng.choice(words["closers"])
            text = f"{text.rstrip('?？。.')}{rng.choice(('', ',')) if language == 'en' else ''}{gap}{closer}"
        return text

    def _typo(self, text: str, rng: random.Random, language: str) -> str:
        for _ in range(rng.choice((1, 1, 2))):
            if len(text) < 5:
                return text
            i = rng.randrange(1, len(text) - 1)
            a, b = text[i], text[i + 1]
            letter = rng.choice(string.ascii_lowercase) if a.isascii() else a
            text = text[:i] + rng.choice((b + a, b, a + a + b, letter + b)) + text[i + 2 :]
        return text

    def _surface(self, text: str, rng: random.Random, language: str) -> str:
        """Case, apostrophes, hyphens, spacing and the mark at the end: what people differ in most."""
        draw = rng.random()
        if draw < 0.35:
            text = text.lower()
        elif draw < 0.55:
            text = text[:1].upper() + text[1:]
        elif draw < 0.58:
            text = text.upper()
        if rng.random() < 0.2:
            text = text.replace("'", "")
        if rng.random() < 0.3:
            text = text.replace("`", "").replace('"', "")
        if rng.random() < 0.15:
            text = re.sub(r"(?<=\w)[-_](?=\w)", rng.choice((" ", "")), text)
        if language == "zh" and rng.random() < 0.5:
            text = re.sub(r"(?<=[\u3400-\u9fff]) +(?=\w)|(?<=\w) +(?=[\u3400-\u9fff])", "", text)
        end = rng.random()
        if end < 0.35:
            text = text.rstrip("?？.。!！ ")
        elif end < 0.6:
            mark = (
                rng.choice(("?", "?", "?", ".", "??", "!", " ?", "..."))
                if language == "en"
                else rng.choice("？？？。！?")
            )
            text = text.rstrip("?？.。!！ ") + mark
        return text
