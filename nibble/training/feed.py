"""What a training run is fed: samples kept compactly, some held out, dealt in an order that the seed alone decides.

Promises that sample number n of a run is the same whoever asks, however many processes share the work and wherever a
run goes on; that padding is never in the loss, whatever token it is; and that packed samples do not see each other.
Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import mmap
import random
import tempfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch.utils.data import Dataset

from nibble.data.check import Report, check
from nibble.data.render import Encoder
from nibble.data.rows import IGNORED, ColumnMap, Row, Sample
from nibble.errors import DataError

CHUNK = 2**20
"""Bytes of samples that are written at once."""

HELD_OUT = 500
"""Samples held out at most: measuring more would take longer than training between two measurements."""

Segment = tuple[list[int], list[int]]
"""Ids and labels of one sample."""


class Corpus:
    """Samples on disk, five bytes a token, mapped into memory; an index gives ids and labels.

    Its files have no names: whatever ends this process, they go with it.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """
        Args:
            folder: on whose disk the samples lie; None is where the system has its temporary files.
        """
        self._files = [tempfile.TemporaryFile(dir=folder, buffering=CHUNK) for _ in range(2)]  # noqa: SIM115
        self._ends = array("q", [0])
        self._views: tuple[memoryview, memoryview] | None = None
        self._digest = ""

    def add(self, sample: Sample) -> None:
        """Take one more, before the first is read.

        Raises:
            OSError: the disk is full.
        """
        ids, trained = self._files
        ids.write(array("i", sample.ids))
        trained.write(bytes(sample.trained))
        self._ends.append(self._ends[-1] + len(sample.ids))

    def seal(self) -> tuple[memoryview, memoryview]:
        """Take no more; the ids, and of each whether it is trained.

        Raises:
            OSError: the disk is full.
        """
        if self._views is None:
            views = []
            for file in self._files:
                file.flush()
                empty = file.tell() == 0
                views.append(memoryview(b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
                file.close()
            self._views = views[0].cast("i"), views[1]
        return self._views

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place: int) -> Segment:
        every, trained = self.seal()
        start, end = self._ends[place], self._ends[place + 1]
        ids = every[start:end].tolist()
        labels = [token if learnt else IGNORED for token, learnt in zip(ids, trained[start:end], strict=True)]
        return ids, labels

    def tokens(self, place: int) -> int:
        """Length of one sample."""
        return self._ends[place + 1] - self._ends[place]

    def mark(self, place: int) -> int:
        """The same for samples of the same tokens, in this process."""
        return hash(self.seal()[0][self._ends[place] : self._ends[place + 1]].tobytes())

    def digest(self) -> str:
        """sha256 of all samples: tokens, ends, and which are trained. Read once."""
        if not self._digest:
            found = hashlib.sha256(self._ends.tobytes())
            for view in self.seal():
                found.update(view)
            self._digest = found.hexdigest()
        return self._digest

    def trained(self, places: Iterable[int]) -> int:
        """Tokens of these samples that the loss is taken on."""
        trained = self.seal()[1]
        return sum(sum(trained[self._ends[place] : self._ends[place + 1]]) for place in places)


Item = TypeVar("Item")


class Each(Sequence[Item]):
    """What is made of each of some samples, when it is asked for: a list of them all would not stay small."""

    def __init__(self, places: Sequence[int], make: Callable[[int], Item]) -> None:
        self.places, self.make = places, make

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return Each(self.places[index], self.make) if isinstance(index, slice) else self.make(self.places[index])


def read(path: Path, encoder: Encoder, mapping: ColumnMap, folder: Path | None = None) -> tuple[Corpus, Report]:
    """A data set checked and made into samples, in one pass and in flat memory.

    Args:
        path: as `nibble.data.store.find` returns it.
        encoder: makes the samples.
        mapping: what the person says of its columns.
        folder: as of `Corpus`.

    Raises:
        DataError: it cannot be trained on, and the sentence names a row or a column; or its samples have no room.
    """
    corpus = Corpus(folder)

    def encode(row: Row) -> Sample:
        sample = encoder.encode(row)
        if any(sample.trained):
            corpus.add(sample)
        return sample

    try:
        report = check(path, mapping, encode=encode)
        corpus.seal()
    except OSError as error:
        raise DataError(
            f"The samples of {path.name} could not be stored: {error.strerror}.",
            "They take five bytes a token: free some space, or set home (or TMPDIR) to a larger disk.",
        ) from None
    report.require()
    return corpus, report


def split(corpus: Corpus, share: float, seed: int) -> tuple[Sequence[int], Sequence[int]]:
    """Numbers of the samples to train on, and of those held out; the seed decides, and at least one is trained on.

    At most `HELD_OUT` are held out. One that stands again among the others is trained on after all.
    """
    count = len(corpus)
    held = min(max(1, round(count * share)), count - 1, HELD_OUT) if share else 0
    chosen = set(random.Random(seed).sample(range(count), held))
    alike: dict[int, list[int]] = {}
    for place in chosen:
        alike.setdefault(corpus.mark(place), []).append(place)
    for place in range(count) if chosen else ():
        if place not in chosen:
            chosen.difference_update(alike.pop(corpus.mark(place), ()))
    return array("q", (place for place in range(count) if place not in chosen)), sorted(chosen)


def pack(corpus: Corpus, places: Sequence[int], longest: int) -> list[list[int]]:
    """Samples put together into rows of at most `longest` tokens, the long ones first, each where it fits best."""
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}
    for place in sorted(places, key=lambda place: (-corpus.tokens(place), place)):
        size = corpus.tokens(place)
        left = min((left for left, open_rows in room.items() if left >= size and open_rows), default=None)
        if left is None:
            rows.append([])
            row, left = len(rows) - 1, longest
        else:
            row = room[left].pop()
            if not room[left]:
                del room[left]
        rows[row].append(place)
        room.setdefault(left - size, []).append(row)
    return rows


