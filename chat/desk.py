"""Where visitors and the model meet: who has which conversation open, and which answers are being written.

Promises that a visitor sees conversations of their own only, that an answer which was stopped, failed or lost its
reader keeps its text, and that one conversation has one answer in writing at most. Runs in the event loop; the disk is
read in threads. Knows nothing of Gradio and nothing of processes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Protocol
from weakref import WeakValueDictionary

from chat.talk import Form, Progress, Visitor, check_message, last_question, live, messages, within
from nibble import operator
from nibble.border import sentence
from nibble.chats import ChatStore, Conversation, Entry, Turn
from nibble.config import Settings
from nibble.engines.base import Chunk, Message, Sampling
from nibble.errors import NibbleError
from nibble.library import has_adapter

log = logging.getLogger(__name__)

MOST_SEATS = 1_000


class Host(operator.Host, Protocol):
    """Whoever holds the model: `nibble.engines.host.ModelHost`."""

    @property
    def state(self) -> str: ...

    @property
    def sentence(self) -> str: ...

    @property
    def waiting(self) -> int: ...

    def close(self) -> None: ...

    def astream(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        stop: threading.Event,
        visitor: str | None = None,
        adapter: str = "",
    ) -> AsyncIterator[Chunk]: ...


@dataclass
class _Writing:
    """An answer in the making, and the session that reads it."""

    conversation: Conversation
    session: str
    stop: threading.Event = field(default_factory=threading.Event)


class Desk:
    """The conversations of all visitors, and the answers that are being written in them."""

    def __init__(self, host: Host, settings: Settings) -> None:
        self.host = host
        self._settings = settings
        self._store = ChatStore(settings.home_folder)
        self._open: OrderedDict[str, Conversation] = OrderedDict()
        self._writings: dict[str, _Writing] = {}
        self._changing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    # Which conversation is open.

    async def enter(self, visitor: Visitor, remembered: str = "") -> Conversation:
        """Sit down with the conversation remembered, else the latest, else a new one."""
        chats = [entry.id for entry in await self.entries(visitor)]
        if not chats:
            return self.begin(visitor)
        return await self.open(visitor, remembered if remembered in chats else chats[0])

    def begin(self, visitor: Visitor) -> Conversation:
        """Open a new conversation; it is kept from its first message on."""
        return self._sit(visitor, Conversation())

    async def open(self, visitor: Visitor, chat_id: str) -> Conversation:
        """Open one of the visitor's conversations, as it stands now.

        Raises:
            ChatGone: there is none of that id.
        """
        conversation = await asyncio.to_thread(self._store.load, visitor.owner, chat_id)
        writing = self._writings.get(chat_id)
        return self._sit(visitor, writing.conversation if writing else conversation)

    async def current(self, visitor: Visitor) -> Conversation:
        """The conversation that is open."""
        return self._open.get(visitor.session) or await self.enter(visitor)

    async def entries(self, visitor: Visitor) -> Sequence[Entry]:
        """The visitor's kept conversations, the one changed last first. A script's are not kept."""
        return await asyncio.to_thread(self._store.list, visitor.owner) if visitor.token else []

    async def delete(self, visitor: Visitor) -> Conversation:
        """Delete the conversation that is open; open the latest of the others."""
        conversation = await self.current(visitor)
        self.stop(visitor)
        await asyncio.to_thread(self._store.delete, visitor.owner, conversation.id)
        return await self.enter(visitor)

    def adapter(self, visitor: Visitor) -> str:
        """Name of the adapter that the model wears in the conversation that is open; empty where it wears none."""
        here = self._open.get(visitor.session)
        return here.adapter if here else ""

    async def wear(self, visitor: Visitor, adapter: str) -> Conversation:
        """From now on the model wears this adapter in the conversation that is open; empty is none.

        Raises:
            NibbleError: its answer is being written.
        """
        async with self._alone(visitor):
            conversation = await self._newest(visitor)
            conversation.adapter = adapter
            if conversation.revision:
                await asyncio.to_thread(self._keep, visitor, conversation)
        return conversation

    def leave(self, session: str) -> None:
        """The page was closed: end the answer that it was reading."""
        self._open.pop(session, None)
        for writing in self._writings.values():
            if writing.session == session:
                writing.stop.set()

    def _sit(self, visitor: Visitor, conversation: Conversation) -> Conversation:
        self._open[visitor.session] = conversation
        self._open.move_to_end(visitor.session)
        while len(self._open) > MOST_SEATS:
            self._open.popitem(last=False)
        return conversation

    def shows(self, visitor: Visitor, conversation: Conversation) -> bool:
        """Whether this is the conversation that the session has open."""
        return self._open.get(visitor.session) is conversation

    def writes(self, conversation: Conversation) -> bool:
        """Whether an answer is being written in it."""
        return any(writing.conversation is conversation for writing in self._writings.values())

    # What is said.

    async def say(self, visitor: Visitor, text: str, form: Form, at: int | None = None) -> AsyncGenerator[Progress]:
        """Add a message and stream its answer.

        Args:
            visitor: who asks.
            text: the message.
            form: what was set beside it.
            at: the turn to put it in place of, with all that followed; None adds it at the end.

        Raises:
            NibbleError: an empty or overlong message, a full server, an answer already in writing. What goes wrong
                while the answer is written stands in its turn instead.
        """
        check_message(text, visitor)
        conversation = await self._fresh(visitor)
        place = len(conversation.turns) if at is None else at
        if place < len(conversation.turns) and conversation.turns[place].role != "user":
            raise NibbleError(visitor.say("gone"))
        turns = [*conversation.turns[:place], Turn("user", text)]
        async with aclosing(self._write(visitor, conversation, turns, form)) as steps:
            async for step in steps:
                yield step

    async def again(self, visitor: Visitor, form: Form) -> AsyncGenerator[Progress]:
        """Answer the last message anew.

        Raises:
            NibbleError: as `say`; nothing was said yet.
        """
        conversation = await self._fresh(visitor)
        place = last_question(conversation)
        if place is None:
            raise NibbleError(visitor.say("empty"))
        async with aclosing(self._write(visitor, conversation, conversation.turns[: place + 1], form)) as steps:
            async for step in steps:
                yield step

    async def undo(self, visitor: Visitor) -> tuple[Conversation, str]:
        """Take the last message and its answer back; the message is returned.

        Raises:
            NibbleError: its answer is being written.
        """
        conversation = await self._fresh(visitor)
        place = last_question(conversation)
        if place is None:
            return conversation, ""
        text = conversation.turns[place].content
        conversation.turns = conversation.turns[:place]
        await asyncio.to_thread(self._keep, visitor, conversation)
        return conversation, text

    def stop(self, visitor: Visitor) -> bool:
        """End the answer that this session is reading, or that is written in the conversation it has open."""
        here = self._open.get(visitor.session)
        found = [
            writing
            for writing in self._writings.values()
            if writing.session == visitor.session or (here and writing.conversation is here)
        ]
        for writing in found:
            writing.stop.set()
        return bool(found)

    def _alone(self, visitor: Visitor) -> asyncio.Lock:
        """What keeps a message that is sent at once from meeting the conversation before an adapter was put on it."""
        return self._changing.setdefault(visitor.owner, asyncio.Lock())

    async def _fresh(self, visitor: Visitor) -> Conversation:
        """The open conversation, with what another tab added to it; nobody writes in it."""
        async with self._alone(visitor):
            return await self._newest(visitor)

    async def _newest(self, visitor: Visitor) -> Conversation:
        conversation = await self.current(visitor)
        if len(self._writings) >= self._settings.queue_size:
            raise NibbleError(visitor.say("full", value=len(self._writings)))
        if conversation.id in self._writings:
            raise NibbleError(visitor.say("busy"))
        if visitor.token and conversation.revision:
            conversation = self._sit(visitor, await asyncio.to_thread(self._store.load, visitor.owner, conversation.id))
        return conversation

    async def _write(
        self, visitor: Visitor, conversation: Conversation, turns: list[Turn], form: Form
    ) -> AsyncGenerator[Progress]:
        """Stream the answer to the last of `turns` into the conversation."""
        if conversation.id in self._writings:  # another call of this visitor was quicker
            raise NibbleError(visitor.say("busy"))
        writing = self._writings[conversation.id] = _Writing(conversation, visitor.session)
        key = conversation.id
        sampling = within(form.sampling, self._settings.max_new_tokens_limit)
        answer = Turn("assistant", "", sampling={k: v for k, v in asdict(sampling).items() if v is not None})
        try:
            conversation.turns = turns
            conversation.system = conversation.system if form.system is None else form.system
            await asyncio.to_thread(self._keep_quietly, visitor, conversation)
            question = messages(conversation)
            conversation.turns = [*turns, answer]
            self._dress(visitor, conversation, answer, form.adapter)
            yield Progress(conversation, visitor.say("reading"))
            stream = self.host.astream(question, sampling, writing.stop, visitor.owner, answer.adapter)
            async with aclosing(stream) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    self._take(answer, chunk)
                    yield Progress(conversation, "" if chunk.finish_reason else live(chunk, answer, visitor))
        except NibbleError as error:
            answer.error, answer.error_kind = str(error), type(error).__name__
        except Exception as error:  # noqa: BLE001 - the border of the chat: the turn must tell what became of it
            answer.error, answer.error_kind = sentence(error, visitor.language), "Internal"
        finally:
            writing.stop.set()
            if not answer.error and not answer.finish_reason:
                answer.finish_reason = "stopped"  # whoever read it has gone
            del self._writings[key]
            self._keep_quietly(visitor, conversation)
        yield Progress(conversation)

    def _dress(self, visitor: Visitor, conversation: Conversation, answer: Turn, adapter: str | None) -> None:
        """Settle what the model wears: what the form says, else the conversation's own where that is still there."""
        if adapter is not None:
            if adapter and self._settings.public:
                raise NibbleError(visitor.say("unknown_adapter", name=adapter))
            conversation.adapter = adapter
        elif conversation.adapter and not has_adapter(conversation.adapter, self._settings.home_folder):
            answer.lost_adapter, conversation.adapter = conversation.adapter, ""
        answer.adapter = conversation.adapter

    def _take(self, answer: Turn, chunk: Chunk) -> None:
        answer.content = answer.content + chunk.text if chunk.full_text is None else chunk.full_text
        info = self.host.info
        if info is not None and not chunk.loading:
            answer.model, answer.format = info.model, info.format
        answer.dropped_turns = chunk.dropped_turns or answer.dropped_turns
        if chunk.tokens:
            answer.tokens, answer.tokens_per_s = chunk.tokens, chunk.tokens_per_s
            answer.prompt_tokens, answer.reused_tokens = chunk.prompt_tokens, chunk.reused_tokens
            answer.first_token_s = chunk.first_token_s
        answer.finish_reason = chunk.finish_reason or ""

    def _keep(self, visitor: Visitor, conversation: Conversation) -> None:
        if visitor.token:
            self._store.save(visitor.owner, conversation)

    def _keep_quietly(self, visitor: Visitor, conversation: Conversation) -> None:
        """Save around an answer: a full disk or a deleted chat must not swallow the answer."""
        try:
            self._keep(visitor, conversation)
        except NibbleError as error:
            log.warning("a conversation was not saved: %s", error)
