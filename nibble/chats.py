"""Conversations on disk: one owner each, one JSON file each, written whole or not at all.

Promises that no owner reaches another's files, that no name or id leads out of `home/chats`, and that what two tabs
write to one chat is never lost: the later one becomes a chat of its own. Knows nothing of how answers are made.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from nibble.engines.base import Message
from nibble.errors import NibbleError

log = logging.getLogger(__name__)

ID = re.compile(r"[0-9a-f]{16}")
MAX_BYTES = 64 * 2**20
TITLE_LENGTH = 60


class ChatGone(NibbleError):
    """A chat that is not there, or no longer."""


@dataclass
class Turn:
    """A message, and for an answer how it was made."""

    role: Literal["user", "assistant"]
    content: str
    model: str = ""
    format: str = ""
    adapter: str = ""
    """What the model wore."""
    lost_adapter: str = ""
    """What it was to wear, and what was not there any more."""
    sampling: dict[str, float | None] = field(default_factory=dict)
    """Fields of `Sampling` that were set."""
    tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    dropped_turns: int = 0
    tokens_per_s: float = 0.0
    first_token_s: float | None = None
    finish_reason: str = ""
    """Empty where the answer broke off."""
    error: str = ""
    """The sentence with which it broke off."""
    error_kind: str = ""
    """Name of the error's class."""


@dataclass
class Conversation:
    """A chat: its system prompt and its turns, oldest first."""

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    title: str = ""
    """What its owner called it; empty takes the first line said."""
    system: str = ""
    adapter: str = ""
    """Name of the adapter that the model wears in it; empty is none."""
    turns: list[Turn] = field(default_factory=list)
    created: float = field(default_factory=time.time)
    """Seconds since 1970."""
    updated: float = 0.0
    revision: int = 0
    """How often it was saved; 0 never."""

    @property
    def name(self) -> str:
        """Its title, or the first line that the user said; empty for an empty chat."""
        said = next((turn.content for turn in self.turns if turn.role == "user"), "")
        line = self.title or next((line.strip() for line in said.splitlines() if line.strip()), "")
        return line if len(line) <= TITLE_LENGTH else f"{line[: TITLE_LENGTH - 1].rstrip()}…"

    def messages(self) -> list[Message]:
        """The conversation as an engine takes it."""
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system.strip() else []
        said: list[Message] = [{"role": turn.role, "content": turn.content} for turn in self.turns]
        return system + said


@dataclass(frozen=True)
class Entry:
    """A chat in the list."""

    id: str
    name: str
    updated: float


class ChatStore:
    """The chats under `home/chats`. Methods may be called from any thread and by several servers at once."""

    def __init__(self, home: Path) -> None:
        self._root = home / "chats"

    def list(self, owner: str) -> list[Entry]:
        """An owner's chats, the one changed last first. A torn or foreign file is left out, with a line in the log."""
        found = []
        for path in self._folder(owner).glob("*.json"):
            if ID.fullmatch(path.stem):
                try:
                    chat = _read(path)
                except ChatGone as error:
                    log.warning("left out of the list: %s", error)
                else:
                    found.append(Entry(chat.id, chat.name, chat.updated))
        return sorted(found, key=lambda entry: entry.updated, reverse=True)

    def load(self, owner: str, chat_id: str) -> Conversation:
        """A chat.

        Raises:
            ChatGone: the owner has none of that id, or its file is torn.
        """
        return _read(self._path(owner, chat_id))

    def save(self, owner: str, chat: Conversation) -> None:
        """Write a chat whole; its revision and time of change are set.

        Where another tab saved the same chat since this one was loaded, this one gets a new id: both are kept.

        Raises:
            ChatGone: it was deleted since it was loaded.
            NibbleError: the disk does not take it.
        """
        path = self._path(owner, chat.id)
        with self._locked(owner):
            if chat.revision:
                there = _read(path).revision  # deleted meanwhile: stays deleted
                if there != chat.revision:
                    chat.id, chat.revision = secrets.token_hex(8), 0
                    path = self._path(owner, chat.id)
            chat.revision += 1
            chat.updated = max(time.time(), chat.created)
            _write(path, to_json(chat))

    def rename(self, owner: str, chat_id: str, title: str) -> None:
        """Call a chat something else; an empty title takes its first line again.

        Raises:
            ChatGone: there is none of that id.
        """
        with self._locked(owner):
            path = self._path(owner, chat_id)
            chat = _read(path)
            chat.title = " ".join(title.split())[:TITLE_LENGTH]
            chat.revision += 1
            _write(path, to_json(chat))

    def delete(self, owner: str, chat_id: str) -> None:
        """Remove a chat; does nothing where it is gone already."""
        with self._locked(owner):
            self._path(owner, chat_id).unlink(missing_ok=True)

    def _folder(self, owner: str) -> Path:
        return self._root / hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def _path(self, owner: str, chat_id: str) -> Path:
        if not ID.fullmatch(chat_id):
            raise ChatGone("There is no such chat.", "Choose one from the list.")
        return self._folder(owner) / f"{chat_id}.json"

    @contextlib.contextmanager
    def _locked(self, owner: str) -> Iterator[None]:
        folder = self._folder(owner)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise _disk(error) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left_over in folder.glob(".*.tmp-*"):  # by a server that was killed: nobody else writes here now
                left_over.unlink(missing_ok=True)
            yield
        finally:
            os.close(lock)


