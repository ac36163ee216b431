"""The corpus that the guide learns from: well formed, deterministic, and free of the examination's questions."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from guide.corpus import LANGUAGES, Corpus, Generator, load_corpus, normalise

ROOT = Path(__file__).parents[1]
EXAM = [json.loads(line) for line in (ROOT / "guide" / "exam.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


@pytest.fixture(scope="module")
def tokenizer(guide_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(guide_model / "tokenizer.json"))


def test_every_topic_is_asked_in_many_ways_in_both_languages(corpus: Corpus) -> None:
    topics = corpus.of_kind("topic")
    assert len(topics) >= 80
    for topic in topics:
        for language, fewest in (("en", 50), ("zh", 35)):
            assert len(topic.ask[language]) >= fewest, (topic.id, language)
            assert topic.answer[language]


def test_the_examination_is_of_the_agreed_form() -> None:
    assert len(EXAM) == 380
    assert len({question["id"] for question in EXAM}) == 380
    assert Counter(question["lang"] for question in EXAM)["zh"] == 134
    assert all(question["required"] and isinstance(question["forbidden"], list) for question in EXAM)


def test_no_question_of_the_examination_is_a_topics_wording(corpus: Corpus) -> None:
    written = {normalise(question) for topic, _, question in corpus.questions() if corpus.topics[topic].kind == "topic"}
    single = [normalise(question["turns"][0]) for question in EXAM if len(question["turns"]) == 1]
    shared = [question for question in single if question in written]
    # Short questions ("what is nf4?") are what anybody writes; `guide.train` leaves them out of training.
    assert len(shared) <= 20, shared


def test_a_seed_fixes_the_conversations(corpus: Corpus) -> None:
    first, second, other = (Generator(corpus, seed) for seed in (1, 1, 2))
    ones = [first.conversation().messages for _ in range(50)]
    assert ones == [second.conversation().messages for _ in range(50)]
    assert ones != [other.conversation().messages for _ in range(50)]


def test_a_favoured_topic_is_asked_so_much_more_often(corpus: Corpus) -> None:
    said = set(corpus.topics["dry_run"].answer.values())

    def share(**more: dict[str, float]) -> int:
        generator = Generator(corpus, 5, **more)
        talks = (generator.conversation() for _ in range(3000))
        return sum(message["content"] in said for talk in talks for message in talk.messages)

    plain, favoured = share(), share(favoured={"dry_run": 50.0})
    assert 0 < plain < 60 and 10 * plain < favoured


def test_what_the_assistant_says_is_a_written_answer(corpus: Corpus) -> None:
    generator = Generator(corpus, 3)
    whole = set(corpus.answers())
    slots = [answer.split("{name}") for answer in whole if "{name}" in answer]
    for _ in range(300):
        for message in generator.conversation().messages:
            if message["role"] == "assistant":
                text = message["content"]
                named = any(text.startswith(parts[0]) and text.endswith(parts[-1]) for parts in slots)
                assert text in whole or named, text


@given(text=st.text())
def test_the_tokenizer_keeps_every_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    special = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert any(mark in text for mark in special) or tokenizer.decode(ids, skip_special_tokens=False) == text


def test_every_answer_fits_into_the_context(corpus: Corpus, tokenizer: Tokenizer) -> None:
    lengths = [len(tokenizer.encode(answer).ids) for answer in corpus.answers()]
    assert max(lengths) <= 1024
    tours = [topic for topic in corpus.topics.values() if topic.kind == "tour"]
    assert all(len(tokenizer.encode(topic.answer[language]).ids) >= 350 for topic in tours for language in LANGUAGES)
