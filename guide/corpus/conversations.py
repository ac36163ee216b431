"""Makes conversations of one to twelve turns out of the corpus.

Promises: a seed fixes the conversations; an assistant's turn is a written answer, verbatim, with the user's name
filled in. Knows nothing of tokens.
"""

import random
import re
from dataclasses import dataclass, field

from guide.corpus.load import LANGUAGES, Corpus, Pattern, Topic, is_held_out, normalise
from guide.corpus.vary import HAN, Strength, Vary, language_of, pseudo_word

# Slots that also take words which do not exist: whatever nobody has heard of lies beyond the guide too.
_OPEN_SLOTS = ("person", "place", "company", "software", "thing", "animal")
_SLOT = re.compile(r"\{([a-z_]+?)[23]?\}")
_WEIGHTS = {"topic": 0.70, "beyond": 0.18, "talk": 0.105, "tour": 0.015}
_PLAIN = Strength(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
_LIGHT = Strength(
    synonyms=0.3, delete=0.08, fragment=0.0, reorder=0.03, bag=0.0, filler=0.05, pseudo=0.0, typo=0.12, around=0.2
)


@dataclass
class Conversation:
    """Messages in the form of chat templates: an optional system prompt, then user and assistant in turn."""

    messages: list[dict[str, str]] = field(default_factory=list)

    def add(self, question: str, answer: str) -> None:
        """Append one turn."""
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@dataclass
class _State:
    """What the next turn may refer to."""

    topic: Topic | None = None
    answer: str = ""
    name: str = ""


class Generator:
    """An endless source of training conversations."""

    def __init__(
        self,
        corpus: Corpus,
        seed: int,
        hold_out: bool = True,
        patterned: float = 0.3,
        withheld: frozenset[str] = frozenset(),
        favoured: dict[str, float] | None = None,
    ) -> None:
        """Prepare an endless source.

        `hold_out`: leave the development set's questions out. `patterned`: share of topic questions made from patterns.
        `withheld`: questions, as `normalise` returns them, that no conversation may hold.
        `favoured`: topics of kind `topic` to ask more often than the others, and how many times as often.
        """
        self._corpus = corpus
        self._rng = random.Random(seed)
        self._vary = Vary(corpus.lexicon, corpus.wording)
        self._patterned = patterned
        self._withheld = withheld
        self._strength = Strength()
        self._topics = {kind: corpus.of_kind(kind) for kind in _WEIGHTS}
        self._kind_weights = {
            "topic": [(favoured or {}).get(topic.id, 1.0) for topic in self._topics["topic"]],
            "beyond": [len(topic.ask["en"]) ** 0.5 for topic in self._topics["beyond"]],
        }
        self._ask = {
            (t.id, lang): [q for q in t.ask[lang] if not (hold_out and t.kind == "topic" and is_held_out(q))]
            for t in corpus.topics.values()
            for lang in LANGUAGES
        }
        pairs = [topic.answer for topic in corpus.topics.values()] + [corpus.wording["more"]["answer"]]
        self._in = {"zh": {pair["en"]: pair["zh"] for pair in pairs}, "en": {pair["zh"]: pair["en"] for pair in pairs}}
        self._han = sorted({c for t in corpus.topics.values() for q in t.ask["zh"] for c in HAN.findall(q)})

    def chance(self, probability: float) -> bool:
        """A draw from the same stream of random numbers."""
        return self._rng.random() < probability

    def conversation(self) -> Conversation:
        """The next conversation."""
        rng = self._rng
        out = Conversation()
        if rng.random() < 0.15:
            prompts = self._corpus.wording["system"]
            out.messages.append({"role": "system", "content": rng.choice(prompts[rng.choice(LANGUAGES)])})
        state = _State()
        language = rng.choices(LANGUAGES, (0.58, 0.42))[0]
        turns = rng.choices((1, 2, 3, 4, 5, 8, 12), (0.68, 0.16, 0.08, 0.04, 0.02, 0.015, 0.005))[0]
        for turn in range(turns):
            if rng.random() < 0.1:
                language = rng.choice(LANGUAGES)
            question, answer = self._turn(state, language, first=turn == 0)
            if normalise(question) in self._withheld:
                continue
            out.add(question, answer)
            state.answer = answer
        return out if out.messages[-1:] and out.messages[-1]["role"] == "assistant" else self.conversation()

    def _turn(self, state: _State, language: str, first: bool) -> tuple[str, str]:
        draw = self._rng.random()
        if draw < (0.012 if first else 0.06):
            return self._tell_name(state, language)
        if draw < (0.018 if first else 0.15):
            return self._ask_name(state, language)
        if first or state.topic is None:
            return self._fresh(state, language)
        if draw < 0.22:
            return self._about_last(state, language)
        if draw < 0.55:
            found = self._follow(state, language)
            if found:
                return found
        return self._fresh(state, language)

    def _fresh(self, state: _State, language: str) -> tuple[str, str]:
        rng = self._rng
        kind = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        topic = rng.choices(self._topics[kind], self._kind_weights.get(kind))[0]
        question = self._one_question(topic, language)
        state.topic = topic
        # A Chinese question may hold no Chinese at all ("nf4?"): the answer follows what the reader sees.
        return question, topic.answer[language if topic.kind == "topic" else self._seen(question, language)]

    @staticmethod
    def _seen(question: str, language: str) -> str:
        return "zh" if language_of(question) == "zh" else ("en" if re.search("[A-Za-z]", question) else language)

    def _one_question(self, topic: Topic, language: str) -> str:
        rng = self._rng
        text = self._fill(rng.choice(self._ask[topic.id, language]), language)
        if topic.kind == "topic":
            if topic.patterns[language] and rng.random() < self._patterned:
                text = self._from_pattern(rng.choice(topic.patterns[language]), language)
            if rng.random() < 0.08:
                text = self._splice(text, rng.choice(self._ask[topic.id, language]), language)
        if topic.kind != "topic":
            strength = _LIGHT
        else:
            strength = self._strength if rng.random() < 0.8 else _PLAIN
        return self._vary.question(text, rng, strength)

    def _from_pattern(self, pattern: Pattern, language: str) -> str:
        rng = self._rng
        parts = [choice for choice in (rng.choice(part) for part in pattern) if choice]
        if rng.random() < 0.08:
            rng.shuffle(parts)
        return (" " if language == "en" else "").join(parts)

    def _splice(self, one: str, two: str, language: str) -> str:
        """Two questions of the same topic, side by side or half and half."""
        rng = self._rng
        gap = " " if language == "en" else ""
        if rng.random() < 0.5:
            return f"{one}{gap or '，'}{two}"
        a, b = (one.split(), two.split()) if language == "en" else (list(one), list(two))
        return gap.join(a[: (len(a) + 1) // 2] + b[len(b) // 2 :])

    def _fill(self, text: str, language: str) -> str:
        if "{" not in text:
            return text
        return _SLOT.sub(lambda match: self._slot(match.group(1), language), text)

    def _slot(self, name: str, language: str) -> str:
        rng = self._rng
        if name == "num":
            return str(rng.randrange(10 ** rng.randint(1, 4)))
        if name == "pseudo":
            if language == "zh" and rng.random() < 0.5:
                return "".join(rng.choice(self._han) for _ in range(rng.randint(2, 4)))
            return pseudo_word(rng)
        if language == "en" and name in _OPEN_SLOTS and rng.random() < 0.12:
            return pseudo_word(rng) if name == "thing" else pseudo_word(rng).capitalize()
        return rng.choice(self._corpus.slots[name][language])

    def _follow(self, state: _State, language: str) -> tuple[str, str] | None:
        rng = self._rng
        last = state.topic.id if state.topic else ""
        fitting = [f for f in self._corpus.follow_ups if last in f.after]
        if not fitting:
            return None
        chosen = rng.choice(fitting)
        state.topic = self._corpus.topics[chosen.to]
        question = self._vary.question(rng.choice(chosen.ask[language]), rng, _LIGHT)
        return question, state.topic.answer[language]

    def _about_last(self, state: _State, language: str) -> tuple[str, str]:
        """More, again, or the same in the other language."""
        rng, wording = self._rng, self._corpus.wording
        draw = rng.random()
        if draw < 0.4:
            return self._light(wording["more"]["ask"][language]), wording["more"]["answer"][language]
        if draw < 0.7:
            return self._light(wording["again"][language]), state.answer
        for other in LANGUAGES:
            if state.answer in self._in[other]:
                return self._light(wording["switch"][other]), self._in[other][state.answer]
        return self._light(wording["again"][language]), state.answer

    def _light(self, choices: list[str]) -> str:
        return self._vary.question(self._rng.choice(choices), self._rng, _LIGHT)

    def _tell_name(self, state: _State, language: str) -> tuple[str, str]:
        tell = self._corpus.wording["name"]["tell"]
        state.name = self._name(language)
        question = self._rng.choice(tell[language]).replace("{name}", state.name)
        return question, tell["answer"][language].replace("{name}", state.name)

    def _ask_name(self, state: _State, language: str) -> tuple[str, str]:
        name = self._corpus.wording["name"]
        ask = name["ask"]
        question = self._vary.question(self._rng.choice(ask[language]), self._rng, _PLAIN)
        answer = ask["answer"] if state.name else ask["unknown"]
        if not state.name and self._rng.random() < 0.2:  # told and asked in one breath
            state.name = self._name(language)
            told = self._rng.choice(name["tell"][language]).replace("{name}", state.name)
            question, answer = f"{told}{'. ' if language == 'en' else '。'}{question}", ask["answer"]
        return question, answer[language].replace("{name}", state.name)

    def _name(self, language: str) -> str:
        rng = self._rng
        if rng.random() < 0.5:
            name = rng.choice(self._corpus.wording["names"][language])
        elif language == "zh" and rng.random() < 0.7:
            name = "".join(rng.choice(self._han) for _ in range(rng.choice((2, 2, 3))))
        else:
            name = pseudo_word(rng).capitalize()
        return name.lower() if rng.random() < 0.2 else name
