"""The engine in a child process: a real model for what works, a scripted child for what breaks."""

import asyncio
import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import nibble.engines.threaded as threaded
from nibble.engines.base import Chunk, LoadSpec, Sampling
from nibble.engines.worker import COMMAND, WorkerEngine
from nibble.errors import EngineDied, FormatError, ModelError, NibbleError

ROOT = Path(__file__).parents[1]
ONCE = "Once upon a time"


def user(text: str) -> list:
    return [{"role": "user", "content": text}]


def ask(engine, messages, **sampling) -> str:
    chunks = list(engine.stream(messages, Sampling(**sampling), threading.Event()))
    assert chunks[-1].finish_reason
    return "".join(chunk.text for chunk in chunks)


async def aask(engine, messages, stop=None, visitor=None, **sampling) -> tuple[str, list[Chunk]]:
    stream = engine.astream(messages, Sampling(**sampling), stop or threading.Event(), visitor)
    chunks = [chunk async for chunk in stream]
    return "".join(chunk.text for chunk in chunks), chunks


def spec(stories: Path, **more) -> LoadSpec:
    return LoadSpec(str(stories), **{"low_bit": "", "dtype": "float32", **more})


@pytest.fixture(scope="module")
def engine(stories: Path) -> Iterator[WorkerEngine]:
    engine = WorkerEngine(spec(stories, name="stories"))
    engine.load()
    yield engine
    engine.close()


