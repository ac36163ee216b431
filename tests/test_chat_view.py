"""A conversation as the page shows it."""

import re
from dataclasses import replace

import pytest

from chat.view import Standing, close_fences, greeting, memory, notices, rows, split_thoughts, stats, status_line
from nibble.chats import Conversation, Turn
from tests.scripted import INFO

ANSWER = Turn(
    "assistant", "It is half a byte.", model="guide", format="sym_int4", tokens=112, tokens_per_s=24.31,
    first_token_s=0.214, reused_tokens=96, finish_reason="stop",
)  # fmt: skip


def texts(conversation: Conversation, live: str = "") -> list[str]:
    """The texts of all messages."""
    return [row["content"][0]["text"] for row in rows(conversation, "en", live)[0]]


def test_code_keeps_its_indentation() -> None:
    code = "    def f():\n        return 1\n"
    conversation = Conversation(turns=[Turn("user", code), replace(ANSWER, content=code)])
    said, answered = texts(conversation)
    assert said == code
    assert answered.startswith(code)


def test_messages_know_their_turns() -> None:
    thinking = replace(ANSWER, content="<think>hm</think>yes")
    conversation = Conversation(turns=[Turn("user", "a"), thinking, Turn("user", "b"), ANSWER])
    messages, places = rows(conversation, "en")
    assert [row["role"] for row in messages] == ["user", "assistant", "assistant", "user", "assistant"]
    assert places == [0, 1, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "thoughts", "said", "open_ended"),
    [
        ("plain", "", "plain", False),
        ("<think>a\nb</think>\n\nc", "a\nb", "c", False),
        ("<think>still", "still", "", True),
        ("<think>", "", "", True),
        ("<think></think>c", "", "c", False),
        ("<think>a</think>b<think>c</think>d", "a\n\nc", "bd", False),
        ("</think>c", "", "</think>c", False),
        ("a < think > b", "", "a < think > b", False),
    ],
)
def test_split_thoughts(text: str, thoughts: str, said: str, open_ended: bool) -> None:
    assert split_thoughts(text) == (thoughts, said, open_ended)


def test_a_thought_is_open_while_it_is_being_thought_and_closed_afterwards() -> None:
    conversation = Conversation(turns=[Turn("user", "a"), Turn("assistant", "<think>I won")])
    assert rows(conversation, "en", "10 tokens/s")[0][1]["metadata"] == {"title": "Thinking", "status": "pending"}
    assert rows(conversation, "en")[0][1]["metadata"] == {"title": "Thought", "status": "done"}
    assert rows(conversation, "zh")[0][1]["metadata"]["title"] == "思考过程"


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("a", "a"),
        ("```py\nx = 1", "```py\nx = 1\n```"),
        ("```py\nx = 1\n```", "```py\nx = 1\n```"),
        ("~~~\n```\n", "~~~\n```\n\n~~~"),
        ("````\n```\ncode", "````\n```\ncode\n````"),
        ("inline ``` here", "inline ``` here"),
    ],
)
def test_close_fences(text: str, closed: str) -> None:
    assert close_fences(text) == closed


def test_the_line_under_an_answer() -> None:
    assert stats(ANSWER, "en") == "24.3 tokens/s · first token 0.21 s · 112 tokens · 96 reused · complete"
    assert stats(ANSWER, "zh") == "24.3 词元/秒 · 首词元 0.21 秒 · 112 个词元 · 复用 96 · 完成"
    assert stats(Turn("assistant", "", finish_reason="stopped"), "en") == "stopped"
    assert stats(replace(ANSWER, finish_reason="length", tokens=1234), "en").endswith("reached the longest answer")


def test_notices_tell_of_a_cut_context_and_of_another_model() -> None:
    other = replace(ANSWER, model="Qwen2-1.5B", format="nf4", dropped_turns=3)
    said = notices(other, ANSWER, "en")
    assert "Qwen2-1.5B (nf4)" in said[0] and "left out: 3" in said[1]
    assert notices(ANSWER, ANSWER, "en") == []
    assert notices(ANSWER, None, "en") == []
    assert notices(Turn("assistant", "", error="x"), ANSWER, "en") == []


def test_an_error_stands_in_the_chat_and_the_text_before_it_stays() -> None:
    died = Turn("assistant", "Half of", error="The process was killed.", error_kind="EngineDied")
    conversation = Conversation(turns=[Turn("user", "a"), died])
    assert texts(conversation)[1].startswith('Half of\n\n<small class="notice error">')
    assert "重新启动" in rows(conversation, "zh")[0][1]["content"][0]["text"]
    assert "without a word" in texts(Conversation(turns=[Turn("user", "a"), Turn("assistant", " ")]))[1]


def test_our_markup_takes_no_foreign_markup() -> None:
    evil = "<img src=x onerror=alert(1)>\n\n<b>"
    turn = replace(ANSWER, content="ok", error=evil, model=evil, format="nf4")
    for row in rows(Conversation(turns=[ANSWER, Turn("user", "a"), turn]), "en")[0]:
        ours = re.findall(r"<small.*?</small>", row["content"][0]["text"], re.DOTALL)
        assert not any("<img" in part or "\n" in part for part in ours)
    info = replace(INFO, model=evil, reason=evil, note=evil)
    line = status_line(Standing("ready", info, "", evil, 0), "en")
    assert "<img" not in line and "<b>" not in line
    assert "<img" not in greeting(evil, "nf4", "en")


@pytest.mark.parametrize(
    ("state", "loading", "sentence", "shown"),
    [
        ("ready", "", "", "guide · sym_int4 · cpu bfloat16 · 212 MB · idle"),
        ("loading", "Qwen2", "", "loading Qwen2…"),
        ("empty", "", "", "no model is loaded"),
        ("failed", "", "It has no tokenizer.", "It has no tokenizer."),
    ],
)
def test_the_line_over_the_tabs(state: str, loading: str, sentence: str, shown: str) -> None:
    info = INFO if state == "ready" else None
    line = status_line(Standing(state, info, loading, sentence, 0), "en")
    assert shown in line
    assert (" open>" in line) is (state == "failed")
    busy = status_line(Standing("ready", INFO, "", "", 3), "en")
    assert "3 in work" in busy and "torch finds no accelerator" in busy


def test_memory_is_told_in_the_unit_that_fits() -> None:
    assert [memory(size) for size in (0, 212 * 2**20, 2**30, int(3.46 * 2**30))] == [
        "0 MB",
        "212 MB",
        "1.0 GB",
        "3.5 GB",
    ]
