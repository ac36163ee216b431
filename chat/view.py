"""How a conversation looks: turns as the Chatbot's messages, the line under an answer, the status line.

Promises that every message goes out as a text block, which alone keeps the indentation of code, and that nothing a
model or a visitor wrote reaches the page's own markup unescaped. Knows nothing of Gradio's components.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from typing import Any

from chat.words import WORDS
from nibble.chats import Conversation, Turn
from nibble.engines.base import EngineInfo
from nibble.words import Language

Row = dict[str, Any]
"""A message as gr.Chatbot takes it."""

THINK = re.compile(r"<think>(.*?)(</think>|\Z)", re.DOTALL)
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})", re.MULTILINE)


def rows(conversation: Conversation, language: Language, live: str = "") -> tuple[list[Row], list[int]]:
    """A conversation as messages, and for each message the number of its turn.

    Args:
        conversation: what was said.
        language: of the page's own sentences.
        live: a sentence about the answer that is being written, under it; empty where none is.
    """
    messages: list[Row] = []
    places: list[int] = []
    before: Turn | None = None
    for number, turn in enumerate(conversation.turns):
        last = number == len(conversation.turns) - 1
        if turn.role == "user":
            made = [_row("user", turn.content)]
        else:
            made = _answer(turn, before, language, live if last else "")
            before = turn
        messages += made
        places += [number] * len(made)
    return messages, places


def _row(role: str, text: str, **metadata: str) -> Row:
    row: Row = {"role": role, "content": [{"type": "text", "text": text}]}
    return row | {"metadata": metadata} if metadata else row


def _answer(turn: Turn, before: Turn | None, language: Language, live: str) -> list[Row]:
    thoughts, text, open_ended = split_thoughts(turn.content)
    made = []
    if thoughts:
        pending = bool(live) and open_ended
        title = WORDS.say("thinking" if pending else "thought", language)
        made.append(_row("assistant", thoughts, title=title, status="pending" if pending else "done"))
    parts = [*(_small("notice", line) for line in notices(turn, before, language)), close_fences(text)]
    if live:
        parts.append(_small("stats waiting", live))
    elif turn.error:
        key = "died" if turn.error_kind == "EngineDied" else "failed"
        parts.append(_small("notice error", WORDS.say(key, language, error=turn.error)))
    else:
        if not turn.content.strip():
            parts.append(_small("notice", WORDS.say("nothing", language)))
        parts.append(_small("stats", stats(turn, language)))
    made.append(_row("assistant", "\n\n".join(part for part in parts if part)))
    return made


def _small(kind: str, text: str) -> str:
    # One line: a blank one would end the HTML block and hand the rest to Markdown.
    return f'<small class="{kind}">{escape(" ".join(text.split()))}</small>' if text else ""


def split_thoughts(text: str) -> tuple[str, str, bool]:
    """What stands in `<think>…</think>`, what stands outside, and whether the last thought is still open."""
    found = list(THINK.finditer(text))
    thoughts = "\n\n".join(match[1].strip() for match in found).strip()
    return thoughts, THINK.sub("", text).lstrip("\n"), bool(found) and not found[-1][2]


def close_fences(text: str) -> str:
    """Markdown with a code fence that was left open closed, so that what follows is not taken for code."""
    fence = ""
    for match in FENCE.finditer(text):
        if not fence:
            fence = match[1]
        elif match[1][0] == fence[0] and len(match[1]) >= len(fence):
            fence = ""
    return f"{text}\n{fence}" if fence else text


def notices(turn: Turn, before: Turn | None, language: Language) -> list[str]:
    """What a reader must know of an answer beside its text: the context was cut, another model speaks."""
    said = []
    # A turn that failed early knows no model.
    if turn.lost_adapter:
        said.append(WORDS.say("lost_adapter", language, name=turn.lost_adapter))
    if before and turn.model and before.model and _speaker(turn) != _speaker(before):
        said.append(WORDS.say("switched", language, model=dressed(turn.model, turn.adapter), format=turn.format))
    if turn.dropped_turns:
        said.append(WORDS.say("cut", language, value=turn.dropped_turns))
    return said


def _speaker(turn: Turn) -> tuple[str, str, str]:
    return (turn.model, turn.format, turn.adapter)


def dressed(model: str, adapter: str) -> str:
    """What to call a model that wears an adapter, or none."""
    return f"{model} + {adapter}" if adapter else model


def stats(turn: Turn, language: Language) -> str:
    """Speed, first token, length, reuse and end of an answer in one line."""
    parts = []
    if turn.tokens_per_s:
        parts.append(WORDS.say("speed", language, value=turn.tokens_per_s))
    if turn.first_token_s is not None:
        parts.append(WORDS.say("first", language, value=turn.first_token_s))
    if turn.tokens:
        parts.append(WORDS.say("tokens", language, value=turn.tokens))
    if turn.reused_tokens:
        parts.append(WORDS.say("reused", language, value=turn.reused_tokens))
    if turn.finish_reason:
        parts.append(WORDS.say(f"end_{turn.finish_reason}", language))
    return " · ".join(parts)


def greeting(model: str, format_name: str, language: Language) -> str:
    """What an empty chat says of the model that is there, in Markdown; `model` is empty where none is."""
    if not model:
        text = WORDS.say("greeting_none", language)
    elif model == "guide":
        text = WORDS.say("greeting_guide", language)
    else:
        text = WORDS.say("greeting_model", language, model=escape(model), format=format_name)
    return f"## {WORDS.say('greeting', language)}\n\n{text}"


@dataclass(frozen=True)
class Standing:
    """How it stands with the model."""

    state: str
    info: EngineInfo | None
    loading: str
    """Name of the model that is being loaded."""
    sentence: str
    """Why the last load failed."""
    waiting: int
    """Answers being written or in line."""
    adapter: str = ""
    """What the model wears in the conversation that is open."""


def status_line(standing: Standing, language: Language) -> str:
    """The line over the tabs as HTML: model, format, device, memory, queue; unfolded, why this device."""
    info = standing.info
    if standing.state == "loading":
        parts = [WORDS.say("state_loading", language, model=standing.loading)]
    elif info is None:
        parts = [WORDS.say("state_failed" if standing.sentence else "state_empty", language)]
    else:
        queue = WORDS.say("queue_busy" if standing.waiting else "queue_free", language, value=standing.waiting)
        speaker, where = dressed(info.model, standing.adapter), f"{info.device} {info.dtype}"
        parts = [speaker, info.format, where, memory(info.memory_bytes), queue]
    why = [standing.sentence]
    if info is not None:
        why += [f"{info.reason}.", WORDS.say("kernel", language, value=info.kernel) if info.kernel else ""]
        why += [WORDS.say("context", language, value=info.context)]
        why += [WORDS.say("template", language, value=info.template), info.note]
    line, more = (escape(text) for text in (" · ".join(parts), " ".join(part for part in why if part)))
    # Why there is no model must be seen at once.
    unfolded = " open" if standing.state == "failed" else ""
    return (
        '<div class="top"><span class="brand"><i>▪▫▪▪</i> Nibble</span>'
        f'<details class="{escape(standing.state)}"{unfolded}>'
        f'<summary title="{more}">{line}</summary><p>{more}</p></details></div>'
    )


def memory(size: int) -> str:
    """A number of bytes in the unit that a person reads."""
    return f"{size / 2**30:.1f} GB" if size >= 2**30 else f"{size / 2**20:.0f} MB"
