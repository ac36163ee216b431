"""One run from the data set to the finished adapter, or to a dry run's measurements.

Promises that the data is checked before any model is loaded, that a stop keeps what was learnt so far, and that the
result holds every figure that the log does. Knows nothing of jobs.
"""

from __future__ import annotations

import math
import resource
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from nibble.adapters import fingerprint
from nibble.data.check import Report as Found
from nibble.devices import Device, choose, free_memory
from nibble.errors import DataError, NibbleError
from nibble.lowbit.linear import keep_memory
from nibble.tasks import Report
from nibble.training import checkpoints, feed, packing
from nibble.training.feed import Corpus, Deck
from nibble.training.learner import Learner, Reader, is_out_of_memory, load, open_reader, out_of_memory
from nibble.training.loop import Course, Listener, Teacher
from nibble.training.order import Order
from nibble.training.saving import Origin, publish_adapter

DRY_STEPS = 2


@dataclass
class Session:
    """What a run is made of."""

    order: Order
    report: Report
    folder: Path
    """Of the run; a dry run's is thrown away."""
    leads: bool = True
    """Whether this process is the one that tells and writes."""
    chat: bool = False
    """Whether the data are conversations."""
    stop_id: int | None = None
    """The token that ends what is learnt."""
    notes: list[str] = field(default_factory=list)

    def note(self, *sentences: str) -> None:
        """Tell, and keep for the result."""
        for sentence in sentences:
            if sentence not in self.notes:
                self.notes.append(sentence)
                if self.leads:
                    self.report.note(sentence)


def run(order: Order, report: Report, folder: Path, *, leads: bool = True) -> dict[str, Any]:
    """Do what an order says; the result of `nibble.tasks.finetune.run`."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    session = Session(order, report, folder, leads)
    recipe = order.recipe
    keep_memory()
    if leads:
        report.progress(0, 0, "", "prepare")
    reader = open_reader(order.base, recipe.max_length, trusted=order.trusted)
    session.note(*reader.notes)
    corpus, found = feed.read(order.data, reader.encoder, feed.as_mapping(recipe.columns, recipe.leave_out), folder)
    session.note(*found.sentences(), *reader.encoder.notes)
    session.chat = _is_chat(found)
    session.stop_id = reader.encoder.stop_id if session.chat else reader.tokenizer.eos_token_id
    device = choose(order.device)
    start = _start(session, device, corpus)
    with _fitting(session, device), warnings.catch_warnings():
        # PEFT and accelerate use names of transformers that will go; a person can do nothing about it.
        warnings.simplefilter("ignore", FutureWarning)
        learner = load(reader, recipe, device, trusted=order.trusted)
        session.note(*learner.notes)
        course = _course(session, reader, learner, corpus, device)
        teacher = Teacher(learner, course, folder, device.kind, _listener(session))
        if order.dry:
            return _measure(session, teacher, found, device)
        return _train(session, teacher, reader, start)


def _is_chat(found: Found) -> bool:
    """Whether the data are conversations, whose answers end as the chat template says."""
    return found.detection is not None and found.detection.form != "text"


def _start(session: Session, device: Device, corpus: Corpus) -> checkpoints.Checkpoint | None:
    """The checkpoint to go on from, where the order says so and there is one; torch is set up as it was then.

    Raises:
        DataError: it was written while the data set held other samples.
    """
    if not session.order.resume:
        return None
    for name in checkpoints.drop_broken(session.folder) if session.leads else ():
        session.note(f"{name} was not whole and is dropped.")
    found = checkpoints.latest(session.folder)
    if found is None:
        session.note("There is no whole checkpoint yet: the run begins anew.")
        return None
    if found.facts.get("data", corpus.digest()) != corpus.digest():
        raise DataError(
            f"{session.order.recipe.data} has changed since step {found.step}, from which this run would go on.",
            "Put the data set back as it was, or start a new run.",
        )
    session.note(f"The run goes on from step {found.step}.")
    if device.kind == "cpu" and isinstance(found.facts.get("threads"), int):
        # Sums are split among threads: another number of them would give other last bits.
        torch.set_num_threads(found.facts["threads"])
    return found


@contextmanager
def _fitting(session: Session, device: Device) -> Iterator[None]:
    """Within it running out of memory is a sentence with what to do."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(session.order.recipe, device.kind) from error
        raise


def _course(session: Session, reader: Reader, learner: Learner, corpus: Corpus, device: Device) -> Course:
    recipe = session.order.recipe
    places, held = feed.split(corpus, recipe.eval_share, recipe.seed)
    longest = reader.encoder.max_length or recipe.max_length
    rows: Sequence[Sequence[int]] = feed.Each(places, lambda place: (place,))
    packed = False
    if recipe.packing:
        why = packing.inexact(learner.model, corpus, places, reader.padding, learner.dtype)
        if why:
            session.note(f"Samples are not packed: {why}")
        else:
            rows, packed = feed.pack(corpus, places, longest), True
            session.note(f"{len(places):,} samples are packed into {len(rows):,} rows.")
    batch = recipe.batch_size * recipe.accumulation
    steps = math.ceil(recipe.epochs * len(rows) / batch) if recipe.epochs else recipe.max_steps
    if session.order.dry:
        steps = max(steps, DRY_STEPS)
    deck = Deck(corpus, rows, steps * batch, recipe.seed)
    heldout = feed.Each(held, lambda place: [corpus[place]])
    if not heldout and recipe.early_stop:
        session.note("Nothing is held out, so the run cannot stop early.")
    if session.order.dry:
        # The first step meets the longest rows: whether they fit is what memory is measured for.
        deck = deck.longest_first(batch)
    return Course(recipe, deck, heldout, reader.padding, steps, packed, only=DRY_STEPS if session.order.dry else 0)


