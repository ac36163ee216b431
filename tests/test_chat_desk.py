"""Who has which conversation open, what is written into it, and what the model is shown of it."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from chat.desk import Desk
from chat.form import form_from
from chat.talk import Form, Progress, Visitor, messages, within
from chat.view import notices
from nibble.chats import ChatGone, Conversation, Turn
from nibble.config import Settings
from nibble.engines.base import Sampling
from nibble.errors import NibbleError
from tests.scripted import ScriptedHost

ANNA = Visitor("tab-a", "A" * 43, "en")
BORIS = Visitor("tab-b", "B" * 43, "en")
SCRIPT = Visitor("script", None, "en")


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(ScriptedHost(pause=0.002), Settings(home=str(tmp_path)))


def run(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(work())


async def say(desk: Desk, visitor: Visitor, text: str, at: int | None = None) -> Progress:
    """Say something and wait for the whole answer."""
    last = None
    async for progress in desk.say(visitor, text, Form(), at):
        last = progress
    assert last is not None
    return last


def test_conversations_are_their_owner_s(desk: Desk) -> None:
    async def work() -> None:
        said = await say(desk, ANNA, "mine")
        assert [entry.name for entry in await desk.entries(ANNA)] == ["mine"]
        assert await desk.entries(BORIS) == []
        with pytest.raises(ChatGone):
            await desk.open(BORIS, said.conversation.id)
        for number in ("", "../x", "f" * 16, said.conversation.id.upper() + "/"):
            with pytest.raises(ChatGone):
                await desk.open(ANNA, number)

    run(work)


def test_a_script_leaves_nothing_on_disk(desk: Desk, tmp_path: Path) -> None:
    run(lambda: say(desk, SCRIPT, "hello"))
    assert not (tmp_path / "chats").exists()


def test_an_edit_cuts_what_followed(desk: Desk) -> None:
    async def work() -> None:
        for text in ("one", "two", "three"):
            await say(desk, ANNA, text)
        conversation = (await say(desk, ANNA, "deux", at=2)).conversation
        assert [turn.content for turn in conversation.turns if turn.role == "user"] == ["one", "deux"]
        with pytest.raises(NibbleError):
            await say(desk, ANNA, "not a question of mine", at=1)

    run(work)


def test_undo_gives_the_message_back(desk: Desk) -> None:
    async def work() -> None:
        assert await desk.undo(ANNA) == (await desk.current(ANNA), "")
        await say(desk, ANNA, "one")
        await say(desk, ANNA, "two")
        conversation, text = await desk.undo(ANNA)
        assert text == "two"
        assert [turn.role for turn in conversation.turns] == ["user", "assistant"]

    run(work)


def test_what_another_tab_added_is_there_when_this_one_goes_on(desk: Desk) -> None:
    other_tab = Visitor("tab-a2", ANNA.token, "en")

    async def work() -> None:
        await say(desk, ANNA, "one")
        await desk.enter(other_tab)
        await say(desk, ANNA, "two")
        said = await say(desk, other_tab, "three")
        assert [turn.content for turn in said.conversation.turns if turn.role == "user"] == ["one", "two", "three"]
        assert len(await desk.entries(ANNA)) == 1

    run(work)


def test_an_answer_that_loses_its_reader_is_kept_as_far_as_it_came(desk: Desk) -> None:
    async def work() -> None:
        steps = desk.say(ANNA, "endless", Form())
        async for progress in steps:
            if "3 " in progress.text:
                break
        await steps.aclose()
        conversation = await desk.open(ANNA, (await desk.entries(ANNA))[0].id)
        assert conversation.turns[1].content.startswith("0 1 2 3 ")
        assert conversation.turns[1].finish_reason == "stopped"
        assert await say(desk, ANNA, "hello")

    run(work)


def test_leaving_stops_the_answer_of_that_session_alone(desk: Desk) -> None:
    async def work() -> None:
        async def long(visitor: Visitor) -> str:
            return (await say(desk, visitor, "endless")).text

        first, second = asyncio.create_task(long(ANNA)), asyncio.create_task(long(BORIS))
        await asyncio.sleep(0.2)
        desk.leave(ANNA.session)
        assert "4999" not in await first
        assert not second.done()
        desk.stop(BORIS)
        await second

    run(work)


def test_deleting_a_chat_in_writing_does_not_bring_it_back(desk: Desk) -> None:
    async def work() -> None:
        task = asyncio.create_task(say(desk, ANNA, "endless"))
        await asyncio.sleep(0.2)
        await desk.delete(ANNA)
        await task
        assert await desk.entries(ANNA) == []

    run(work)


def test_the_model_sees_neither_thoughts_nor_questions_that_got_no_answer() -> None:
    conversation = Conversation(
        system="Be kind.",
        turns=[
            Turn("user", "lost"),
            Turn("assistant", "", error="killed"),
            Turn("user", "one"),
            Turn("assistant", "<think>secret</think>two"),
            Turn("user", "only thought about"),
            Turn("assistant", "<think>hm"),
            Turn("user", "three"),
        ],
    )
    assert messages(conversation) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]


def test_within() -> None:
    assert within(Sampling(max_new_tokens=500), 100).max_new_tokens == 100
    assert within(Sampling(max_new_tokens=50), 100).max_new_tokens == 50
    assert within(Sampling(), 100).max_new_tokens is None


@pytest.mark.parametrize("empty", [None, "", "  "])
def test_a_field_left_empty_is_the_model_s_own(empty: str | None) -> None:
    assert form_from(ANNA, [empty] * 6, None) == Form()


def test_fields_as_typed() -> None:
    form = form_from(ANNA, ["128", " 0.7 ", "1", "40.0", "1.1", "7"], "Be brief.")
    assert form == Form(Sampling(128, 0.7, 1.0, 40, 1.1, 7), "Be brief.")


@pytest.mark.parametrize("value", ["abc", "nan", "inf", True, [], {}, "1e400", "12.5"])
def test_a_field_that_is_no_number_is_named(value: object) -> None:
    with pytest.raises(NibbleError, match="Longest answer|max_new_tokens"):
        form_from(ANNA, [value, None, None, None, None, None], None)


def test_a_chat_that_cannot_be_saved_is_answered_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "chats").write_text("a file stands where the folder should be", encoding="utf-8")
    desk = Desk(ScriptedHost(pause=0.002), Settings(home=str(tmp_path)))
    turns = run(lambda: say(desk, ANNA, "hello")).conversation.turns
    assert [turn.role for turn in turns] == ["user", "assistant"]
    assert turns[1].content and not turns[1].error
    assert "was not saved" in caplog.text


def test_each_conversation_has_its_own_adapter(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "adapters" / "mine").mkdir(parents=True)

    async def work() -> None:
        first = (await say(desk, ANNA, "one")).conversation
        await desk.wear(ANNA, "mine")
        assert desk.adapter(ANNA) == "mine"
        await say(desk, ANNA, "two")
        desk.begin(ANNA)
        await say(desk, ANNA, "three")
        # After a restart the first one still wears it.
        again = Desk(desk.host, Settings(home=str(tmp_path)))
        assert (await again.open(ANNA, first.id)).adapter == "mine"
        turns = (await say(again, ANNA, "four")).conversation.turns
        assert [turn.adapter for turn in turns if turn.role == "assistant"] == ["", "mine", "mine"]
        assert notices(turns[3], turns[1], "en") == ["From here on guide + mine (sym_int4) answers."]

    run(work)
    assert desk.host.worn == ["", "mine", "", "mine"]


def test_a_message_sent_at_once_meets_the_adapter(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "adapters" / "mine").mkdir(parents=True)

    async def work() -> None:
        await say(desk, ANNA, "one")
        for name in ("mine", "", "mine", ""):
            await asyncio.gather(desk.wear(ANNA, name), say(desk, ANNA, name or "none"))
        assert len(await desk.entries(ANNA)) == 1

    run(work)
    assert desk.host.worn == ["", "mine", "", "mine", ""]


def test_an_adapter_that_is_gone_is_told_and_the_model_answers(desk: Desk) -> None:
    async def work() -> None:
        await desk.wear(ANNA, "gone")
        answer = (await say(desk, ANNA, "one")).conversation.turns[-1]
        assert (answer.lost_adapter, answer.adapter, answer.error) == ("gone", "", "")
        assert "gone is not here any more" in notices(answer, None, "en")[0]
        assert not (await say(desk, ANNA, "two")).conversation.turns[-1].lost_adapter

    run(work)
    assert desk.host.worn == ["", ""]


def test_strangers_choose_no_adapter(tmp_path: Path) -> None:
    desk = Desk(ScriptedHost(pause=0), Settings(home=str(tmp_path), public=True))

    async def work() -> None:
        async for progress in desk.say(SCRIPT, "hello", form_from(SCRIPT, [None] * 6, None, "mine")):
            last = progress
        assert "no adapter" in last.conversation.turns[-1].error

    run(work)
    with pytest.raises(NibbleError, match="no adapter"):
        form_from(SCRIPT, [None] * 6, None, "../mine")
