"""The one model that the page holds: exchanged while people chat. Children are scripted: each answers with its name."""

import asyncio
import os
import random
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest

import nibble.engines.host as host_module
from nibble.adapters import fingerprint
from nibble.config import Settings
from nibble.engines.base import Chunk, Sampling
from nibble.engines.host import ModelHost
from nibble.errors import EngineDied, FormatError, ModelError, NibbleError
from tests.support.adapters import make_adapter, sign

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def home(tmp_path: Path, stories: Path) -> Path:
    for name in ("one", "two", "slow", "bad", "long"):
        shutil.copytree(stories, tmp_path / "models" / name)
    return tmp_path


def run(home: Path, story, **settings):
    """Run a story with a host, and end the host."""

    async def told():
        host = ModelHost(
            Settings(home=str(home), **settings), [sys.executable, "-m", "tests.scripted_child", "says its name"]
        )
        try:
            return await asyncio.wait_for(story(host), 60)
        finally:
            await asyncio.to_thread(host.close)
            assert not host._alive or all(engine.pid is None for engine in host._alive)

    return asyncio.run(told())


async def ask(host: ModelHost, stop: threading.Event | None = None) -> tuple[str, list[Chunk]]:
    chunks = [chunk async for chunk in host.astream(HELLO, Sampling(), stop or threading.Event())]
    return "".join(chunk.text for chunk in chunks), chunks


def test_from_empty_to_ready_to_empty(home):
    async def story(host):
        assert (host.state, host.info, host.sentence) == ("empty", None, "")
        with pytest.raises(ModelError, match="No model is loaded"):
            await ask(host)
        info = await host.load("one")
        assert (host.state, info.model, host.info.model) == ("ready", "one", "one")
        assert (await ask(host))[0] == "one " * 10
        await host.unload()
        await host.unload()
        assert (host.state, host.info) == ("empty", None)

    run(home, story)


def test_a_chat_that_arrives_while_a_model_loads_waits_and_is_told_so(home):
    async def story(host):
        loading = asyncio.create_task(host.load("slow"))
        while host.state != "loading":
            await asyncio.sleep(0.01)
        assert host.loading == "slow"
        text, chunks = await ask(host)
        assert text == "slow " * 10
        assert chunks[0].loading and not chunks[-1].loading
        await loading

    run(home, story)


def test_a_chat_that_waits_for_a_model_can_be_stopped(home):
    async def story(host):
        loading = asyncio.create_task(host.load("slow"))
        await asyncio.sleep(0.1)
        stop = threading.Event()
        stop.set()
        assert (await ask(host, stop))[1][-1].finish_reason == "stopped"
        await loading

    run(home, story)


@pytest.mark.parametrize("room", [True, False], ids=["room for both", "room for one"])
def test_an_answer_that_runs_is_finished_by_the_model_that_began_it(home, monkeypatch, room):
    monkeypatch.setattr(host_module, "free_memory", lambda kind: 2**60 if room else 0)

    async def story(host):
        await host.load("one")
        answers = [asyncio.create_task(ask(host)) for _ in range(3)]
        await asyncio.sleep(0.05)
        await host.load("two")
        assert host.info.model == "two"
        texts = [text for text, _ in await asyncio.gather(*answers)]
        assert texts == ["one " * 10] * 3
        assert (await ask(host))[0] == "two " * 10

    run(home, story)


@pytest.mark.parametrize("room", [True, False], ids=["room for both", "room for one"])
def test_a_load_that_fails_leaves_the_model_before_it_answering(home, monkeypatch, room):
    monkeypatch.setattr(host_module, "free_memory", lambda kind: 2**60 if room else 0)

    async def story(host):
        await host.load("one")
        with pytest.raises(ModelError, match="bad cannot be loaded"):
            await host.load("bad")
        assert (host.state, host.sentence) == ("ready", "bad cannot be loaded. Take another.")
        assert (await ask(host))[0] == "one " * 10

    run(home, story)


def test_a_first_load_that_fails_is_told_to_whoever_asks(home):
    async def story(host):
        with pytest.raises(ModelError, match="bad"):
            await host.load("bad")
        assert host.state == "failed"
        with pytest.raises(ModelError, match="bad cannot be loaded"):
            await ask(host)
        assert (await host.load("one")).model == "one"
        assert (host.state, host.sentence) == ("ready", "")

    run(home, story)


def test_an_adapters_base_is_loaded_under_its_own_name(home):
    folder = make_adapter(home / "adapters" / "worn")
    sign(folder, "one", fingerprint(home / "models" / "one"))

    async def story(host):
        return await host.load("worn")

    assert run(home, story).model == "one"


def test_names_formats_and_paths_are_checked_before_anything_starts(home):
    async def story(host):
        for name, low_bit, kind in (
            ("nobody", "", ModelError), ("../one", "", ModelError), (str(home / "models" / "one"), "", ModelError),
            ("one", "sym_int3", FormatError),
        ):  # fmt: skip
            with pytest.raises(kind):
                await host.load(name, low_bit)
        assert host.state == "failed"
        assert not host._alive
        assert (await host.load(str(home / "models" / "one"), paths=True)).model == "one"

    run(home, story)


def test_a_killed_model_is_told_and_comes_back(home):
    async def story(host):
        await host.load("one")
        answer = asyncio.create_task(ask(host))
        await asyncio.sleep(0.05)
        os.kill(host._engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDied):
            await answer
        assert host.info.model == "one"
        assert (await ask(host))[0] == "one " * 10

    run(home, story)


def test_unloading_ends_an_answer_with_a_sentence(home):
    async def story(host):
        await host.load("long")
        answer = asyncio.create_task(ask(host))
        await asyncio.sleep(0.05)
        await host.unload()
        with pytest.raises(NibbleError, match="unloaded"):
            await answer

    run(home, story)


def test_a_load_goes_on_when_its_caller_goes_away(home):
    async def story(host):
        caller = asyncio.create_task(host.load("slow"))
        await asyncio.sleep(0.1)
        caller.cancel()
        text, _ = await ask(host)
        assert text == "slow " * 10

    run(home, story)


def test_loads_chats_and_stops_in_any_order_never_mix(home):
    chance = random.Random(1)

    async def chat(host) -> str:
        await asyncio.sleep(chance.random())
        stop = threading.Event()
        if chance.random() < 0.3:
            asyncio.get_running_loop().call_later(chance.random() / 5, stop.set)
        return (await ask(host, stop))[0]

    async def load(host) -> None:
        await asyncio.sleep(chance.random())
        name = chance.choice(["one", "two", "bad"])
        if name == "bad":
            with pytest.raises(ModelError):
                await host.load(name)
        else:
            await host.load(name)

    async def story(host):
        await host.load("one")
        *texts, _, _, _, _ = await asyncio.gather(*(chat(host) for _ in range(40)), *(load(host) for _ in range(4)))
        assert all(len(set(text.split())) <= 1 for text in texts)
        assert host.waiting == 0

    run(home, story)
