"""What a merged folder holds, compared with the base's: read back from the files, never taken from memory.

Promises that each changed tensor is compared number by number with W + scale·B·A, computed anew in float64, and that
every other tensor is compared byte by byte. Knows nothing of how the files came about.

A number is right where it differs from the float64 sum by no more than half a step of the stored dtype, plus what
float32 sums of this length may be off: `slack`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from nibble.checkpoint import read_header, weight_files
from nibble.errors import ModelError
from nibble.merging.changes import Change, row_blocks
from nibble.merging.writing import Output, as_matrix
from nibble.sources.safetensors import reader

FLOAT32 = 2.0**-23
PIECE = 2**22


@dataclass
class Tally:
    """Sums over the numbers of one tensor, or of all."""

    numbers: int = 0
    altered: int = 0
    """Numbers that differ from the base's."""
    asked: float = 0.0
    """Sum of squares of the change that the adapter asks for."""
    made: float = 0.0
    """Sum of squares of the change that is in the files."""
    along: float = 0.0
    """Sum of products of the two."""
    largest: float = 0.0
    """Of the change that is asked for."""
    worst: float = 0.0
    """Largest difference from the exact sum."""
    strain: float = 0.0
    """Largest difference as a share of what is allowed; above 1 it is wrong."""

    def add(self, other: Tally) -> None:
        """Take another's sums."""
        for key in ("numbers", "altered", "asked", "made", "along"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        for key in ("largest", "worst", "strain"):
            setattr(self, key, max(getattr(self, key), getattr(other, key)))

    @property
    def share(self) -> float:
        """Of the change that is asked for, along its own direction: 1 is all of it."""
        return self.along / self.asked if self.asked else 1.0

    @property
    def likeness(self) -> float:
        """Cosine between the change in the files and the one that is asked for."""
        return self.along / sqrt(self.asked * self.made) if self.asked and self.made else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "numbers": self.numbers, "altered": self.altered, "change": sqrt(self.asked), "largest": self.largest,
            "share": self.share, "likeness": self.likeness, "worst_error": self.worst, "of_tolerance": self.strain,
        }  # fmt: skip