def _listener(session: Session) -> Listener:
    report, stage = session.report, "measure" if session.order.dry else "train"
    if not session.leads:
        return Listener()

    def step(done: int, total: int) -> None:
        report.progress(done, DRY_STEPS if session.order.dry else total, "step", stage)

    return Listener(step, (lambda **numbers: None) if session.order.dry else report.metric)


def _measure(session: Session, teacher: Teacher, found: Found, device: Device) -> dict[str, Any]:
    """Two real steps; what they took, and what the whole would."""
    steps = teacher.course.steps if session.order.recipe.epochs else session.order.recipe.max_steps
    free, before = free_memory(device.kind), peak_memory(device)
    teacher.train()
    seconds, measuring = teacher.seconds_per_step, teacher.seconds_per_evaluation()
    peak, rows = peak_memory(device), teacher.course.deck.rows
    model = teacher.learner.model
    return {
        "dry_run": True,
        "seconds_per_step": seconds,
        "peak_memory_bytes": peak,
        "total_s": seconds * steps + measuring * session.order.recipe.evaluations(steps),
        "steps": steps,
        "samples": sum(map(len, rows)),
        "trained_tokens": teacher.course.deck.corpus.trained(place for row in rows for place in row),
        "trainable_parameters": teacher.learner.trainable,
        "parameters": count_parameters(model),
        "truncated_share": found.truncated / found.usable if found.usable else 0.0,
        "free_memory_bytes": free,
        "fits": peak - before <= free,
        "notes": session.notes,
    }


def _train(session: Session, teacher: Teacher, reader: Reader, start: checkpoints.Checkpoint | None) -> dict[str, Any]:
    order = session.order
    origin = Origin(order.called, order.base, fingerprint(order.base), teacher.learner.format, reader.family)
    try:
        teacher.train(start.folder if start else None)
    except Exception:
        raise
    except BaseException:
        # A stop. The adapter first: it is what the person would miss most.
        with suppress(NibbleError, OSError):
            teacher.check()
            if session.leads and teacher.step:
                _publish(session, teacher, reader, origin, teacher.learner.model)
            teacher.keep()
        raise
    if session.leads:
        session.report.progress(0, 1, "adapter", "save")
        _publish(session, teacher, reader, origin, _best(session, teacher))
        session.report.progress(1, 1, "adapter", "save")
    return _result(session, teacher)


def _best(session: Session, teacher: Teacher) -> Any:
    """What is published: the model as it is or, after an early stop, the checkpoint with the best held-out loss."""
    best = teacher.best
    if not session.order.recipe.early_stop or best is None or best[0] == teacher.step:
        return teacher.learner.model
    folder = checkpoints.place(session.folder, best[0])
    if not checkpoints.verify(folder):
        return teacher.learner.model
    session.note(f"The adapter is that of step {best[0]}, whose held-out loss {best[1]:.4g} was the lowest.")
    return folder


def _publish(session: Session, teacher: Teacher, reader: Reader, origin: Origin, source: Any) -> None:
    order = session.order
    recipe = order.recipe
    facts = {
        "run": session.report.folder.name if session.report.folder else "",
        "recipe": recipe.as_spec(),
        "losses": losses(teacher.rows),
        "heldout": {
            "data": recipe.data, "columns": dict(recipe.columns), "leave_out": recipe.leave_out,
            "share": recipe.eval_share, "seed": recipe.seed, "max_length": reader.encoder.max_length,
            "chat": session.chat, "samples": len(teacher.course.heldout), "digest": teacher.course.deck.corpus.digest(),
        },
        "stop_token_id": session.stop_id,
        "steps": teacher.step,
        "partial": teacher.step < teacher.course.steps and not teacher.spent,
    }  # fmt: skip
    publish_adapter(order.target, source, origin, facts)


def losses(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """First and last of a log's losses: while training, and held out."""
    trained = [row["loss"] for row in rows if "loss" in row]
    held = [row["eval_loss"] for row in rows if "eval_loss" in row]
    ends = {
        "first": trained[:1],
        "last": trained[-1:],
        "eval": held[-1:] if len(held) > 1 else [],
        "eval_before": held[:1],
    }
    return {key: values[0] if values else None for key, values in ends.items()}


def _result(session: Session, teacher: Teacher) -> dict[str, Any]:
    told = losses(teacher.rows)
    return {
        "name": session.order.name,
        "folder": str(session.order.target),
        "adapter": session.order.name,
        "steps": teacher.step,
        "loss_first": told["first"],
        "loss_last": told["last"],
        "eval_loss": told["eval"],
        "eval_loss_before": told["eval_before"],
        "seconds_per_step": teacher.seconds_per_step,
        "peak_memory_bytes": peak_memory(choose(teacher.device)),
        "stopped_early": teacher.step < teacher.course.steps,
        "checkpoints": [
            {
                "step": found.step,
                "folder": str(found.folder.relative_to(session.folder)),
                "loss": found.facts.get("loss"),
                "eval_loss": found.facts.get("eval_loss"),
            }
            for found in checkpoints.whole(session.folder)
        ],
        "notes": session.notes,
    }


def peak_memory(device: Device) -> int:
    """The most bytes that this process has held at once on its device."""
    if device.kind != "cpu":
        return int(torch.get_device_module(device.kind).max_memory_allocated())
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def count_parameters(model: Any) -> int:
    """Weights of base and adapter, packed ones counted as what they stand for."""
    from nibble.lowbit.linear import LowBitLinear

    packed = {id(module.weight): module for module in model.modules() if isinstance(module, LowBitLinear)}
    return sum(
        packed[id(item)].out_features * packed[id(item)].in_features if id(item) in packed else item.numel()
        for item in model.parameters()
    )
