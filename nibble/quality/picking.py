"""`Pick for me`: the smallest form of a model that loses no more than is allowed and fits into the memory there is.

Promises that what is proposed was measured itself, packed as proposed and on the text it was searched with, and that
the same model, text and limits give the same proposal but for what memory measured. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nibble.errors import ModelError
from nibble.lowbit.formats import FORMATS
from nibble.quality.measuring import Bench, Conditions, Reports, Silent, Subject

RAISED = "sym_int8"
"""What the layers that cost most are raised to."""

SHORT = Conditions(tokens=1024)
"""A short text is enough to search with."""

TRIES = 5
"""Mixed forms that are measured, at most."""

Row = Mapping[str, Any]
"""One format's figures, as in a report."""


@dataclass(frozen=True)
class Limits:
    """What must hold."""

    max_kl: float
    """Mean KL to full precision, in nats."""
    memory_bytes: int = 0
    """Peak memory while it is loaded and answers; 0 sets no limit."""

    def __post_init__(self) -> None:
        if not self.max_kl > 0:
            raise ModelError(
                f"A quality limit of {self.max_kl} nats cannot be held.", "Give one above 0, such as 0.05."
            )

    def quality(self, row: Row) -> bool:
        """Whether it loses little enough."""
        return bool(row["kl_mean"] <= self.max_kl)

    def memory(self, row: Row) -> bool:
        """Whether it fits."""
        return not self.memory_bytes or bool(row["peak_bytes"] <= self.memory_bytes)


