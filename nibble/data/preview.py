"""Samples shown before anything is trained: their tokens as they read, each with whether it is trained on.

Promises pieces whose texts, joined, are the sample as the tokenizer decodes it. Knows nothing of colours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from nibble.data.render import Encoder, decode, padding_id, samples
from nibble.data.rows import ColumnMap, Sample
from nibble.errors import DataError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Piece:
    """One or, where a character needs several, a few tokens as they read."""

    text: str
    ids: tuple[int, ...]
    trained: bool


@dataclass(frozen=True)
class Shown:
    """A sample made readable."""

    row: int
    pieces: tuple[Piece, ...]
    tokens: int
    trained: int
    truncated: bool
    ends: bool
    """Whether the last trained token is the one that ends the answer or the text."""
    begins: int
    """Beginning-of-text tokens at its start; 0 where the tokenizer uses none, never more than 1."""


@dataclass(frozen=True)
class Preview:
    """The first samples of a data set, and what to know of all of them."""

    samples: list[Shown]
    template: str
    """`tokenizer`, or the name of a form of ours."""
    padding: str
    """The token that batches are padded with."""
    notes: list[str] = field(default_factory=list)


def preview(
    path: Path, tokenizer: Any, n: int = 3, mapping: ColumnMap | None = None, encoder: Encoder | None = None
) -> Preview:
    """The first `n` samples of a file as the model will be trained on them.

    Args:
        path: a data file.
        tokenizer: of transformers.
        n: samples to show.
        mapping: what the person says of the columns.
        encoder: with the run's template and longest sample; None takes the tokenizer's own.

    Raises:
        DataError: as `samples`.
    """
    encoder = encoder or Encoder(tokenizer)
    shown = [show(sample, encoder) for sample in islice(samples(path, encoder, mapping), n)]
    if not shown:
        raise DataError(f"{path.name} has no row to train on.", "Check it first: the report names what is wrong.")
    padding = tokenizer.convert_ids_to_tokens(padding_id(tokenizer))
    return Preview(shown, encoder.template.name, padding, list(encoder.notes))


def show(sample: Sample, encoder: Encoder, most: int | None = None) -> Shown:
    """A sample made readable, its first `most` pieces alone where that is given."""
    bos = encoder.tokenizer.bos_token_id
    last = max((place for place, learnt in enumerate(sample.trained) if learnt), default=-1)
    return Shown(
        row=sample.row,
        pieces=tuple(islice(_pieces(sample, encoder.tokenizer), most)),
        tokens=len(sample.ids),
        trained=sum(sample.trained),
        truncated=sample.truncated,
        ends=last >= 0 and encoder.ends(sample.ids[last]),
        begins=sum(1 for _ in takewhile(lambda token: token == bos, sample.ids)) if bos is not None else 0,
    )


def _pieces(sample: Sample, tokenizer: Any) -> Iterator[Piece]:
    """Tokens as text. A token is decoded after the ones before it, as some tokenizers drop the first one's space."""
    before: list[int] = []
    group: list[int] = []
    for place, token in enumerate(sample.ids):
        group.append(token)
        text = decode(tokenizer, before + group)[len(decode(tokenizer, before)) :]
        at_end = place + 1 == len(sample.ids) or sample.trained[place + 1] != sample.trained[place]
        if text.endswith(REPLACEMENT) and len(group) < 8 and not at_end:
            continue
        yield Piece(text, tuple(group), sample.trained[place])
        before, group = group, []
