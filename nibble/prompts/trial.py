"""Try a chat template before it is trusted: in a process of its own, with little time and memory.

    refuse_bombs    the templates of a folder, before anything of it is loaded: what blows up is refused
    try_template    the template of a loaded tokenizer, as transformers renders it: what fails is replaced

Promises that a template that raises, loops or fills the memory costs two seconds at most and gives one sentence. A
sandbox of jinja bounds neither time nor memory, and jinja computes constants while it compiles. Knows nothing of the
forms that take a template's place, and needs no library besides jinja.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from nibble.errors import ModelError
from nibble.screen.templates import MAX_CHARACTERS, environment

FOLDER_CPU_S = 0.6
"""Processor time for all templates of a folder; those of real models take some milliseconds."""

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


def refuse_bombs(templates: Mapping[str, str]) -> None:
    """Render templates, in a child process with limits, before anything beside them is read.

    One that raises is no danger, and is let through: whether it can be used is told once its tokenizer is loaded.

    Args:
        templates: where a template stands -> its text, as `nibble.screen.templates` finds them.

    Raises:
        ModelError: one takes too much time or memory.
    """
    if templates and (problem := _in_child(_first_bomb, templates, FOLDER_CPU_S)):
        raise ModelError(f"A chat template of this model cannot be used: {problem}.", "Get the model from its maker.")


def try_template(tokenizer: Any) -> Verdict:
    """Render short conversations with a tokenizer's own chat template, in a child process with limits."""
    if len(str(tokenizer.chat_template)) > MAX_CHARACTERS:
        return Verdict(f"it is longer than {MAX_CHARACTERS:,} characters")
    found = _in_child(_verdict, tokenizer, CPU_S)
    return Verdict(found) if isinstance(found, str) else found


def _in_child(work: Callable[[Any], Any], subject: Any, cpu_s: float) -> Any:
    """What `work` returns in a process with little time and memory; a sentence's end where it has not enough."""
    # Forked, not started anew: importing transformers again would take seconds, and nothing here starts threads.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_limited, args=(work, subject, cpu_s, sender), daemon=True)
    child.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(WALL_S) else "it takes too long"
    except EOFError:
        return "it takes too much time or memory"
    finally:
        child.kill()
        child.join()
        receiver.close()


def _limited(work: Callable[[Any], Any], subject: Any, cpu_s: float, sender: Connection) -> None:
    in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115, PTH123
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES, in_use + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The timer counts this process's own time, however busy the machine is. Its signal is left to the kernel, which
    # ends the process also within one long computation, where the interpreter would not get to see it.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    sender.send(work(subject))


def _first_bomb(templates: Mapping[str, str]) -> str:
    """Why the first template that blows up cannot be used; empty where none does."""
    for place, text in templates.items():
        try:
            made = _jinja(text).render(
                messages=TURNS, add_generation_prompt=True, bos_token="<s>", eos_token="</s>", tools=None
            )
        except MemoryError:
            return f"the one in {place} takes too much memory"
        except Exception:  # noqa: BLE001 - the border of a process; a template can raise anything
            continue
        if len(made) > MAX_CHARACTERS:
            return f"the one in {place} makes a very long text of a few words"
    return ""


def _jinja(text: str) -> Any:
    """A template with the functions that transformers gives it."""
    jinja = environment()
    jinja.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    jinja.globals["raise_exception"] = _raise
    jinja.globals["strftime_now"] = lambda form: "1 January 2026"
    return jinja.from_string(text)


def _raise(words: str) -> None:
    raise ValueError(words)


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