@dataclass
class Deck(Dataset[list[Segment]]):
    """The rows of a whole run, pass after pass, each pass shuffled anew; an index gives the samples of one row."""

    corpus: Corpus
    rows: Sequence[Sequence[int]]
    length: int
    """Rows that the run takes in all."""
    seed: int
    first: Sequence[int] = ()
    """Rows that come before the first pass: a dry run's longest."""
    _pass: tuple[int, array[int]] = (-1, array("q"))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[Segment]:
        if index < len(self.first):
            return [self.corpus[place] for place in self.rows[self.first[index]]]
        number, place = divmod(index - len(self.first), len(self.rows))
        if number != self._pass[0]:
            order = array("q", range(len(self.rows)))
            random.Random(f"{self.seed} {number}").shuffle(order)
            self._pass = (number, order)
        return [self.corpus[sample] for sample in self.rows[self._pass[1][place]]]

    def longest_first(self, count: int) -> Deck:
        """The same deck with its `count` longest rows dealt first."""
        sizes = [sum(map(self.corpus.tokens, row)) for row in self.rows]
        order = sorted(range(len(sizes)), key=lambda row: (-sizes[row], row))
        return replace(self, first=[order[place % len(order)] for place in range(count)], _pass=(-1, array("q")))


Batch = dict[str, torch.Tensor]


def collator(padding: int, packed: torch.dtype | None = None) -> Callable[[Sequence[list[Segment]]], Batch]:
    """A function that makes a batch of rows, padded on the right; padding is masked and not in the loss.

    Args:
        padding: the token to pad with.
        packed: of the attention mask that keeps a row's samples apart; None: each row is one sample.
    """

    def collate(rows: Sequence[list[Segment]]) -> Batch:
        width = max(sum(len(ids) for ids, _ in row) for row in rows)
        ids = torch.full((len(rows), width), padding)
        labels = torch.full((len(rows), width), IGNORED)
        # Samples of a row by number, from 1; padding is 0.
        owner = torch.zeros((len(rows), width), dtype=torch.long)
        positions = torch.zeros((len(rows), width), dtype=torch.long)
        for row, segments in enumerate(rows):
            start = 0
            for number, (tokens, targets) in enumerate(segments, 1):
                part = slice(start, start + len(tokens))
                ids[row, part], labels[row, part] = torch.tensor(tokens), torch.tensor(targets)
                owner[row, part], positions[row, part] = number, torch.arange(len(tokens))
                start += len(tokens)
        if packed is None:
            return {"input_ids": ids, "attention_mask": (owner > 0).long(), "labels": labels}
        mask = _apart(owner, packed)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}

    return collate


def _apart(owner: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the attention's scores, [rows, 1, to, from]: 0 within a sample and backward, else the least."""
    width = owner.shape[1]
    sees = (owner[:, :, None] == owner[:, None, :]) & torch.ones(width, width, dtype=torch.bool).tril()
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[:, None]


def as_mapping(columns: Any, leave_out: bool) -> ColumnMap:
    """What a recipe says of its data set's columns."""
    return ColumnMap(columns=dict(columns), leave_out=leave_out)