@pytest.fixture
def scripted() -> Iterator:
    """Makes engines whose child has a fault."""
    made = []

    def make(fault: str) -> WorkerEngine:
        command = [sys.executable, "-m", "tests.scripted_child", fault]
        made.append(WorkerEngine(LoadSpec("/nowhere"), command))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def gone(pid: int) -> bool:
    # One look, not two: between "is it there" and "what is it" the process may go.
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(condition, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_the_text_is_that_of_the_engine_in_this_process(engine, stories):
    from nibble.engines.local import LocalEngine

    local = LocalEngine.load(stories, "", dtype="float32")
    for prompt in (ONCE, "你好 👍", "a\ud800b"):
        assert ask(engine, user(prompt), max_new_tokens=40) == ask(local, user(prompt), max_new_tokens=40)
    assert asyncio.run(aask(engine, user(ONCE), max_new_tokens=40))[0] == ask(local, user(ONCE), max_new_tokens=40)
    local.close()


def test_the_page_learns_what_is_loaded_and_never_imports_torch(stories):
    code = (
        "import sys\nfrom nibble.engines.base import *\nfrom nibble.engines.worker import WorkerEngine\n"
        "import nibble.engines.host, nibble.chats, threading\n"
        f"engine = WorkerEngine(LoadSpec({str(stories)!r}, '', dtype='float32', name='small'))\n"
        "assert engine.known is None\n"
        "messages, stop = [{'role': 'user', 'content': 'Hi'}], threading.Event()\n"
        "assert list(engine.stream(messages, Sampling(max_new_tokens=2), stop))\n"
        "info = engine.known\nassert info.model == 'small' and info.memory_bytes > 1e7 and info.context == 512, info\n"
        "engine.close()\n"
        "print(*sorted({'torch', 'transformers', 'tokenizers', 'numpy'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "", "")


def test_twenty_visitors_at_once_get_their_own_answers_and_see_their_place(engine):
    names = [f"Tom{number}" for number in range(20)]
    wanted = {name: ask(engine, user(f"{name} said"), max_new_tokens=25) for name in names}

    async def everyone():
        return await asyncio.gather(
            *(aask(engine, user(f"{name} said"), visitor=name, max_new_tokens=25) for name in names)
        )

    answers = asyncio.run(everyone())
    assert {name: text for name, (text, _) in zip(names, answers, strict=True)} == wanted
    assert max(chunk.place for _, chunks in answers for chunk in chunks) > 10
    assert engine.waiting == 0


def test_one_who_asks_ten_times_does_not_hold_up_another(engine):
    finished: list[str] = []

    async def one(visitor: str) -> None:
        await aask(engine, user(ONCE), visitor=visitor, max_new_tokens=60)
        finished.append(visitor)

    async def both():
        busy = [asyncio.create_task(one("busy")) for _ in range(10)]
        await asyncio.sleep(0)
        await asyncio.gather(*busy, one("other"))

    asyncio.run(both())
    assert finished.index("other") <= 2


@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_a_stop_ends_one_request_and_keeps_its_text(engine, tokens):
    async def stopped():
        stop = threading.Event()
        text, last = "", Chunk()
        async for chunk in engine.astream(user(ONCE), Sampling(max_new_tokens=480, temperature=1.0), stop):
            text, last = text + chunk.text, chunk
            if chunk.tokens >= tokens:
                stop.set()
        return text, last

    async def both():
        return await asyncio.gather(stopped(), aask(engine, user("Tom"), max_new_tokens=30))

    (text, last), (other, chunks) = asyncio.run(both())
    assert last.finish_reason == "stopped"
    assert last.tokens >= tokens
    assert chunks[-1].finish_reason in ("length", "stop")
    assert wait_for(lambda: engine.waiting == 0)


def test_a_reader_that_goes_away_frees_its_place(engine):
    async def leave():
        stream = engine.astream(user(ONCE), Sampling(max_new_tokens=480, temperature=1.0), threading.Event())
        async for chunk in stream:
            if chunk.tokens > 3:
                break
        await stream.aclose()

    asyncio.run(leave())
    assert wait_for(lambda: engine.waiting == 0)
    assert ask(engine, user(ONCE), max_new_tokens=5)


def test_an_error_of_one_request_keeps_its_kind_and_leaves_the_others(engine):
    with pytest.raises(NibbleError, match="The message is empty") as caught:
        ask(engine, user(" "))
    assert caught.value.hint
    assert ask(engine, user(ONCE), max_new_tokens=5)


def test_a_killed_child_is_one_sentence_for_everyone_and_the_next_message_starts_it_again(engine):
    before, pid = ask(engine, user(ONCE), max_new_tokens=30), engine.pid

    async def victim() -> str:
        text = ""
        try:
            async for chunk in engine.astream(user(ONCE), Sampling(max_new_tokens=480), threading.Event()):
                text += chunk.text
                if chunk.tokens == 10:
                    os.kill(engine.pid, signal.SIGKILL)
        except EngineDied as error:
            return f"{error.message}|{error.hint}"
        return "not told"

    async def everyone():
        return await asyncio.gather(*(victim() for _ in range(3)))

    told = asyncio.run(everyone())
    assert len(set(told)) == 1
    assert wait_for(lambda: gone(pid))
    assert "probably because memory ran out" in told[0] and "next message starts it again" in told[0]
    text, chunks = asyncio.run(aask(engine, user(ONCE), max_new_tokens=30))
    assert text == before
    assert chunks[0].loading


def test_what_cannot_be_loaded_is_told_as_the_child_told_it(tmp_path, stories):
    for wrong, kind, words in (
        (LoadSpec(str(tmp_path / "nowhere")), ModelError, "nowhere"),
        (spec(stories, low_bit="sym_int3"), FormatError, "sym_int3"),
    ):
        engine = WorkerEngine(wrong)
        with pytest.raises(kind, match=words) as caught:
            engine.load()
        assert caught.value.hint
        with pytest.raises(kind, match=words):
            ask(engine, user("Hi"))
        engine.close()


def test_a_command_that_is_not_there_is_a_sentence():
    engine = WorkerEngine(LoadSpec("/nowhere"), ["/nowhere/python"])
    with pytest.raises(NibbleError, match="cannot be started"):
        engine.load()
    engine.close()


def test_closing_while_it_loads_ends_it_too(stories):
    engine = WorkerEngine(spec(stories))
    future = engine.start()
    assert wait_for(lambda: engine.pid is not None)
    pid = engine.pid
    engine.close()
    assert gone(pid)
    with pytest.raises(NibbleError, match="unloaded"):
        future.result(5)


def test_the_child_ends_when_its_parent_is_killed(stories):
    code = (
        "import sys, time\nfrom nibble.engines.base import *\nfrom nibble.engines.worker import WorkerEngine\n"
        f"engine = WorkerEngine(LoadSpec({str(stories)!r}, ''))\nengine.load()\n"
        "print(engine.pid, flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert not gone(child)
    parent.kill()
    parent.wait()
    assert wait_for(lambda: gone(child), 5)


NOISE = """
import os, sys
print("a library prints")
os.system("echo a program prints")
sys.stdout.flush()
from nibble.engines import child
load = child.load
def noisy(spec):
    print('{"id": 1}')
    os.write(1, b"raw")
    assert sys.stdin.read() == ""
    return load(spec)
child.load = noisy
os._exit(child.main())
"""


def test_the_life_of_a_child(stories):
    engine = WorkerEngine(spec(stories), [sys.executable, "-c", NOISE])
    # A thread that ends does not take the child with it, and what libraries print does not disturb the protocol.
    thread = threading.Thread(target=engine.load)
    thread.start()
    thread.join()
    time.sleep(0.3)
    assert ask(engine, user(ONCE), max_new_tokens=3)
    assert engine.known.warmup_s > 0
    # Closing ends the child, and the requests that are open with a sentence.
    pid, told = engine.pid, []

    def reader() -> None:
        try:
            ask(engine, user(ONCE), max_new_tokens=480, temperature=1.0)
        except NibbleError as error:
            told.append(str(error))

    readers = [threading.Thread(target=reader) for _ in range(3)]
    for thread in readers:
        thread.start()
    assert wait_for(lambda: engine.waiting == 3)
    engine.close()
    engine.close()
    for thread in readers:
        thread.join(10)
    assert gone(pid)
    assert len(told) == 3 and all("unloaded" in sentence for sentence in told)
    with pytest.raises(NibbleError, match="unloaded"):
        engine.start()


@pytest.mark.parametrize("fault", ["dies while loading", "exits while loading"])
def test_a_child_that_dies_while_loading_is_a_sentence(scripted, fault):
    with pytest.raises(EngineDied, match="killed by the system|exit code 3"):
        scripted(fault).load()


def test_a_crash_names_its_signal(scripted):
    with pytest.raises(EngineDied, match="SIGSEGV"):
        ask(scripted("crashes"), user("Hi"))


@pytest.mark.parametrize("fault", ["floods its log", "prints", "none"])
def test_noise_and_chunks_that_nobody_asked_for_change_nothing(scripted, fault):
    engine = scripted(fault)
    assert ask(engine, user("Hi")) == "fine"
    assert ask(engine, user("Hi")) == "fine"


def test_a_model_that_no_longer_moves_is_ended_and_told(scripted, monkeypatch):
    monkeypatch.setattr(threaded, "STALL_S", 0.5)
    engine = scripted("stalls")
    engine.load()
    pid = engine.pid
    with pytest.raises(EngineDied, match="has not moved"):
        ask(engine, user("Hi"))
    assert engine.pid != pid  # at once: whoever asks next must not meet a process on its way out
    assert wait_for(lambda: gone(pid))
    with pytest.raises(EngineDied, match="has not moved"):
        asyncio.run(aask(engine, user("Hi")))


def test_a_stop_is_answered_though_the_child_is_stuck(scripted):
    stop, chunks = threading.Event(), []
    for chunk in scripted("stalls").stream(user("Hi"), Sampling(), stop):
        chunks.append(chunk)
        if chunk.tokens:
            stop.set()
    assert chunks[-1].finish_reason == "stopped"
    assert "".join(chunk.text for chunk in chunks) == "a"


def test_a_child_that_will_not_end_is_made_to(scripted):
    engine = scripted("does not end")
    stream = engine.stream(user("Hi"), Sampling(), threading.Event())
    while not next(stream).tokens:
        pass
    pid = engine.pid
    engine.close()
    assert gone(pid)


def test_nobody_who_waits_for_the_load_can_cancel_it_for_the_others(scripted):
    engine = scripted("none")
    assert not engine.start().cancel()
    assert isinstance(engine.start(), concurrent.futures.Future)
    assert engine.load().model == "m"


def test_the_command_is_ours():
    assert COMMAND[1:] == ("-m", "nibble.engines.child")
