"""The loop: transformers' Trainer, fed by a `Deck`, watched at every step, leaving checkpoints that it can go on from.

Promises that a loss or gradient which is no number ends the run before it changes the adapter, that a stop falls
between two updates and never into one, and that a run which goes on equals one that was never broken, bit for bit on a
CPU. Knows nothing of files but the checkpoints', and of who is told.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from nibble import publish
from nibble.errors import NibbleError
from nibble.training import checkpoints, state
from nibble.training.feed import Deck, Segment, collator
from nibble.training.heldout import summed_loss
from nibble.training.learner import Learner
from nibble.training.recipe import Recipe
from nibble.training.saving import load_adapter, save_adapter
from nibble.training.watch import Watch


class Diverged(NibbleError):
    """A loss, gradient or adapter that is no finite number."""

    measured = False
    """Whether it is the loss on what is held out."""


@dataclass
class Listener:
    """Who is told, on the first process alone."""

    step: Callable[[int, int], None] = lambda done, total: None
    """Steps done, steps in all."""
    row: Callable[..., None] = lambda **numbers: None
    """Numbers of one row of the log."""
    note: Callable[[str], None] = lambda text: None


@dataclass
class Course:
    """What a run takes: its rows in order, what is held out, and how often things are done."""

    recipe: Recipe
    deck: Deck
    heldout: Sequence[list[Segment]]
    padding: int
    steps: int
    packed: bool = False
    only: int = 0
    """Stop after so many steps, keeping nothing, as a dry run does; 0 goes to the end."""


@dataclass
class Teacher:
    """One run of the loop."""

    learner: Learner
    course: Course
    folder: Path
    """Of the run; `checkpoints/` lies in it."""
    device: str
    listener: Listener = field(default_factory=Listener)

    def __post_init__(self) -> None:
        self.trainer = _Trainer(self)

    def train(self, resume: Path | None = None) -> None:
        """Train to the end, from a checkpoint where one is given.

        Raises:
            Diverged: at the step that would have spoilt the adapter, which is kept as a checkpoint as it was.
        """
        if resume is not None and self._over_at(resume):
            return
        try:
            # How good the base is, before anything is learnt.
            self.trainer.args.eval_on_start = resume is None and self.trainer.args.eval_strategy != "no"
            self.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            self.check()
        except Diverged as error:
            if not self.course.only and self.step and self.step not in self.kept and not error.measured:
                with suppress(Diverged):
                    self.trainer.keep()
            raise
        finally:
            self.trainer.watch.lower()

    def _over_at(self, checkpoint: Path) -> bool:
        """Whether the run had stopped early when it left a checkpoint; then it stands there again."""
        if not self.course.recipe.early_stop:
            return False
        self.trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if self.spent:
            load_adapter(self.learner.model, checkpoint)
        return self.spent

    @property
    def spent(self) -> bool:
        """Whether so many measurements were no better than the best that the run ends early."""
        patience, best = self.course.recipe.early_stop, self.best
        if not patience or best is None:
            return False
        return sum("eval_loss" in row and row["step"] > best[0] for row in self.rows) >= patience

    def check(self) -> None:
        """Nothing that an adapter is kept as may hold what is no number.

        Raises:
            Diverged: it does.
        """
        trained = (parameter for parameter in self.learner.model.parameters() if parameter.requires_grad)
        if not all(bool(parameter.isfinite().all()) for parameter in trained):
            raise Diverged(
                f"The adapter after step {self.step} holds numbers that are not finite, so it is not kept.",
                "Lower learning_rate, and go on from the checkpoint before.",
            )

    def seconds_per_evaluation(self) -> float:
        """About how long it takes to measure what is held out: its longest samples are, once."""
        places = sorted(getattr(self.course.heldout, "places", ()), key=self.course.deck.corpus.tokens)
        if not places:
            return 0.0
        corpus, batch = self.course.deck.corpus, self.course.recipe.batch_size
        tried = places[-batch:]
        began = time.perf_counter()
        rows = [[corpus[place]] for place in tried]
        summed_loss(self.learner.model, rows, self.course.padding, batch, self.trainer.args.device)
        tokens = sum(map(corpus.tokens, tried))
        return (time.perf_counter() - began) * sum(map(corpus.tokens, places)) / tokens

    def keep(self) -> None:
        """Leave a checkpoint of the last whole step, unless there is one, or this is one of several processes."""
        if self.trainer.args.world_size == 1 and self.step and self.step not in self.kept:
            self.trainer.keep()

    @property
    def kept(self) -> list[int]:
        """Steps that have a checkpoint."""
        return [found.step for found in checkpoints.whole(self.folder)]

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.trainer.state.global_step)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The log so far, of all attempts."""
        return self.trainer.state.log_history

    @property
    def seconds_per_step(self) -> float:
        """The median of the steps after the first; of the first where there is no other."""
        times = self.trainer.watch.seconds
        return median(times[1:] or times or [0.0])

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and held-out loss of the best measurement after the first step."""
        measured = [(row["eval_loss"], row["step"]) for row in self.rows if row.get("step") and "eval_loss" in row]
        return min(measured)[::-1] if measured else None


class _Trainer(transformers.Trainer):
    """transformers' loop with our checks, measurements and checkpoints."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        course, learner = teacher.course, teacher.learner
        args = arguments(teacher)
        super().__init__(
            model=learner.model, args=args, train_dataset=course.deck, eval_dataset=course.heldout or None,
            data_collator=collator(course.padding, learner.dtype if course.packed else None),
        )  # fmt: skip
        self.remove_callback(PrinterCallback)
        self.watch = Watch(course, teacher.listener)
        self.add_callback(self.watch)

    # Order

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        # The deck is shuffled already.
        return torch.utils.data.SequentialSampler(self.teacher.course.deck)

    # Numbers that are none

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As Trainer's; a loss that is no number ends the run here."""
        loss = super().training_step(*args, **kwargs)
        # Of several processes each must learn of it: it reaches their gradients, which are averaged.
        if self.args.world_size == 1 and not bool(torch.isfinite(loss).all()):
            self._diverged("loss", float(loss))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        value = float(norm) if norm is not None else 0.0
        scaler = getattr(self.accelerator, "scaler", None)
        # With a scaler an overflow only lowers the scale, until there is nothing left to lower.
        if not math.isfinite(value) and (scaler is None or scaler.get_scale() <= 1.0):
            self._diverged("gradient", value)
        return norm

    def _diverged(self, what: str, value: float) -> None:
        step = self.state.global_step + 1
        kind = "not a number" if math.isnan(value) else "infinite"
        kept = f" The adapter of step {step - 1} is kept." if step > 1 and not self.teacher.course.only else ""
        raise Diverged(
            f"The {what} became {kind} in step {step}, so the run stopped before that step changed anything.{kept}",
            "Lower learning_rate, or look for odd rows in the data; dtype float32 bears larger numbers.",
        )

    # What is told

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, and told to the listener."""
        course, step = self.teacher.course, self.state.global_step
        rows = step * course.recipe.batch_size * course.recipe.accumulation
        self.state.epoch = rows / len(course.deck.rows)
        super().log(logs)
        if self.is_world_process_zero() and "train_runtime" not in logs:
            numbers = {key: float(value) for key, value in logs.items() if isinstance(value, (int, float))}
            if "loss" in numbers:
                numbers["epoch"] = self.state.epoch
            self.teacher.listener.row(step=step, **{key: n for key, n in numbers.items() if math.isfinite(n)})

    # What is held out

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss of a token that is held out, each process measuring its share."""
        course, rank, world = self.teacher.course, self.args.process_index, self.args.world_size
        batch = max(1, course.recipe.batch_size)
        total, count = summed_loss(
            self.teacher.learner.model, course.heldout[rank::world], course.padding, batch, self.args.device
        )
        if world > 1:
            both = torch.tensor([total, count], dtype=torch.float32, device=self.args.device)
            total, count = self.accelerator.reduce(both, "sum").tolist()
        loss = total / count if count else math.nan
        if not math.isfinite(loss):
            error = Diverged(
                f"The held-out loss after step {self.state.global_step} is no number.", "Lower learning_rate."
            )
            error.measured = True
            raise error
        self.log({"eval_loss": loss})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {"eval_loss": loss})
        self._judge()
        return {"eval_loss": loss}

    def _judge(self) -> None:
        """Keep the best measurement, and stop after so many that were no better, where the recipe says so."""
        best = self.teacher.best
        if not self.teacher.course.recipe.early_stop or not self.state.global_step or best is None:
            return
        if best[0] == self.state.global_step:
            self.control.should_save = True
        if self.teacher.spent:
            self.control.should_training_stop = True

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.keep()

    def keep(self) -> None:
        """Write a checkpoint of the last whole step."""
        self.watch.lower()
        self.teacher.check()
        step = self.state.global_step
        dice = [self.watch.dice]
        if self.args.world_size > 1:
            dice = [None] * self.args.world_size  # type: ignore[list-item]
            torch.distributed.all_gather_object(dice, self.watch.dice)
        if not self.args.should_save:
            return
        facts = {
            "kind": checkpoints.KIND,
            "step": step,
            "loss": self._latest("loss"),
            "eval_loss": self._latest("eval_loss", step),
            "threads": torch.get_num_threads(),
            "processes": self.args.world_size,
            "data": self.teacher.course.deck.corpus.digest(),
        }
        with publish.publication(checkpoints.place(self.teacher.folder, step), facts) as fresh:
            save_adapter(self.teacher.learner.model, fresh)
            scaler = getattr(self.accelerator, "scaler", None)
            assert self.optimizer is not None and self.lr_scheduler is not None
            more = {"scaler": scaler.state_dict()} if scaler is not None else {}
            state.write(fresh, self.optimizer.state_dict(), self.lr_scheduler.state_dict(), dice, **more)
            self.state.save_to_json(str(fresh / "trainer_state.json"))
        checkpoints.thin(self.teacher.folder)

    def _latest(self, key: str, step: int | None = None) -> float | None:
        rows = [row for row in self.state.log_history if key in row and (step is None or row["step"] == step)]
        return rows[-1][key] if rows else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self.teacher.learner.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        found = state.read(Path(checkpoint))
        assert self.optimizer is not None and self.lr_scheduler is not None
        self.optimizer.load_state_dict(found["optimizer"])
        self.lr_scheduler.load_state_dict(found["schedule"])
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and "scaler" in found["more"]:
            scaler.load_state_dict(found["more"]["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        dice, rank = state.read(Path(checkpoint))["dice"], self.args.process_index
        if rank < len(dice):
            state.cast(dice[rank])
            self.watch.roll()


def arguments(teacher: Teacher) -> TrainingArguments:
    """The recipe in the words of transformers.

    Raises:
        NibbleError: the batch cannot be shared by the devices evenly.
    """
    course, recipe = teacher.course, teacher.course.recipe
    cpu, shared = teacher.device == "cpu", int(os.environ.get("WORLD_SIZE", "1")) > 1
    args = TrainingArguments(
        output_dir=str(teacher.folder / checkpoints.FOLDER), max_steps=course.steps,
        per_device_train_batch_size=recipe.batch_size, gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate, warmup_steps=recipe.warmup_steps, lr_scheduler_type=recipe.scheduler,
        optim=recipe.optimizer, weight_decay=recipe.weight_decay, max_grad_norm=recipe.max_grad_norm,
        logging_steps=recipe.logging_steps, logging_first_step=True, logging_nan_inf_filter=False,
        save_strategy="no" if course.only else "steps", save_steps=recipe.save_steps,
        eval_strategy="steps" if course.heldout and not course.only else "no",
        eval_steps=recipe.eval_steps or recipe.save_steps, seed=recipe.seed, data_seed=recipe.seed, use_cpu=cpu,
        bf16=False, fp16=not cpu and teacher.learner.dtype == torch.float16, report_to=[], disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=not cpu, ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False, ddp_backend="gloo" if cpu and shared else None, log_level="error",
    )  # fmt: skip
    world = args.world_size
    if recipe.batch_size % world:
        raise NibbleError(
            f"batch_size is {recipe.batch_size}, which {world} devices cannot share evenly.",
            f"Take a multiple of {world}.",
        )
    args.per_device_train_batch_size = recipe.batch_size // world
    # Several GPUs in one process would be used by copying the model in each step; one process a GPU does better.
    _ = args.device
    args._n_gpu = min(args._n_gpu, 1)
    return args
