"""What stands in the fields of the Shrink card as the wish that an operator takes.

Promises that a field that cannot be read is named. Knows nothing of Gradio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from models_ui.view import STORED
from models_ui.words import WORDS
from nibble.errors import NibbleError
from nibble.wishes import Quantize
from nibble.words import Language


def quantize(
    language: Language, source: str, formats: Sequence[str], out: str, skip: str, overrides: str, judge: bool
) -> Quantize:
    """The wish that the card's fields make; the choice "as it is stored" is no format.

    Raises:
        NibbleError: no format is chosen, "as it is stored" beside others, or a rule is not of the form module=format.
    """
    if not formats:
        raise NibbleError(WORDS.say("no_formats", language))
    if STORED in formats and len(formats) > 1:
        raise NibbleError(WORDS.say("stored_alone", language))
    low_bit = [name for name in formats if name != STORED]
    return Quantize(source or "", low_bit, out or "", skip or "", rules(language, overrides), judge)


def rules(language: Language, lines: str) -> dict[str, str]:
    """The modules with a format of their own: a line `module=format` for each.

    Raises:
        NibbleError: a line of another form.
    """
    found = {}
    for line in (lines or "").replace(",", "\n").splitlines():
        if not line.strip():
            continue
        name, sign, form = line.partition("=")
        if not (sign and name.strip() and form.strip()):
            raise NibbleError(WORDS.say("no_rule", language, value=line.strip()[:80]))
        found[name.strip()] = form.strip()
    return found


def limit(language: Language, key: str, value: str, scale: float = 1.0) -> float | None:
    """A number above 0 from a field, times `scale`; None where the field is empty.

    Raises:
        NibbleError: the field holds something else.
    """
    text = (value or "").strip().replace(",", ".")
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        label = WORDS.say(key, language)
        raise NibbleError(WORDS.say("no_number", language, label=label, value=repr(text)[:40]))
    return number * scale
