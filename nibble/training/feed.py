"""What a training run is fed: samples kept compactly, some held out, dealt in an order that the seed alone decides.

Promises that sample number n of a run is the same whoever asks, however many processes share the work and wherever a
run goes on; that padding is never in the loss, whatever token it is; and that packed samples do not see each other.
Knows nothing of models.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from nibble.data.check import Report, check
from nibble.data.render import Encoder
from nibble.data.rows import IGNORED, ColumnMap, Row, Sample

Segment = tuple[list[int], list[int]]
"""Ids and labels of one sample."""


class Corpus:
    """Samples as flat arrays, five bytes a token; an index gives ids and labels."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._trained = bytearray()
        self._ends = array("q", [0])

    def add(self, sample: Sample) -> None:
        """Take one more."""
        self._ids.extend(sample.ids)
        self._trained.extend(sample.trained)
        self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place: int) -> Segment:
        start, end = self._ends[place], self._ends[place + 1]
        ids = self._ids[start:end].tolist()
        labels = [token if learnt else IGNORED for token, learnt in zip(ids, self._trained[start:end], strict=True)]
        return ids, labels

    def tokens(self, place: int) -> int:
        """Length of one sample."""
        return self._ends[place + 1] - self._ends[place]

    def trained(self, places: Sequence[int]) -> int:
        """Tokens of these samples that the loss is taken on."""
        return sum(sum(self._trained[self._ends[place] : self._ends[place + 1]]) for place in places)


def read(path: Path, encoder: Encoder, mapping: ColumnMap) -> tuple[Corpus, Report]:
    """A data set checked and made into samples, in one pass.

    Raises:
        DataError: it cannot be trained on; the sentence names a row or a column.
    """
    corpus = Corpus()

    def encode(row: Row) -> Sample:
        sample = encoder.encode(row)
        if any(sample.trained):
            corpus.add(sample)
        return sample

    report = check(path, mapping, encode=encode)
    report.require()
    return corpus, report


def split(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the samples to train on, and of those held out; the seed decides, and at least one is trained on."""
    held = min(max(1, round(count * share)), count - 1) if share else 0
    chosen = set(random.Random(seed).sample(range(count), held))
    return [place for place in range(count) if place not in chosen], sorted(chosen)


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
    _pass: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[Segment]:
        if index < len(self.first):
            return [self.corpus[place] for place in self.rows[self.first[index]]]
        number, place = divmod(index - len(self.first), len(self.rows))
        if number != self._pass[0]:
            order = list(range(len(self.rows)))
            random.Random(f"{self.seed} {number}").shuffle(order)
            self._pass = (number, order)
        return [self.corpus[sample] for sample in self.rows[self._pass[1][place]]]

    def longest_first(self, count: int) -> Deck:
        """The same deck with its `count` longest rows dealt first."""
        sizes = [sum(map(self.corpus.tokens, row)) for row in self.rows]
        order = sorted(range(len(sizes)), key=lambda row: (-sizes[row], row))
        return replace(self, first=[order[place % len(order)] for place in range(count)], _pass=(-1, []))


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