@dataclass(frozen=True)
class Proposal:
    """What to pack a model as, and why."""

    format: str
    overrides: dict[str, str]
    holds: bool
    """Whether both limits hold; otherwise this is the nearest."""
    why: str
    kl_mean: float
    size_bytes: int
    peak_bytes: int
    tried: list[dict[str, Any]] = field(default_factory=list)
    """Every form that was measured, in order: `format`, `overrides` and figures."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def pick(folder: Path, limits: Limits, conditions: Conditions, report: Reports | None = None) -> Proposal:
    """Search for the smallest form of a dense model that holds the limits.

    Formats are measured from the smallest on, until one loses little enough. Of the best format of each smaller size
    the layers that cost most for their bytes (`nibble.quality.sensitivity`: error and sensitivity in one) are raised to
    8 bits, as many as the estimate asks for; the smallest such form is measured, and the number of raised layers is
    narrowed down from there. What holds with the fewest bytes is proposed.

    Args:
        folder: of a dense model.
        limits: what must hold.
        conditions: text, tokens and device.
        report: told the stage `evaluate`, and each form that was tried.

    Raises:
        NibbleError: as `nibble.quality.measure`; or the model does not fit into memory in full precision.
    """
    with Bench(conditions, report or Silent(), 2 + len(_SIZES) + TRIES) as bench:
        if bench.take_reference(folder) is None:
            raise ModelError(
                "Without the model in full precision beside it, no format can be judged.",
                "Choose a format yourself, or search on a machine with more memory.",
            )
        return Search(bench, folder, limits, report or Silent()).run()


_SIZES = sorted({row.bits_per_weight for row in FORMATS.values() if row.quantized})


class Measures(Protocol):
    """What measures: a `Bench`."""

    def measure(self, subject: Subject) -> dict[str, Any]: ...

    def sensitivities(self, folder: Path, formats: Sequence[str]) -> list[dict[str, Any]]: ...


class Search:
    """The forms of one model that were measured, and which of them to propose."""

    def __init__(self, bench: Measures, folder: Path, limits: Limits, report: Reports) -> None:
        self._bench, self._folder, self._limits, self._report = bench, folder, limits, report
        self.tried: list[dict[str, Any]] = []

    def run(self) -> Proposal:
        """Search, and say what was found."""
        self.formats()
        self.mixtures()
        return self.proposal()

    def formats(self) -> None:
        """Measure whole formats, a size after the other, until one holds both limits."""
        for size in _SIZES:
            rows = [
                self._try(row.name, {}) for row in FORMATS.values() if row.quantized and row.bits_per_weight == size
            ]
            if any(self._limits.quality(row) and self._limits.memory(row) for row in rows):
                return

    def mixtures(self) -> None:
        """Raise layers of a format that is smaller than the best found so far, where that can make a smaller form."""
        best = self._best()
        smaller = [row for row in self.tried if not best or row["size_bytes"] < best["size_bytes"]]
        if best is None or not smaller:
            return
        names = list(dict.fromkeys(row["format"] for row in smaller))
        layers = self._bench.sensitivities(self._folder, [*names, RAISED])
        plans = [plan for row in smaller if (plan := Plan.of(row, layers))]
        if not plans:
            return
        plan = min(plans, key=lambda plan: (plan.size(plan.enough(self._limits.max_kl)), plan.base["kl_mean"]))
        low, high = 0, None
        count = plan.enough(self._limits.max_kl)
        for _ in range(TRIES):
            count = min(max(count, low + 1), len(plan.order) if high is None else high - 1)
            if count <= low or plan.size(count) >= best["size_bytes"]:
                return
            row = self._try(plan.base["format"], plan.overrides(count))
            if self._limits.quality(row):
                high, best = count, row
                count = (low + high) // 2
            else:
                low = count
                count = (low + high) // 2 if high else plan.enough(self._limits.max_kl, of=row, count=low)

    def proposal(self) -> Proposal:
        """The smallest form that holds both limits, else the nearest to them."""
        both = [row for row in self.tried if self._limits.quality(row) and self._limits.memory(row)]
        fitting = [row for row in self.tried if self._limits.memory(row)]
        if both:
            row = min(both, key=lambda row: (row["size_bytes"], row["kl_mean"]))
        elif fitting:
            row = min(fitting, key=lambda row: row["kl_mean"])
        else:
            row = min(self.tried, key=lambda row: (row["peak_bytes"], row["kl_mean"]))
        return Proposal(
            row["format"], dict(row.get("overrides") or {}), bool(both), self._why(row, bool(both)), row["kl_mean"],
            row["size_bytes"], row["peak_bytes"], self.tried,
        )  # fmt: skip

    def _why(self, row: Row, holds: bool) -> str:
        loses = f"loses {row['kl_mean']:.5f} nats and takes {row['peak_bytes'] / 1e9:.2f} GB at its peak"
        if holds:
            return f"{describe(row)} {loses}: the smallest of {len(self.tried)} forms measured that holds the limits."
        wanted = f"{self._limits.max_kl:g} nats" + (
            f" within {self._limits.memory_bytes / 1e9:.2f} GB" if self._limits.memory_bytes else ""
        )
        return (
            f"None of {len(self.tried)} forms measured holds {wanted}; the nearest is {describe(row)}, which {loses}."
        )

    def _best(self) -> dict[str, Any] | None:
        """The smallest that loses little enough."""
        rows = [row for row in self.tried if self._limits.quality(row)]
        return min(rows, key=lambda row: (row["size_bytes"], row["kl_mean"]), default=None)

    def _try(self, low_bit: str, overrides: Mapping[str, str]) -> dict[str, Any]:
        row = self._bench.measure(Subject(self._folder, low_bit, overrides))
        self.tried.append(row)
        verdict = "holds" if self._limits.quality(row) else "loses too much"
        self._report.note(f"{describe(row)}: {row['size_bytes'] / 1e6:.1f} MB, {row['kl_mean']:.5f} nats: {verdict}.")
        return row


@dataclass(frozen=True)
class Plan:
    """A measured format, and its layers in the order in which raising them is worth most."""

    base: Row
    order: tuple[str, ...]
    gains: tuple[float, ...]
    """Of each layer in `order`, the share of the base's KL that raising it should take away."""
    extra: tuple[int, ...]
    """Bytes that raising it adds."""

    @classmethod
    def of(cls, base: Row, layers: Sequence[Mapping[str, Any]]) -> Plan | None:
        """Sort layers by the KL that raising them takes away, for each byte it adds.

        Args:
            base: a measured format.
            layers: as `nibble.quality.sensitivity.sensitivities` returns them, with that format and RAISED.
        """
        low_bit = base["format"]
        total = sum(layer["kl"][low_bit] for layer in layers)
        rows = []
        for layer in layers:
            extra = layer["bytes"][RAISED] - layer["bytes"][low_bit]
            gain = layer["kl"][low_bit] - layer["kl"][RAISED]
            if extra > 0 and gain > 0:
                rows.append((gain / extra, layer["name"], gain / total, extra))
        if not rows:
            return None
        rows.sort(key=lambda row: (-row[0], row[1]))
        _, order, gains, added = zip(*rows, strict=True)
        return cls(base, order, gains, added)

    def enough(self, max_kl: float, *, of: Row | None = None, count: int = 0) -> int:
        """How many layers to raise so that the KL should fall to `max_kl`.

        Args:
            max_kl: the limit.
            of: a form that was measured with `count` layers raised; None is the base.
            count: see `of`.
        """
        measured = (of or self.base)["kl_mean"]
        left = 1 - sum(self.gains[:count])
        for number in range(count, len(self.order) + 1):
            expected = measured * max(0.0, 1 - sum(self.gains[:number])) / max(left, 1e-9)
            if expected <= max_kl:
                return number
        return len(self.order)

    def size(self, count: int) -> int:
        """Bytes of the model with so many layers raised."""
        return int(self.base["size_bytes"]) + sum(self.extra[:count])

    def overrides(self, count: int) -> dict[str, str]:
        """Those layers, as `LowBitConfig` takes them."""
        return dict.fromkeys(self.order[:count], RAISED)


def describe(row: Row) -> str:
    """What to call a form, such as `sym_int4 with 3 layers in sym_int8`."""
    count = len(row.get("overrides") or {})
    return row["format"] + (f" with {count} layer{'s' * (count > 1)} in {RAISED}" if count else "")
