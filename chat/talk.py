"""What is said in a chat, as plain data and rules: who asks, with what settings, and what the model is shown of it.

Knows nothing of which conversation is open, nothing of Gradio, nothing of disks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from chat.view import split_thoughts
from chat.words import WORDS
from nibble.chats import Conversation, Turn
from nibble.engines.base import LIMITS, Chunk, Message, Sampling
from nibble.errors import NibbleError
from nibble.words import Language

MOST_CHARACTERS = 200_000
"""Of one message; what fits into the model's context is for the engine to say."""


@dataclass(frozen=True)
class Visitor:
    """Who calls: a browser with its cookie, or a script that has only its session."""

    session: str
    token: str | None
    language: Language

    @property
    def owner(self) -> str:
        """Whose conversations these are."""
        return self.token or f"session:{self.session}"

    def say(self, key: str, **values: object) -> str:
        """A sentence of `chat.words` in this visitor's language."""
        return WORDS.say(key, self.language, **values)


@dataclass(frozen=True)
class Form:
    """What a visitor set beside the message."""

    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    """System prompt; None leaves the conversation's own."""
    adapter: str | None = None
    """Name of the adapter that the model wears; None leaves the conversation's own."""


@dataclass(frozen=True)
class Progress:
    """A conversation while its last turn grows; `live` tells how it fares, empty once it is written."""

    conversation: Conversation
    live: str = ""

    @property
    def text(self) -> str:
        """The answer so far."""
        return self.conversation.turns[-1].content


def check_message(text: object, visitor: Visitor) -> None:
    """Refuse what is no message.

    Raises:
        NibbleError: not text, empty, or longer than `MOST_CHARACTERS`.
    """
    if not isinstance(text, str):
        raise NibbleError(visitor.say("not_text"))
    if not text.strip():
        raise NibbleError(visitor.say("empty"))
    if len(text) > MOST_CHARACTERS:
        raise NibbleError(visitor.say("too_long", value=len(text), limit=MOST_CHARACTERS))


def within(sampling: Sampling, limit: int) -> Sampling:
    """The same sampling, with no longer answer than the owner of this server allows."""
    limit = min(limit, int(LIMITS["max_new_tokens"][1]))
    asked = sampling.max_new_tokens
    return sampling if asked is None or asked <= limit else replace(sampling, max_new_tokens=limit)


def messages(conversation: Conversation) -> list[Message]:
    """A conversation as the model is shown it: without thoughts, and without questions that got no answer."""
    turns = conversation.turns
    kept: list[Message] = []
    for place, turn in enumerate(turns):
        text = split_thoughts(turn.content)[1] if turn.role == "assistant" else turn.content
        unanswered = turn.role == "user" and place + 1 < len(turns) and not _spoken(turns[place + 1])
        if text.strip() and not unanswered:
            kept.append({"role": turn.role, "content": text})
    system: list[Message] = [{"role": "system", "content": conversation.system}]
    return system + kept if conversation.system.strip() else kept


def _spoken(turn: Turn) -> bool:
    return turn.role == "assistant" and bool(split_thoughts(turn.content)[1].strip())


def last_question(conversation: Conversation) -> int | None:
    """The number of the last turn that is the user's; None where there is none."""
    places = [place for place, turn in enumerate(conversation.turns) if turn.role == "user"]
    return places[-1] if places else None


def live(chunk: Chunk, answer: Turn, visitor: Visitor) -> str:
    """How an answer fares while it is being written."""
    if chunk.loading:
        return visitor.say("loading")
    if chunk.place:
        return visitor.say("place", value=chunk.place)
    if not chunk.tokens:
        return visitor.say("reading")
    return visitor.say("speed", value=answer.tokens_per_s) if answer.tokens_per_s else visitor.say("reading")
