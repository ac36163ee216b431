"""What is compared: a base in the form that it was trained in, and the adapters that are put on it in turn.

Promises that only adapters of this base are taken, and a sentence for whatever is missing. Imports no torch. Knows
nothing of jobs and of how anything is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nibble import adapters, library, publish
from nibble.checkpoint import read_config
from nibble.errors import ConfigError, ModelError
from nibble.lowbit.formats import FORMATS, resolve
from nibble.screen import check_adapter
from nibble.training import checkpoints
from nibble.training.recipe import NAMES, Recipe

PROMPTS = (
    "The paradox of time and eternity is",
    "There are two things that matter:",
    "In the quiet embrace of the night,",
)
"""Those of the QLoRA tutorial; taken where none is given."""

MOST_PROMPTS = 20
LONGEST_PROMPT = 4000
"""In characters."""

ALL = "all"

BASE, TUNED = "base", "tuned"

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Tuned:
    """An adapter that is put on the base."""

    name: str
    """`tuned`, or `step 100`."""
    folder: Path
    step: int | None = None
    """Of a checkpoint."""
    recorded: float | None = None
    """The held-out loss that was measured while it was trained."""


@dataclass(frozen=True)
class Order:
    """What is compared."""

    base: Path
    name: str
    """What the base is called."""
    low_bit: str
    """Format that it is packed in while it is loaded; empty where its folder is packed already."""
    recipe: Recipe | None = None
    """None where it is not known how the adapter was trained."""
    tuned: tuple[Tuned, ...] = ()
    adapter: str = ""
    run: str = ""
    heldout: Mapping[str, Any] = field(default_factory=dict)
    """As nibble.json of the adapter says it; empty where it does not."""
    stop: int | None = None
    """The token that it learnt to stop at."""
    recorded: float | None = None
    """The base's held-out loss, measured before the training."""


def of_model(folder: Path, low_bit: str = "") -> Order:
    """A base alone."""
    packed = _packed(folder)
    form = "" if packed else resolve(low_bit or "bf16").name
    return Order(folder, _called(folder), form)


def of_adapter(folder: Path, home: Path, *, paths: bool = False) -> Order:
    """An adapter beside its base, in the form that the base had while it was trained.

    Args:
        folder: of an adapter, ours or PEFT's.
        home: Nibble's home folder; its base must be there.
        paths: whether the base may lie elsewhere.

    Raises:
        ModelError: it is no adapter, or there is no base here that it belongs to.
    """
    check_adapter(folder)
    base = _base_of(folder, home, paths)
    facts = publish.read_manifest(folder)
    losses = facts.get("losses") or {}
    order = _trained(base, facts.get("recipe") or {}, str((facts.get("base") or {}).get("format") or ""))
    return replace(
        order, tuned=(Tuned(TUNED, folder, recorded=losses.get("eval")),), adapter=folder.name,
        run=str(facts.get("run") or ""), heldout=facts.get("heldout") or {}, stop=facts.get("stop_token_id"),
        recorded=losses.get("eval_before"),
    )  # fmt: skip


def of_run(folder: Path, spec: Mapping[str, Any], home: Path, *, paths: bool = False) -> Order:
    """A run that has left no adapter: its newest checkpoint stands for one.

    Args:
        folder: of the run.
        spec: of the run.
        home: Nibble's home folder.
        paths: whether the base may be given by a path.

    Raises:
        NibbleError: its base is not here, or it has no whole checkpoint.
    """
    found = checkpoints.whole(folder)
    if not found:
        raise ModelError(
            f"{folder.name} has left neither an adapter nor a checkpoint.",
            "Wait for its first checkpoint, or compare another run.",
        )
    base = library.find(str(spec.get("model") or Recipe().model), home, paths=paths)
    order = _trained(base, spec, "")
    recipe = order.recipe or Recipe()
    heldout = {"data": recipe.data, "columns": dict(recipe.columns), "leave_out": recipe.leave_out}
    heldout |= {"share": recipe.eval_share, "seed": recipe.seed, "max_length": recipe.max_length}
    return replace(order, tuned=(_checkpoint(found[-1]),), run=folder.name, heldout=heldout)