def to_json(chat: Conversation) -> str:
    """A chat with all that is known of it, as indented JSON."""
    return json.dumps(asdict(chat), ensure_ascii=False, indent=1) + "\n"


def to_markdown(chat: Conversation) -> str:
    """A chat to be read: its system prompt, and under each answer who gave it, how, and how fast."""
    when = datetime.fromtimestamp(chat.created, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    parts = [f"# {chat.name or 'Chat'}", f"*{when}*"]
    if chat.system.strip():
        parts += ["## System prompt", chat.system.strip()]
    for turn in chat.turns:
        parts += [f"## {'User' if turn.role == 'user' else 'Assistant'}", turn.content.strip()]
        if turn.role == "assistant":
            parts.append(f"*{_facts(turn)}*")
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(turn: Turn) -> str:
    parts = [f"{turn.model} {turn.format}".strip()]
    parts += [f"{name} {value:g}" for name, value in turn.sampling.items() if value is not None]
    parts += [f"{turn.tokens} tokens", f"{turn.tokens_per_s:.1f} tokens/s"] if turn.tokens else []
    parts += [f"first token {turn.first_token_s:.2f} s"] if turn.first_token_s is not None else []
    parts += [f"{turn.reused_tokens} of {turn.prompt_tokens} prompt tokens reused"] if turn.reused_tokens else []
    parts += [f"{turn.dropped_turns} oldest turns left out"] if turn.dropped_turns else []
    return " · ".join(part for part in [*parts, turn.finish_reason, turn.error] if part)


def _read(path: Path) -> Conversation:
    gone = ChatGone(f"The chat {path.stem} cannot be read.", "Choose another one from the list, or begin a new one.")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise gone
        value = json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
        chat = _conversation(value)
    except FileNotFoundError:
        raise ChatGone("This chat no longer exists.", "Choose another one from the list.") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise gone from None
    if chat.id != path.stem:
        raise gone
    return chat


def _conversation(value: Any) -> Conversation:
    """The chat in parsed JSON; fields of a later version are ignored.

    Raises:
        TypeError, KeyError, ValueError: it is none.
    """
    turns = [Turn(**_known(Turn, turn)) for turn in value["turns"]]
    chat = Conversation(**{**_known(Conversation, value), "turns": turns})
    texts = [
        chat.id,
        chat.title,
        chat.system,
        chat.adapter,
        *(text for turn in turns for text in (turn.content, turn.error)),
    ]
    numbers = [chat.created, chat.updated, chat.revision]
    if not all(isinstance(text, str) for text in texts) or not all(
        isinstance(number, (int, float)) for number in numbers
    ):
        raise TypeError
    if any(turn.role not in ("user", "assistant") for turn in turns):
        raise ValueError
    return chat


def _known(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    return {item.name: value[item.name] for item in fields(kind) if item.name in value}


def _write(path: Path, text: str) -> None:
    """Put a file in place whole or not at all, and make sure that it stays after a power cut."""
    beside = path.with_name(f".{path.stem}.tmp-{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(text.encode("utf-8", "surrogatepass"))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise _disk(error) from None


def _disk(error: OSError) -> NibbleError:
    return NibbleError(
        f"The chat could not be saved: {error.strerror}.", "Free some disk space, or check the home folder."
    )
