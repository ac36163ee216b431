"""What stands beside the loop at every step: it tells, it times, and no stop falls into an update.

Promises that a stop or Ctrl+C which comes while the adapter changes waits until the step is whole. Knows nothing of
losses and checkpoints.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nibble.training import state

if TYPE_CHECKING:
    from nibble.training.loop import Course, Listener


class Watch(TrainerCallback):
    """Tells of each step, times it, remembers the dice it ended with, and keeps a stop from falling into an update."""

    def __init__(self, course: Course, listener: Listener) -> None:
        self._course, self._listener = course, listener
        self._began = time.perf_counter()
        self._shield = Shield()
        self.seconds: list[float] = []
        self.dice = state.dice()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """A step begins."""
        self._began = time.perf_counter()
        return control

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """The adapter is about to change."""
        self._shield.up()
        return control

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """The adapter and the count of steps agree again."""
        self.seconds.append(time.perf_counter() - self._began)
        self.roll()
        only = self._course.only
        if only and state.global_step >= only:
            control.should_training_stop, control.should_save, control.should_evaluate = True, False, False
        if state.global_step >= state.max_steps:
            control.should_log = True
        if state.is_world_process_zero:
            self._listener.step(state.global_step, self._course.steps)
        self._shield.down()
        return control

    def roll(self) -> None:
        """Remember the generators as they are."""
        self.dice = state.dice()

    def lower(self) -> None:
        """Let stops through, whatever happened."""
        self._shield.down()


class Shield:
    """While it is up a stop or Ctrl+C waits; when it is taken down, what waited comes."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._waiting: list[int] = []

    def up(self) -> None:
        """Only the main thread can say what a signal does; elsewhere there is nothing to hold back."""
        if not self._before and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hold) for number in self.SIGNALS}

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._waiting.append(number)

    def down(self) -> None:
        """Put the handlers back and call the one whose signal came."""
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, handler)
        waiting, self._waiting = self._waiting, []
        for number in waiting:
            signal.raise_signal(number)
