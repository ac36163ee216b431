"""Try a chat template before it is trusted: in a process of its own, with little time and memory.

Promises that a template that raises, loops or fills the memory costs two seconds and gives one sentence. Rendering is
transformers' own, in its sandbox, which bounds neither. Knows nothing of the forms that take its place.
"""

from __future__ import annotations

import multiprocessing
import resource
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

MAX_CHARACTERS = 65_536
"""Longest template, and longest text made of a conversation of a few words."""

CPU_S = 2
WALL_S = 20
MEMORY_BYTES = 256 * 2**20

SYSTEM, QUESTION, ANSWER = "Be brief.", "What is a nibble?", "Half a byte."
TURNS = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": QUESTION},
]


@dataclass(frozen=True)
class Verdict:
    """What a trial found."""

    problem: str = ""
    """Why the template cannot be used; empty where it can."""
    takes_system: bool = True


def try_template(tokenizer: Any) -> Verdict:
    """Render short conversations with a tokenizer's own chat template, in a child process with limits."""
    if len(str(tokenizer.chat_template)) > MAX_CHARACTERS:
        return Verdict(f"it is longer than {MAX_CHARACTERS:,} characters")
    # Forked, not started anew: importing transformers again would take seconds, and nothing here starts threads.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_try_in_child, args=(tokenizer, sender), daemon=True)
    child.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(WALL_S) else Verdict("it takes too long")
    except EOFError:
        return Verdict("it takes too much time or memory")
    finally:
        child.kill()
        child.join()
        receiver.close()


def _try_in_child(tokenizer: Any, sender: Connection) -> None:
    in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115, PTH123
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES, in_use + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sender.send(_verdict(tokenizer))


def _verdict(tokenizer: Any) -> Verdict:
    try:
        texts = [_render(tokenizer, TURNS[:1]), _render(tokenizer, TURNS)]
    except MemoryError:
        return Verdict("it takes too much memory")
    except Exception as error:  # noqa: BLE001 - the border of a process; a template can raise anything
        return Verdict(f"it fails: {first_line(error)}")
    if any(QUESTION not in text for text in texts):
        return Verdict("it leaves out the question")
    if any(len(text) > MAX_CHARACTERS for text in texts):
        return Verdict("it makes a very long text of a few words")
    try:
        takes_system = SYSTEM in _render(tokenizer, [{"role": "system", "content": SYSTEM}, *TURNS])
    except Exception:  # noqa: BLE001 - some templates raise on a system prompt: then it goes before the question
        takes_system = False
    return Verdict(takes_system=takes_system)


def first_line(error: Exception) -> str:
    """The first line of what an exception says, without a full stop; its type where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
