"""Conversations cleaned, and cut to the context with exact counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibble.errors import NibbleError
from nibble.prompts import clean, fit


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def words(messages):
    """A tokenizer for tests: one id a word, and two around each message."""
    return [0] * sum(len(message["content"].split()) + 2 for message in messages)


def talk(turns: int, length: int = 3, prompt: str = "") -> list:
    said = [message for n in range(turns) for message in (user(f"q{n} " * length), assistant(f"a{n} " * length))]
    return [*([system(prompt)] if prompt else []), *said, user("last " * length)]


def test_a_conversation_that_fits_to_the_token_keeps_all():
    messages = talk(4, prompt="be kind")
    length = len(words(messages))
    assert fit(messages, words, length + 1).dropped_turns == 0
    assert len(fit(messages, words, length + 1).ids) == length
    assert fit(messages, words, length).dropped_turns == 1
    assert fit(messages, words, length + 1, reserve=2).dropped_turns == 1


@given(st.integers(0, 30), st.integers(1, 5), st.booleans(), st.integers(20, 400), st.integers(1, 10))
def test_as_few_turns_as_possible_are_dropped_and_the_system_prompt_never(turns, length, prompted, context, reserve):
    messages = talk(turns, length, "be kind" if prompted else "")
    seen = []

    def encode(kept):
        seen.append(kept)
        return words(kept)

    fitted = fit(messages, encode, context, reserve)
    start = 1 if prompted else 0
    expected = [*messages[:start], *messages[start + 2 * fitted.dropped_turns :]]
    assert len(fitted.ids) == len(words(expected))
    assert len(fitted.ids) <= context - reserve or fitted.dropped_turns == turns
    if fitted.dropped_turns:
        one_more = [*messages[:start], *messages[start + 2 * (fitted.dropped_turns - 1) :]]
        assert len(words(one_more)) > context - reserve
    assert all(kept[:start] == messages[:start] and kept[-1] == messages[-1] for kept in seen)


def test_ten_times_the_context_is_cut_with_few_counts():
    messages, counted = talk(1000), []

    def encode(kept):
        counted.append(len(kept))
        return words(kept)

    assert fit(messages, encode, 1000).dropped_turns > 890
    assert len(counted) < 15


def test_the_last_message_alone_may_use_what_was_kept_for_the_answer():
    fitted = fit([user("w " * 90)], words, 100, reserve=50)
    assert len(fitted.ids) == 92


@pytest.mark.parametrize(("length", "fits"), [(96, True), (97, True), (98, False), (1000, False)])
def test_a_message_longer_than_the_context_is_told_in_numbers(length, fits):
    messages = [*talk(2), user("w " * length)][4:]
    if fits:
        assert len(fit([user("w " * length)], words, 100).ids) == length + 2
        return
    with pytest.raises(NibbleError, match=rf"{length + 2:,} tokens with the system prompt, room for 99\."):
        fit(messages[-1:], words, 100)


def test_what_no_tokenizer_takes_is_removed():
    assert clean([user("a\0b\ud800c\udfffd 👍")]) == [user("abcd 👍")]


def test_messages_of_one_role_in_a_row_become_one_and_empty_ones_go():
    messages = [system(" "), user("first"), assistant(""), user("second"), assistant("yes"), user("third")]
    assert clean(messages) == [user("first\n\nsecond"), assistant("yes"), user("third")]


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "There is no message to answer."),
        ([user("a"), assistant("b")], "There is no message to answer."),
        ([user("")], "The message is empty."),
        ([user(" \n\0")], "The message is empty."),
        ([user("\ud800")], "The message is empty."),
        ([{"role": "tool", "content": "x"}], "There is no role 'tool'."),
        ([{"role": "user"}], "A message of user is not text."),
        ([user([{"type": "text", "text": "x"}])], "A message of user is not text."),
        ([assistant("a"), user("b")], "The messages are no conversation."),
        ([user("a"), system("b"), user("c")], "The messages are no conversation."),
        ([user("x" * 5_000_000)], "The message is too long: 5,000,000 characters"),
    ],
)
def test_what_is_no_conversation_is_told_in_a_sentence(messages, sentence):
    with pytest.raises(NibbleError) as caught:
        clean(messages)
    assert caught.value.message.startswith(sentence)
    assert caught.value.hint
