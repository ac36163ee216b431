"""Reads the YAML files of the corpus into dataclasses and checks them.

Promises: every topic has an answer and questions in each language, and no question stands under two topics.
Knows nothing of how questions are varied.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

LANGUAGES = ("en", "zh")
FOLDER = Path(__file__).resolve().parent
HELD_OUT_PERCENT = 7


# Parts in order, each a choice of words; "" among them means that the part may be left out.
Pattern = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Topic:
    """One thing that the guide can say, and the questions that ask for it."""

    id: str
    kind: str  # topic, talk, beyond or tour
    answer: dict[str, str]  # language -> the one answer
    ask: dict[str, tuple[str, ...]]  # language -> questions; those of kind `beyond` hold {slots}
    patterns: dict[str, tuple[Pattern, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class FollowUp:
    """Questions that only mean `to` when one of the topics `after` was asked before."""

    after: frozenset[str]
    to: str
    ask: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Corpus:
    """Everything written by hand, as read."""

    topics: dict[str, Topic]
    follow_ups: tuple[FollowUp, ...]
    slots: dict[str, dict[str, tuple[str, ...]]]
    lexicon: dict[str, tuple[tuple[str, ...], ...]]
    wording: dict[str, Any]

    def of_kind(self, kind: str) -> list[Topic]:
        """The topics of one kind, in the order of the files."""
        return [topic for topic in self.topics.values() if topic.kind == kind]

    def questions(self) -> Iterator[tuple[str, str, str]]:
        """Every hand-written question that stands for itself, as (topic id, language, question)."""
        for topic in self.topics.values():
            for language in LANGUAGES:
                for question in topic.ask[language]:
                    yield topic.id, language, question

    def answers(self) -> Iterator[str]:
        """Every answer the guide can give; those with {name} still hold the slot."""
        for topic in self.topics.values():
            yield from topic.answer.values()
        name = self.wording["name"]
        said = [name["tell"]["answer"], name["ask"]["answer"], name["ask"]["unknown"], self.wording["more"]["answer"]]
        for group in said:
            yield from group.values()


def normalise(question: str) -> str:
    """A question without case, punctuation and spaces: what counts when two questions are compared."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", question).casefold())


def is_held_out(question: str) -> bool:
    """Whether a topic's question belongs to the development set: chosen by hash, so it never changes sides."""
    digest = hashlib.sha256(normalise(question).encode()).digest()
    return digest[0] * 100 < HELD_OUT_PERCENT * 256


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _pattern(text: str) -> Pattern:
    """`a|b + ?c|d`: choices in order; a part that begins with `?`, or has `?` for a choice, may be left out."""
    parts = []
    for part in text.split(" + "):
        optional = part.startswith("?")
        parts.append(tuple("" if choice == "?" else choice for choice in part.removeprefix("?").split("|")))
        if optional:
            parts[-1] += ("",) * len(parts[-1])
    return tuple(parts)


def _topic(entry: dict[str, Any], kind: str, patterns: dict[str, dict[str, list[str]]]) -> Topic:
    answer = {language: str(entry["answer"][language]).strip() for language in LANGUAGES}
    ask = {language: tuple(dict.fromkeys(str(q).strip() for q in entry["ask"][language])) for language in LANGUAGES}
    shapes = {language: tuple(map(_pattern, patterns[language].get(entry["id"], ()))) for language in LANGUAGES}
    return Topic(str(entry["id"]), kind, answer, ask, shapes)


def _topics(folder: Path) -> dict[str, Topic]:
    beyond = _read(folder / "beyond.yaml")
    patterns = {language: _read(folder / "patterns" / f"{language}.yaml") for language in LANGUAGES}
    entries = [("topic", entry) for path in sorted((folder / "topics").glob("*.yaml")) for entry in _read(path)]
    entries += [("talk", entry) for entry in _read(folder / "talk.yaml")]
    entries += [("tour", entry) for entry in _read(folder / "tour.yaml")]
    entries += [("beyond", entry) for entry in beyond["kinds"]]
    topics: dict[str, Topic] = {}
    for kind, entry in entries:
        topic = _topic(entry, kind, patterns)
        if topic.id in topics:
            raise ValueError(f"topic {topic.id} is written twice")
        topics[topic.id] = topic
    return topics


def _check(corpus: Corpus) -> None:
    owner: dict[str, str] = {}
    for topic_id, _, question in corpus.questions():
        key = normalise(question)
        if key and "{" not in question and owner.setdefault(key, topic_id) != topic_id:
            raise ValueError(f"{question!r} stands under {owner[key]} and under {topic_id}")
    for follow_up in corpus.follow_ups:
        unknown = (follow_up.after | {follow_up.to}) - set(corpus.topics)
        if unknown:
            raise ValueError(f"follow.yaml names topics that nobody wrote: {sorted(unknown)}")


def load_corpus(folder: Path = FOLDER) -> Corpus:
    """Read and check the corpus.

    Raises ValueError when a topic or a question stands twice or a follow-up names an unknown topic.
    """
    follow_ups = tuple(
        FollowUp(frozenset(entry["after"]), entry["to"], {lang: tuple(entry["ask"][lang]) for lang in LANGUAGES})
        for entry in _read(folder / "follow.yaml")
    )
    beyond = _read(folder / "beyond.yaml")
    slots = {name: {lang: tuple(words[lang]) for lang in LANGUAGES} for name, words in beyond["slots"].items()}
    lexicon = {name: tuple(tuple(group) for group in groups) for name, groups in _read(folder / "lexicon.yaml").items()}
    corpus = Corpus(_topics(folder), follow_ups, slots, lexicon, _read(folder / "wording.yaml"))
    _check(corpus)
    return corpus
