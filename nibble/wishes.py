"""What an operator may wish for: a model to get, to shrink, to judge, to teach; checked, and put as a task takes it.

Promises that whatever cannot be is said in one sentence, by the field's name or its value, whatever type a script sent.
Knows nothing of what is on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nibble import library
from nibble.comparing.order import MOST_PROMPTS, PROMPTS
from nibble.config import check_keys
from nibble.errors import ModelError
from nibble.lowbit.formats import resolve
from nibble.training.recipe import NAMES, Recipe

MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]{0,199}")
"""Part of the dotted path of a model's module, such as lm_head or layers.0.mlp."""

MOST_CHARACTERS = 1_000
"""Of a name."""

MOST_RULES = 1_000
"""Modules that one wish may name: more no model has."""

MOST_NEW_TOKENS = 4096
"""Of each answer in a comparison."""


@dataclass(frozen=True)
class Download:
    """A model, or a data set, to get."""

    repo: str
    """`org/name` on the hub, or the address of its page there."""
    hub: str = ""
    """Empty asks those of the settings, in their order."""
    revision: str = ""
    file: str = ""
    """One GGUF file, instead of the model's Hugging Face form."""
    name: str = ""
    """Its name here; empty is `org__name`."""
    dataset: bool = False
    """Whether it is a data set and no model."""

    def spec(self) -> dict[str, Any]:
        """What the task is told.

        Raises:
            ModelError: a value that is no text.
        """
        told = {key: text(value) for key, value in asdict(self).items() if value and key != "dataset"}
        return told | ({"dataset": True} if self.dataset is True else {})


@dataclass(frozen=True)
class Quantize:
    """A model to shrink."""

    model: str
    """Its name here, or its id on a hub."""
    low_bit: Sequence[str] = ()
    """Formats, one new model for each; none keeps what the source has (GGUF, AWQ, GPTQ)."""
    out: str = ""
    """Name of what is made; with several formats its beginning. Empty is `<model>-<format>`."""
    skip: Sequence[str] = ()
    """Modules that stay in full precision."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Module -> a format of its own."""
    evaluate: bool = True
    """Whether what was lost is measured afterwards."""
    memory_bytes: float | None = None
    max_kl: float | None = None
    """Where one of these is set, the formats are chosen for the person: the smallest that loses no more than `max_kl`
    nats a token and takes no more than `memory_bytes`."""

    def spec(self) -> dict[str, Any]:
        """What the task is told, but for the model.

        Raises:
            NibbleError: a name, a format or a limit that cannot be.
        """
        limits = {name: number(name, getattr(self, name)) for name in ("memory_bytes", "max_kl")}
        spec = {
            "out": new_name(self.out),
            "skip": [module(name) for name in names(self.skip)],
            "overrides": {module(name): resolve(text(form)).name for name, form in mapping(self.overrides).items()},
            "pick": {name: value for name, value in limits.items() if value is not None},
        }
        told = {key: value for key, value in spec.items() if value}
        return {"low_bit": formats(self.low_bit), **told, "evaluate": bool(self.evaluate)}


@dataclass(frozen=True)
class Evaluate:
    """A model to judge."""

    model: str
    low_bit: Sequence[str] = ()
    """Formats; none is every one for a model in full precision, and its own for a low-bit folder."""
    against: str = ""
    """The model to compare with; empty is the one that it was made from."""
    tokens: int | None = None
    """Length of the text; None is the task's own."""

    def spec(self) -> dict[str, Any]:
        """What the task is told, but for the models.

        Raises:
            NibbleError: a format or a number that cannot be.
        """
        tokens = number("tokens", self.tokens)
        return {"low_bit": formats(self.low_bit), **({"tokens": int(tokens)} if tokens is not None else {})}


def text(value: object) -> str:
    """A short text, without spaces around it."""
    if not isinstance(value, str) or len(value) > MOST_CHARACTERS:
        raise ModelError(f"{str(value)[:40]!r} is not a name.", "Give a short text.")
    return value.strip()


def new_name(value: object) -> str:
    """A name that a model can be given; empty stays empty."""
    name = text(value)
    if name and (not library.NAME.fullmatch(name) or name == library.GUIDE):
        raise ModelError(
            f"{name[:140]!r} cannot be the name of a model.",
            "Use letters, digits, dots, dashes and underscores, up to 128, not a dot first, and not `guide`.",
        )
    return name


def module(value: object) -> str:
    """The name of a module, or a part of it."""
    name = text(value)
    if not MODULE.fullmatch(name):
        raise ModelError(f"{name[:80]!r} is not the name of a module.", "Write it as lm_head or layers.0.mlp.")
    return name