def with_checkpoints(order: Order, run_folder: Path | None, wanted: Sequence[int] | str) -> Order:
    """The same, with checkpoints of its run between base and tuned.

    Args:
        order: of an adapter or a run.
        run_folder: of its run; None where that is gone.
        wanted: steps, or `ALL`.

    Raises:
        ModelError: one that is not there, or there are none.
    """
    if not wanted:
        return order
    there = {found.step: found for found in checkpoints.whole(run_folder)} if run_folder else {}
    steps = sorted(there) if isinstance(wanted, str) else sorted(set(wanted))
    missing = [step for step in steps if step not in there]
    if missing or not there:
        known = ", ".join(map(str, there)) or "none"
        what = f"no checkpoint of step {missing[0]}" if missing else "no checkpoint"
        raise ModelError(f"There is {what} of {order.adapter or order.run}.", f"Checkpoints here: {known}.")
    if isinstance(wanted, str):
        # The last checkpoint often is the adapter itself, which need not be measured twice.
        own = {_weights(tuned.folder) for tuned in order.tuned if tuned.step is None} - {""}
        steps = [step for step in steps if _weights(there[step].folder) not in own]
    chosen = [_checkpoint(there[step]) for step in steps]
    others = [tuned for tuned in order.tuned if tuned.step not in steps]
    return replace(order, tuned=(*chosen, *others))


def prompts(given: Any) -> list[str]:
    """The prompts to answer: those given, or the tutorial's.

    Raises:
        ConfigError: not a list of texts of sensible length.
    """
    texts = [given] if isinstance(given, str) else list(given or PROMPTS)
    if len(texts) > MOST_PROMPTS:
        raise ConfigError(f"{len(texts)} prompts are too many.", f"Give {MOST_PROMPTS} at most.")
    for text in texts:
        if not isinstance(text, str) or not text.strip() or len(text) > LONGEST_PROMPT or "\0" in text:
            raise ConfigError(
                f"{str(text)[:40]!r} cannot be a prompt.", f"Give text of {LONGEST_PROMPT} characters at most."
            )
    return texts


def steps(given: Any) -> list[int] | str:
    """Which checkpoints: `ALL`, or a list of steps.

    Raises:
        ConfigError: neither.
    """
    items = [item for item in given.split(",") if item.strip()] if isinstance(given, str) else list(given or ())
    if [str(item).strip() for item in items] == [ALL]:
        return ALL
    try:
        return [int(item) for item in items]
    except (TypeError, ValueError):
        raise ConfigError(f"checkpoints is {str(given)[:60]!r}.", f"It must be {ALL}, or steps: 100,200.") from None


def _base_of(folder: Path, home: Path, paths: bool) -> Path:
    """The model here that an adapter belongs to."""
    return adapters.base_folder(adapters.read(folder), home, paths=paths)


def _trained(base: Path, spec: Mapping[str, Any], form: str) -> Order:
    """A base in the form that a recipe trained it in, or in `form`, or in bf16 where neither is known."""
    known = {key: value for key, value in spec.items() if key in NAMES and value is not None}
    recipe = Recipe(**known) if known else None
    wanted = recipe.form if recipe else form if form in FORMATS else "bf16"
    return Order(base, _called(base), "" if _packed(base) else wanted, recipe)


def _checkpoint(found: checkpoints.Checkpoint) -> Tuned:
    # Who replaces a checkpoint's folder names its files too; a half one was never whole.
    return Tuned(f"step {found.step}", found.folder, found.step, publish.read_manifest(found.folder).get("eval_loss"))


def _weights(folder: Path) -> str:
    """The sha256 of an adapter's weights, by its manifest; empty where there is none."""
    return str(publish.read_manifest(folder).get("files", {}).get(WEIGHTS, {}).get("sha256", ""))


def _packed(folder: Path) -> bool:
    return bool(read_config(folder).get("quantization_config"))


def _called(folder: Path) -> str:
    return library.GUIDE if folder.resolve() == library.GUIDE_FOLDER else folder.name
