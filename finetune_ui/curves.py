"""The curves of a run, from its rows of numbers: loss and held-out loss by step, and the learning rate.

Promises that a broken or foreign row is passed over. Knows nothing of Gradio and of how a curve is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

Plain = Mapping[str, Any]

MOST_POINTS = 500
"""Of one curve: more no screen shows."""


def by_step(rows: Sequence[Plain]) -> list[dict[str, float]]:
    """One row for each step, in order; what a resumed run told again replaces what it told before."""
    steps: dict[float, dict[str, float]] = {}
    for row in rows:
        numbers = {key: float(value) for key, value in row.items() if _number(value)}
        if "step" in numbers:
            steps.setdefault(numbers["step"], {}).update(numbers)
    return [steps[step] for step in sorted(steps)]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def curve(rows: Sequence[Plain], names: Mapping[str, str]) -> list[tuple[float, float, str]]:
    """Points of several curves: step, value, and what the curve is called.

    Args:
        rows: as `by_step` gives them.
        names: key of a row -> what its curve is called.
    """
    points = []
    for key, name in names.items():
        own = [(row["step"], row[key], name) for row in rows if key in row]
        apart = max(1, -(-len(own) // MOST_POINTS))
        # The last one is always there.
        points += own[::apart] + ([own[-1]] if own and (len(own) - 1) % apart else [])
    return points