def names(value: object) -> Collection[object]:
    """A list, or the parts of a text between commas."""
    items = [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value or ()
    if not isinstance(items, (list, tuple)) or len(items) > MOST_RULES:
        raise ModelError(f"{str(value)[:40]!r} is not a list of names.", "Give names with commas between them.")
    return items


def mapping(value: object) -> Mapping[object, object]:
    """A mapping; None is an empty one."""
    if not isinstance(value or {}, Mapping) or len(value or {}) > MOST_RULES:  # type: ignore[arg-type]
        raise ModelError(f"{str(value)[:40]!r} is not a mapping.", "Give names, each with its value.")
    return value or {}  # type: ignore[return-value]


def formats(value: object) -> list[str]:
    """Names of formats, each once."""
    return list(dict.fromkeys(resolve(text(name)).name for name in names(value)))


def number(name: str, value: object) -> float | int | None:
    """A number above 0; None stays None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ModelError(f"{name} is {str(value)[:40]!r}.", "It must be a number above 0.")
    return value


@dataclass(frozen=True)
class Finetune:
    """An adapter to train, or to try for two steps."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `nibble.training.recipe.Recipe`; what is left out is its default."""

    def recipe(self) -> Recipe:
        """The checked settings.

        Raises:
            NibbleError: an unknown setting, or one that cannot be.
        """
        told = {str(key): value for key, value in mapping(self.settings).items() if value is not None}
        # Whose turn it is and where things lie is the server's to say: a recipe holds none of that.
        check_keys(told, list(NAMES), "settings")
        recipe = Recipe(**told)  # type: ignore[arg-type]
        new_name(recipe.out)
        return recipe


@dataclass(frozen=True)
class Merge:
    """An adapter to make a model of."""

    adapter: str
    out: str = ""
    """Name of the model; empty is the task's choice."""
    low_bit: Sequence[str] = ()
    """Formats in which it is kept too."""

    def spec(self) -> dict[str, Any]:
        """What the task is told.

        Raises:
            NibbleError: a name or a format that cannot be.
        """
        return {"adapter": text(self.adapter), "out": new_name(self.out), "low_bit": formats(self.low_bit)}


@dataclass(frozen=True)
class Compare:
    """An adapter, or the checkpoints of a run, to compare with the base."""

    adapter: str = ""
    run: str = ""
    """Id of a run, in place of an adapter."""
    checkpoints: Sequence[int] | str = ()
    """Steps of the run that are compared too; `all` is every one."""
    prompts: Sequence[str] = ()
    """None are the tutorial's."""
    seed: int = 42
    max_new_tokens: int | None = None
    """None is the task's own."""

    def spec(self) -> dict[str, Any]:
        """What the task is told.

        Raises:
            NibbleError: a name, step or number that cannot be; neither an adapter nor a run, or both.
        """
        named = {key: text(getattr(self, key)) for key in ("adapter", "run")}
        if bool(named["adapter"]) == bool(named["run"]):
            raise ModelError("Nothing to compare is named.", "Name an adapter, or a run.")
        longest = number("max_new_tokens", self.max_new_tokens)
        return {
            **{key: value for key, value in named.items() if value},
            "checkpoints": steps(self.checkpoints),
            "prompts": prompts(self.prompts),
            "seed": whole("seed", self.seed, 2**32 - 1),
            **({"max_new_tokens": whole("max_new_tokens", longest, MOST_NEW_TOKENS)} if longest is not None else {}),
        }


def prompts(value: object) -> list[str]:
    """Texts to go on from: a list, or the lines of one text; those that are taken where none is given are none."""
    items = value.splitlines() if isinstance(value, str) else value or ()
    if not isinstance(items, (list, tuple)) or len(items) > MOST_PROMPTS:
        raise ModelError("prompts is not a list.", f"Give up to {MOST_PROMPTS} short texts.")
    found = [prompt for item in items if (prompt := text(item))]
    return [] if tuple(found) == PROMPTS else found


def steps(value: object) -> list[int] | str:
    """Steps of checkpoints: `all`, a list, or the numbers in a text."""
    if isinstance(value, str):
        if value.strip() == "all":
            return "all"
        value = [int(part) if part.strip().isdecimal() else part for part in names(value) if isinstance(part, str)]
    return sorted({whole("checkpoints", item, 10**9) for item in names(value)})


def whole(name: str, value: object, most: int) -> int:
    """A whole number from 0 to `most`."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most and value % 1 == 0
    if not good:
        raise ModelError(f"{name} is {str(value)[:40]!r}.", f"It must be a whole number from 0 to {most:,}.")
    return int(value)  # type: ignore[call-overload, no-any-return]
