"""From a file to the loss, for whatever may stand in it: masks, ends, truncation, the split, the order, and padding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nibble.data import ColumnMap, Row, Sample
from nibble.data.looking import open_encoder
from nibble.data.render import Encoder, decode
from nibble.data.rows import IGNORED
from nibble.training import feed

GUIDE = Path(__file__).parents[1] / "guide" / "model"
END = "<|im_end|>"

many = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

words = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t"), min_size=1, max_size=30)
said = words.map(str.strip).filter(bool) | st.sampled_from([END, "<|im_start|>assistant", "半字节", "👍🏽 ok", "</s>"])
samples = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=12).map(
        lambda pairs: Sample(1, [token for token, _ in pairs], [learnt for _, learnt in pairs])
    ),
    min_size=1,
    max_size=20,
)


@pytest.fixture(scope="module")
def encoder(guide_model: Path) -> Encoder:
    return open_encoder(guide_model, 10_000, trusted=False)


def conversation(texts: list[str]) -> Row:
    roles = ("user", "assistant") * len(texts)
    turns: Any = tuple({"role": role, "content": text} for role, text in zip(roles, texts, strict=False))
    return Row(1, messages=turns[: len(turns) // 2 * 2])


@many
@given(texts=st.lists(said, min_size=2, max_size=6))
def test_exactly_the_answers_and_their_ends_are_trained(texts: list[str], encoder: Encoder) -> None:
    row = conversation(texts)
    sample = encoder.encode(row)
    assert not sample.trained[0] and len(sample.ids) == len(sample.trained) and not sample.truncated
    assert sample.labels == [
        token if learnt else IGNORED for token, learnt in zip(sample.ids, sample.trained, strict=True)
    ]
    end = encoder.stop_id
    answers = [turn["content"] for turn in row.messages if turn["role"] == "assistant"]
    spans: list[list[int]] = [[]]
    for token, learnt in zip(sample.ids, sample.trained, strict=True):
        if learnt:
            spans[-1].append(token)
        elif spans[-1]:
            spans.append([])
    spans = [span for span in spans if span]
    assert len(spans) == len(answers)
    for span, answer in zip(spans, answers, strict=True):
        # Its end once, as its last token: what a person writes as `<|im_end|>` is letters and teaches no stop.
        assert span.count(end) == 1 and span[-1] == end
        assert decode(encoder.tokenizer, span[:-1]) == answer


@many
@given(texts=st.lists(said, min_size=2, max_size=6), longest=st.integers(1, 80))
def test_what_is_cut_is_the_beginning_of_the_whole(texts: list[str], longest: int, encoder: Encoder) -> None:
    whole = encoder.encode(conversation(texts))
    cut = Encoder(encoder.tokenizer, encoder.template, longest).encode(conversation(texts))
    assert (cut.ids, cut.trained) == (whole.ids[:longest], whole.trained[:longest])
    assert cut.truncated == (len(whole.ids) > longest)
    assert not cut.truncated or not cut.trained[-1] or cut.ids[-1] != encoder.stop_id or whole.trained[longest - 1]


@many
@given(text=said)
def test_a_text_is_trained_whole_and_ends(text: str, encoder: Encoder) -> None:
    sample = encoder.encode(Row(1, text=text))
    assert sample.trained == [False] + [True] * (len(sample.ids) - 1)
    assert sample.ids[-1] == encoder.tokenizer.eos_token_id
    assert decode(encoder.tokenizer, sample.ids).removesuffix(END).endswith(text.removesuffix(END))


@many
@given(given_samples=samples, share=st.sampled_from([0.0, 0.05, 0.5]), seed=st.integers(0, 3))
def test_a_corpus_gives_back_what_it_took_and_is_split_without_rest(
    given_samples: list[Sample], share: float, seed: int
) -> None:
    corpus = feed.Corpus()
    for sample in given_samples:
        corpus.add(sample)
    assert [corpus[place] for place in range(len(corpus))] == [(sample.ids, sample.labels) for sample in given_samples]
    assert corpus.trained(range(len(corpus))) == sum(sum(sample.trained) for sample in given_samples)
    trained, held = feed.split(corpus, share, seed)
    assert sorted([*trained, *held]) == list(range(len(corpus))) and len(trained) >= 1
    marks = [corpus.mark(place) for place in range(len(corpus))]
    assert not {marks[place] for place in trained} & {marks[place] for place in held}
    assert not share or len(set(marks)) < len(marks) or len(corpus) == 1 or len(held) >= 1
    deck = feed.Deck(corpus, feed.Each(trained, lambda place: (place,)), 3 * len(trained), seed)
    wanted = sorted(corpus[place] for place in trained)
    dealt = [deck[index] for index in range(len(deck))]
    for start in range(0, len(deck), len(trained)):
        assert sorted(row[0] for row in dealt[start : start + len(trained)]) == wanted
    # Whoever asks in another order, as a run that goes on does, is dealt the same.
    again = feed.Deck(corpus, [(place,) for place in trained], 3 * len(trained), seed)
    assert [again[index] for index in reversed(range(len(deck)))] == dealt[::-1]


@many
@given(given_samples=samples, padding=st.integers(0, 99), longest=st.integers(12, 40))
def test_padding_is_never_learnt_and_packed_samples_never_meet(
    given_samples: list[Sample], padding: int, longest: int
) -> None:
    corpus = feed.Corpus()
    for sample in given_samples:
        corpus.add(sample)
    plain = feed.collator(padding)([[corpus[place]] for place in range(len(corpus))])
    for row, sample in enumerate(given_samples):
        size = len(sample.ids)
        assert plain["input_ids"][row, :size].tolist() == sample.ids
        assert plain["labels"][row, :size].tolist() == sample.labels
        assert plain["attention_mask"][row].tolist() == [1] * size + [0] * (plain["input_ids"].shape[1] - size)
        assert (plain["labels"][row, size:] == IGNORED).all() and (plain["input_ids"][row, size:] == padding).all()
    rows = feed.pack(corpus, range(len(corpus)), longest)
    assert sorted(place for row in rows for place in row) == list(range(len(corpus)))
    assert all(sum(corpus.tokens(place) for place in row) <= longest for row in rows)
    packed = feed.collator(padding, torch.float32)([[corpus[place] for place in row] for row in rows])
    sees = packed["attention_mask"][:, 0] == 0
    for number, row in enumerate(rows):
        start = 0
        for place in row:
            size = corpus.tokens(place)
            part = slice(start, start + size)
            assert packed["position_ids"][number, part].tolist() == list(range(size))
            assert packed["labels"][number, part].tolist() == given_samples[place].labels
            assert torch.equal(sees[number, part, part], torch.ones(size, size, dtype=torch.bool).tril())
            assert not sees[number, part, :start].any() and not sees[number, part, start + size :].any()
            start += size
        assert (packed["labels"][number, start:] == IGNORED).all()


def test_a_file_read_twice_gives_the_same_samples_and_no_file_is_left(tmp_path: Path, encoder: Encoder) -> None:
    path = tmp_path / "set.jsonl"
    rows = [{"prompt": f"question {n}", "completion": f"answer {n % 7}"} for n in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = (feed.read(path, encoder, ColumnMap(), tmp_path)[0] for _ in range(2))
    assert [one[place] for place in range(50)] == [two[place] for place in range(50)]
    assert [file.name for file in tmp_path.iterdir()] == ["set.jsonl"]
