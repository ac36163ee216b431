"""How far long work is, how fast it goes and how long it will take.

Promises that time is taken from a clock that nobody can set back, and that within a stage `done` never falls.
Knows nothing of files and terminals.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_S = 30.0
"""Speed is the mean over the last this many seconds: steady to read, and soon right after a change."""
SAMPLE_S = 0.2

SIZES = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Progress:
    """One reading."""

    done: float = 0.0
    total: float = 0.0
    """0 where it is unknown."""
    unit: str = ""
    """What is counted; "B" is bytes."""
    stage: str = ""
    speed: float = 0.0
    """Units a second; 0 where it is not known yet."""
    seconds_left: float | None = None
    """To the end of this stage; None where it is not known."""

    @property
    def fraction(self) -> float | None:
        """Share of the stage that is done, 0 to 1; None where the total is unknown."""
        return self.done / self.total if self.total else None

    def text(self) -> str:
        """One line, such as `layers 12/28 · 43 % · 3.1 layers/s · 5 s left`."""
        of = f"{self._amount(self.done)}/{self._amount(self.total)}" if self.total else self._amount(self.done)
        counted = "" if not (self.done or self.total) else f"{of} {self.unit}".strip() if self.unit != "B" else of
        parts = [f"{self.stage} {counted}".strip()]
        if self.fraction is not None:
            parts.append(f"{100 * self.fraction:.0f} %")
        if self.speed:
            per = "/s" if self.unit in ("", "B") else f" {self.unit}/s"
            parts.append(f"{self._amount(self.speed, rate=True)}{per}")
        if self.seconds_left is not None:
            parts.append(f"{duration(self.seconds_left)} left")
        return " · ".join(part for part in parts if part)

    def _amount(self, value: float, rate: bool = False) -> str:
        if self.unit == "B":
            return size(value)
        return f"{value:.1f}" if rate and value < 100 else f"{value:,.10g}"


def size(count: float) -> str:
    """Bytes for a person, such as `1.2 GB` (powers of 1000)."""
    step = 0
    while abs(count) >= 999.5 and step < len(SIZES) - 1:
        count, step = count / 1000, step + 1
    return f"{count:.0f} {SIZES[step]}" if step < 2 else f"{count:.1f} {SIZES[step]}"


def duration(seconds: float) -> str:
    """Seconds for a person, such as `3 min 20 s`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Meter:
    """Makes readings out of what a task reports; may be fed from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._mutex = threading.Lock()
        self._latest = Progress()
        self._samples: deque[tuple[float, float]] = deque()

    def update(self, done: float, total: float, unit: str = "", stage: str = "") -> bool:
        """Take in a report; True where a new stage begins. A number that is none, or negative, counts as 0."""
        done, total = (float(n) if math.isfinite(n) and n > 0 else 0.0 for n in (done, total))
        with self._mutex:
            last, now = self._latest, self._clock()
            new_stage = (stage, unit) != (last.stage, last.unit)
            if new_stage:
                self._samples.clear()
            elif total == last.total:
                done = max(done, last.done)
            if total:
                done = min(done, total)
            if not self._samples or now - self._samples[-1][0] >= SAMPLE_S:
                self._samples.append((now, done))
            # One sample beyond the window stays: work slower than the window has a speed too.
            while len(self._samples) > 2 and now - self._samples[1][0] > WINDOW_S:
                self._samples.popleft()
            self._latest = Progress(done, total, unit, stage)
        return new_stage

    def reading(self) -> Progress:
        """The latest report, with speed and time left."""
        with self._mutex:
            latest, now = self._latest, self._clock()
            start, first = self._samples[0] if self._samples else (now, latest.done)
        elapsed, gained = now - start, latest.done - first
        speed = gained / elapsed if elapsed >= SAMPLE_S and gained > 0 else 0.0
        left = (latest.total - latest.done) / speed if speed and latest.done < latest.total else None
        return Progress(latest.done, latest.total, latest.unit, latest.stage, speed, left)
