"""Which language a browser gets, and that no sentence is missing in either."""

import string

import pytest

from chat.words import EXAMPLES
from chat.words import WORDS as CHAT
from finetune_ui.words import WORDS as FINETUNE
from models_ui.words import WORDS as MODELS
from nibble.words import LANGUAGES, Words, language_of
from parts.words import WORDS as SHARED


@pytest.mark.parametrize(
    ("header", "language"),
    [
        (None, "en"),
        ("", "en"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("en-US,en;q=0.9,zh;q=0.8", "en"),
        ("zh", "zh"),
        ("ZH-hans-cn", "zh"),
        ("fr,de;q=0.9", "en"),
        ("fr,zh-TW;q=0.5,en;q=0.3", "zh"),
        ("en;q=0.1,zh;q=0.9", "zh"),
        ("zh;q=0", "en"),
        ("zh;q=much", "en"),
        (";;;,,,q=", "en"),
        ("*", "en"),
    ],
)
def test_language_of(header: str | None, language: str) -> None:
    assert language_of(header) == language


def test_a_key_without_both_languages_is_refused() -> None:
    with pytest.raises(ValueError, match="lonely"):
        Words({"lonely": ("only English",)})


@pytest.mark.parametrize("words", [CHAT, MODELS, FINETUNE, SHARED], ids=["chat", "models", "finetune", "shared"])
def test_both_languages_take_the_same_values(words: Words) -> None:
    tables = [words.of(language) for language in LANGUAGES]
    for key in tables[0]:
        names = [{name for _, name, _, _ in string.Formatter().parse(table[key]) if name} for table in tables]
        # A sentence may leave a value out, but never name one that nobody gives.
        assert names[1] <= names[0] or names[0] <= names[1], key
        assert all(table[key].strip() for table in tables), key


def test_no_key_stands_in_two_tables() -> None:
    """The fixed labels of all of them lie in one."""
    assert CHAT | MODELS | FINETUNE | SHARED


def test_there_are_two_english_and_two_chinese_examples_for_everyone() -> None:
    for language in LANGUAGES:
        chinese = [text for text in EXAMPLES[language] if any("一" <= letter <= "鿿" for letter in text)]
        assert (len(EXAMPLES[language]), len(chinese)) == (4, 2)
