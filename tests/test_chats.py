"""Conversations on disk."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibble.chats import ChatGone, ChatStore, Conversation, Turn, to_json, to_markdown
from nibble.errors import NibbleError


def chat(text: str = "What is nf4?", **more) -> Conversation:
    answer = Turn(
        "assistant", "A format.", model="guide", format="sym_int4", sampling={"temperature": 0.5, "seed": None},
        tokens=3, prompt_tokens=20, reused_tokens=12, tokens_per_s=41.5, first_token_s=0.12, finish_reason="stop",
    )  # fmt: skip
    return Conversation(turns=[Turn("user", text), answer], **more)


@pytest.fixture
def store(tmp_path: Path) -> ChatStore:
    return ChatStore(tmp_path)


def files(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob("chats/*/*.json"))


def test_a_chat_comes_back_as_it_was(store, tmp_path):
    saved = chat("Ünïcode 你好 👍\n\tindented", system="Be brief.")
    store.save("ann", saved)
    assert store.load("ann", saved.id) == saved
    assert ChatStore(tmp_path).load("ann", saved.id) == saved


@given(st.text(), st.text(), st.text())
def test_any_text_comes_back(tmp_path_factory, system, question, title):
    store = ChatStore(tmp_path_factory.mktemp("home"))
    saved = Conversation(system=system, title=title, turns=[Turn("user", question)])
    store.save("ann", saved)
    assert store.load("ann", saved.id) == saved


def test_the_list_is_newest_first_and_named_by_the_first_line_said(store):
    for text in ("first", "\n  second line\nmore", "x" * 200):
        store.save("ann", chat(text))
    names = [entry.name for entry in store.list("ann")]
    assert names == ["x" * 59 + "…", "second line", "first"]


def test_owners_do_not_reach_each_other(store):
    saved = chat()
    store.save("ann", saved)
    assert store.list("bob") == []
    with pytest.raises(ChatGone):
        store.load("bob", saved.id)
    store.delete("bob", saved.id)
    assert store.load("ann", saved.id) == saved


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc/passwd", "a" * 17, "A" * 16, "0" * 15 + "/", "0" * 16 + "\n"]
)
def test_no_id_leads_anywhere_else(store, name):
    for act in (store.load, store.delete):
        with pytest.raises(ChatGone):
            act("ann", name)
    with pytest.raises(ChatGone):
        store.save("ann", Conversation(id=name))


@pytest.mark.parametrize("owner", ["../../x", "/", "a/b", "", "x" * 5000, "\ud800", "名"])
def test_no_owner_leads_out_of_home(store, tmp_path, owner):
    store.save(owner, chat())
    assert len(store.list(owner)) == 1
    assert [path.parent.parent for path in files(tmp_path)] == [tmp_path / "chats"]


def test_rename_and_delete(store):
    saved = chat()
    store.save("ann", saved)
    store.rename("ann", saved.id, "  My\nchat  ")
    assert store.list("ann")[0].name == "My chat"
    store.delete("ann", saved.id)
    store.delete("ann", saved.id)
    assert store.list("ann") == []
    with pytest.raises(ChatGone):
        store.rename("ann", saved.id, "x")


def test_what_two_tabs_write_to_one_chat_is_kept_twice(store):
    saved = chat()
    store.save("ann", saved)
    one, two = store.load("ann", saved.id), store.load("ann", saved.id)
    one.turns.append(Turn("user", "from one"))
    two.turns.append(Turn("user", "from two"))
    store.save("ann", one)
    store.save("ann", two)
    assert one.id == saved.id != two.id
    assert [store.load("ann", tab.id).turns[-1].content for tab in (one, two)] == ["from one", "from two"]
    store.save("ann", two)
    assert len(store.list("ann")) == 2


def test_a_chat_deleted_in_another_tab_stays_deleted(store):
    saved = chat()
    store.save("ann", saved)
    store.delete("ann", saved.id)
    with pytest.raises(ChatGone):
        store.save("ann", saved)
    assert store.list("ann") == []


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"7", b'{"turns": 3}', b'{"turns": [1]}',
     b'{"turns": [{"role": "tool", "content": ""}]}',
     b'{"turns": [{"role": "user", "content": 7}]}', b"\xff\xfe", b"[" * 100_000, b'{"turns": [], "id": "other"}'],
)  # fmt: skip
def test_a_torn_or_foreign_file_is_left_out_and_the_others_stay(store, tmp_path, content, caplog):
    good, bad = chat(), chat()
    store.save("ann", good)
    store.save("ann", bad)
    next(path for path in files(tmp_path) if path.stem == bad.id).write_bytes(content)
    (files(tmp_path)[0].parent / "notes.json").write_text("foreign")
    assert [entry.id for entry in store.list("ann")] == [good.id]
    assert bad.id in caplog.text
    with pytest.raises(ChatGone):
        store.load("ann", bad.id)


def test_a_file_of_a_later_version_is_read(store, tmp_path):
    saved = chat()
    store.save("ann", saved)
    path = files(tmp_path)[0]
    path.write_text(json.dumps({**json.loads(path.read_text()), "mood": "good"}))
    assert store.load("ann", saved.id) == saved


@pytest.mark.parametrize("fails", ["fsync", "open", "write", "replace"])
def test_a_disk_that_takes_nothing_leaves_the_chat_before_it(store, tmp_path, monkeypatch, fails):
    saved = chat()
    store.save("ann", saved)
    before = files(tmp_path)[0].read_bytes()

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    saved.turns.append(Turn("user", "more"))
    home = {"fsync": os, "open": os, "write": os, "replace": Path}[fails]
    with monkeypatch.context() as patch:
        patch.setattr(home, "fdopen" if fails == "write" else fails, refuse)
        with pytest.raises(NibbleError, match="No space left"):
            store.save("ann", saved)
    assert files(tmp_path)[0].read_bytes() == before
    assert [path.name for path in files(tmp_path)[0].parent.glob(".*tmp*")] == []


KILLED = """
import sys
from pathlib import Path
from nibble.chats import ChatStore, Turn
store = ChatStore(Path(sys.argv[1]))
chat = store.load("ann", sys.argv[2])
print("go", flush=True)
while True:
    chat.turns.append(Turn("user", "x" * 20000))
    store.save("ann", chat)
