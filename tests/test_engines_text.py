"""Token ids into text: joined pieces are the whole text, and no piece is taken back."""

import random
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer

from nibble.engines.text import UNKNOWN, DecoderFactory

SAMPLES = (
    "Hello,  world!\n\n\tindented()", "你好，世界！今天天气怎么样？", "こんにちは カタカナ 한국어 문장",
    "👨‍👩‍👧‍👦 family 🇫🇷 👍🏽 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "ภาษาไทย العربية עברית हिन्दी", "a\u0301 é ﷽ 𝔘𝔫𝔦 ᚠᛇ", "<think>so</think> answer", "ↄ\u200d\ufe0f…",
)  # fmt: skip

texts = st.lists(
    st.sampled_from(SAMPLES)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters=UNKNOWN), max_size=12),
    max_size=4,
)


@pytest.fixture(scope="module", params=["models/stories260K-hf", "tokenizers/llama2", "tokenizers/qwen2.5", "byt5"])
def kind(request, shared_data: Path):
    """A tokenizer and its decoders: SentencePiece with byte fallback twice, byte-level BPE, and one in pure Python."""
    if request.param == "byt5":
        tokenizer = ByT5Tokenizer()
    else:
        tokenizer = AutoTokenizer.from_pretrained(shared_data / request.param)
    return tokenizer, DecoderFactory(tokenizer)


def streamed(make, ids, context=()):
    """The joined text; asserts that it never had to be taken back."""
    decoder = make(context)
    pieces = [decoder.push(token) for token in ids]
    rest, whole = decoder.end()
    assert whole is None
    return pieces, "".join(pieces) + rest


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts)
def test_joined_pieces_are_the_full_decode(kind, parts):
    tokenizer, make = kind
    ids = tokenizer("".join(parts), add_special_tokens=False)["input_ids"]
    pieces, text = streamed(make, ids)
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any(UNKNOWN in piece for piece in pieces)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts)
def test_going_on_with_a_prompt_keeps_the_leading_space(kind, parts):
    tokenizer, make = kind
    before = tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]
    ids = tokenizer(" there " + "".join(parts), add_special_tokens=False)["input_ids"]
    _, text = streamed(make, ids, before[-4:])
    assert tokenizer.decode(before, skip_special_tokens=True) + text == tokenizer.decode(
        before + ids, skip_special_tokens=True
    )


def test_random_ids_end_as_the_full_decode(kind):
    tokenizer, make = kind
    chance = random.Random(0)
    for _ in range(100):
        ids = [chance.randrange(len(tokenizer)) for _ in range(40)]
        decoder = make()
        pieces = [decoder.push(token) for token in ids]
        rest, whole = decoder.end()
        assert (whole if whole is not None else "".join(pieces) + rest) == tokenizer.decode(
            ids, skip_special_tokens=True
        )


@pytest.mark.parametrize("character", ["你", "か", "한", "é", "😀"])
def test_a_character_comes_with_the_token_that_completes_it(kind, character):
    tokenizer, make = kind
    ids = tokenizer(character * 3, add_special_tokens=False)["input_ids"]
    decoder, text = make(), ""
    for count, token in enumerate(ids, start=1):
        text += decoder.push(token)
        # Whole characters of what was decoded so far, less one: a trailing piece may still be incomplete.
        assert len(text) >= tokenizer.decode(ids[:count], skip_special_tokens=True).count(character)
    assert text == tokenizer.decode(ids, skip_special_tokens=True)


def test_special_tokens_are_left_out_and_thoughts_stay(shared_data: Path):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen2.5")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids = tokenizer("<think>so</think>yes<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "soyes"
    assert streamed(DecoderFactory(tokenizer), ids)[1] == "<think>so</think>yes"


def test_decoding_in_many_threads_while_another_encodes_never_finds_it_borrowed(shared_data: Path):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen2.5")
    make = DecoderFactory(tokenizer)
    ids = tokenizer("你好 hello 👍🏽 " * 20)["input_ids"]
    failures: list[BaseException] = []

    def decode() -> None:
        try:
            for _ in range(30):
                streamed(make, ids)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=decode) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        # Each of these sets a field of the tokenizer's own backend, which needs it unborrowed.
        tokenizer("text", split_special_tokens=True)
        tokenizer("text", split_special_tokens=False, truncation=True, max_length=3)
    assert failures == []
