"""What a visitor typed into the fields, or a script sent, as the numbers that the engine takes.

Knows nothing of Gradio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

from chat.talk import MOST_CHARACTERS, Form, Visitor
from nibble.engines.base import Sampling
from nibble.errors import NibbleError
from nibble.library import NAME

WHOLE = ("max_new_tokens", "top_k", "seed")
"""Fields of Sampling that are whole numbers."""


def form_from(visitor: Visitor, numbers: Sequence[object], system: object, adapter: object = None) -> Form:
    """The form that these values make.

    Args:
        visitor: in whose language a refusal is said.
        numbers: one for each field of `Sampling`, in its order: a number, text, or None or empty for the model's own.
        system: the system prompt; None leaves the conversation's own.
        adapter: the name of an adapter; None leaves the conversation's own.

    Raises:
        NibbleError: a value that is no number or outside its range, by the field's name.
    """
    if system is not None and (not isinstance(system, str) or len(system) > MOST_CHARACTERS):
        raise NibbleError(visitor.say("not_text"))
    if adapter is not None and not (isinstance(adapter, str) and (not adapter or NAME.fullmatch(adapter))):
        raise NibbleError(visitor.say("unknown_adapter", name=str(adapter)[:80]))
    names = [item.name for item in fields(Sampling)]
    values = {name: _number(visitor, name, value) for name, value in zip(names, numbers, strict=True)}
    return Form(Sampling(**values), system, adapter)  # type: ignore[arg-type]


def _number(visitor: Visitor, name: str, value: object) -> int | float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number) or (name in WHOLE and not number.is_integer()):
        raise NibbleError(visitor.say("bad_number", label=visitor.say(name), value=repr(value)[:40]))
    return int(number) if name in WHOLE else number