"""


def test_a_server_killed_while_saving_leaves_a_whole_chat(store, tmp_path):
    saved = chat()
    store.save("ann", saved)
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), saved.id],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        )
        process.stdout.readline()
        threading.Event().wait(0.05)
        process.kill()
        process.wait()
        assert store.load("ann", saved.id).turns[0].content == "What is nf4?"
    store.save("ann", chat())
    assert list(tmp_path.glob("chats/*/.*.tmp-*")) == []


def test_two_hundred_chats_and_eight_threads(store):
    def work(number: int) -> None:
        for count in range(25):
            store.save("ann", chat(f"{number} {count}"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({entry.name for entry in store.list("ann")}) == 200


def test_the_engine_gets_the_system_prompt_first_and_no_empty_one():
    assert chat(system="Be brief.").messages()[0] == {"role": "system", "content": "Be brief."}
    assert [message["role"] for message in chat(system=" ").messages()] == ["user", "assistant"]


def test_exports_tell_prompt_model_sampling_and_timing():
    saved = chat(system="Be brief.", title="On formats")
    markdown = to_markdown(saved)
    assert markdown.startswith("# On formats\n")
    for part in (
        "## System prompt\n\nBe brief.", "## User\n\nWhat is nf4?", "## Assistant\n\nA format.", "guide sym_int4",
        "temperature 0.5", "41.5 tokens/s", "first token 0.12 s", "12 of 20 prompt tokens reused", "stop",
    ):  # fmt: skip
        assert part in markdown
    assert "seed" not in markdown
    assert json.loads(to_json(saved))["turns"][1]["tokens_per_s"] == 41.5