@dataclass
class Found:
    """What was found of a merged folder."""

    changed: dict[str, Tally] = field(default_factory=dict)
    equal: int = 0
    """Tensors that hold the base's bytes."""
    equal_bytes: int = 0
    dtypes: set[str] = field(default_factory=set)
    """Of the changed tensors."""

    @property
    def total(self) -> Tally:
        """Over all changed tensors."""
        total = Tally()
        for tally in self.changed.values():
            total.add(tally)
        return total

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as merge_report.json has it."""
        return {
            "targets": len(self.changed),
            "unaltered_targets": sum(not tally.altered for tally in self.changed.values()),
            "dtypes": sorted(self.dtypes),
            "tolerance": "half a step of the stored dtype at the exact sum, plus the rounding of float32 sums",
            "total": self.total.as_dict(),
            "equal_tensors": self.equal,
            "equal_bytes": self.equal_bytes,
            "by_tensor": {name: tally.as_dict() for name, tally in self.changed.items()},
        }


def examine(base: Path, folder: Path, outputs: Sequence[Output], tell: Callable[[int, int], None]) -> Found:
    """Compare a merged folder with its base.

    Args:
        base: folder of the base.
        folder: the merged one.
        outputs: what each tensor is meant to be.
        tell: told the tensors that are done.

    Raises:
        ModelError: a tensor is missing, is too many, or is not what it is meant to be.
    """
    ours, theirs, found = _places(folder), _places(base), Found()
    if ours.keys() != {output.name for output in outputs} or not theirs.keys() <= ours.keys():
        raise _unproven("the files do not hold the tensors that they are meant to")
    for done, output in enumerate(outputs):
        tell(done, len(outputs))
        if output.change:
            tally = compare(_read(theirs, output.stored), _read(ours, output.name), output.change)
            if tally.strain > 1:
                raise _unproven(f"{output.name} is off by {tally.worst:.3g}, more than rounding explains")
            found.changed[output.name] = tally
            found.dtypes.add(ours[output.name][1]["dtype"])
            continue
        if not _same(theirs[output.stored], ours[output.name]):
            raise _unproven(f"{output.name} is no target of the adapter and differs from the base's")
        found.equal += 1
        found.equal_bytes += _length(ours[output.name])
    tell(len(outputs), len(outputs))
    return found


def compare(base: torch.Tensor, stored: torch.Tensor, change: Change) -> Tally:
    """Measure a stored tensor against the base's and the change that is asked for.

    Raises:
        ModelError: another dtype or shape.
    """
    if base.dtype != stored.dtype or base.shape != stored.shape:
        raise _unproven("a tensor has another dtype or shape than the base's")
    tally = Tally(numbers=stored.numel())
    before, after = as_matrix(base), as_matrix(stored)
    start = before if change.values is None else as_matrix(change.values)
    for rows in row_blocks(tuple(before.shape)):
        old, new, exact = before[rows].double(), after[rows].double(), start[rows].double()
        reach = exact.abs()
        more = change.add(rows, torch.float64)
        if more is not None:
            exact = exact + more
            reach += _reach(change, rows)
        asked, made = exact - old, new - old
        error = (new - exact).abs()
        tally.add(
            Tally(
                altered=int(made.count_nonzero()), asked=float(asked.square().sum()),
                made=float(made.square().sum()), along=float((asked * made).sum()),
                largest=float(asked.abs().max()), worst=float(error.max()),
                strain=float((error / tolerance(exact, reach, change, stored.dtype)).max()),
            )
        )  # fmt: skip
    return tally


def tolerance(exact: torch.Tensor, reach: torch.Tensor, change: Change, dtype: torch.dtype) -> torch.Tensor:
    """How far a stored number may be from the exact sum.

    Half a step of the dtype at that sum, and the float32 sum's own rounding before: of a product over `rank`
    numbers and one addition, (rank + 3) · 2^-23 · (|W| + scale · |B|·|A|).
    """
    facts = torch.finfo(dtype)
    rank = 0 if change.right is None else change.right.shape[0]
    # The sum may lie just below a power of two and be rounded from just above.
    slack = 0.0 if rank == 0 else (rank + 3) * FLOAT32
    largest = exact.abs() + slack * reach
    _, exponent = torch.frexp(largest)
    half = torch.where(largest > 0, torch.ldexp(torch.full_like(largest, facts.eps / 4), exponent), 0.0)
    return torch.clamp(half, min=facts.smallest_normal * facts.eps / 2) + slack * reach


def _reach(change: Change, rows: slice) -> torch.Tensor:
    assert change.left is not None and change.right is not None
    return abs(change.scale) * (change.left[rows].double().abs() @ change.right.double().abs())


Place = tuple[Path, Mapping[str, Any]]


def _places(folder: Path) -> dict[str, Place]:
    return {name: (file, entry) for file in weight_files(folder) for name, entry in read_header(file).items()}


def _read(places: Mapping[str, Place], name: str) -> torch.Tensor:
    return reader(places[name][0], name)()


def _length(place: Place) -> int:
    begin, end = place[1]["data_offsets"]
    return int(end - begin)


def _same(one: Place, other: Place) -> bool:
    """Whether two stored tensors have the same dtype, shape and bytes."""
    if (one[1]["dtype"], one[1]["shape"]) != (other[1]["dtype"], other[1]["shape"]):
        return False
    return all(a == b for a, b in zip(_pieces(one), _pieces(other), strict=True))


def _pieces(place: Place) -> Iterator[bytes]:
    file, entry = place
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        stream.seek(start + entry["data_offsets"][0])
        left = _length(place)
        while left > 0:
            piece = stream.read(min(PIECE, left))
            if not piece:
                raise _unproven(f"{file.name} ends too early")
            left -= len(piece)
            yield piece


def _unproven(why: str) -> ModelError:
    return ModelError(
        f"The merge could not be proven, so nothing was kept: {why}.", "Try again; report it if it stays."
    )
