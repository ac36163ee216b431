"""Rows made into tokens, with a mask of those that the loss is taken on.

Promises that an answer is trained on after exactly the tokens that the chat would put before it, up to and with the
token that ends its turn; that a text ends with the end-of-text token; and that nothing begins twice. Whatever a
template makes impossible is said in `Encoder.notes`. Knows nothing of files and of torch: it is handed a tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from nibble.data.check import rows
from nibble.data.rows import ColumnMap, Row, Sample
from nibble.engines.base import Message
from nibble.errors import DataError, NibbleError
from nibble.prompts import Template, choose_template
from nibble.prompts.templates import OWN

PADDING = ("<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|pad|>", "<|endoftext|>", "<unk>")
"""Tokens to pad with where the tokenizer names none, tried in this order; a token that ends answers comes last."""

PROBE: tuple[Message, ...] = ({"role": "user", "content": "x"},)

REWRITES = (
    "The chat template writes an answer otherwise once the conversation goes on; of a conversation with several "
    "answers only the last is trained."
)
OPENS_OTHERWISE = "The chat template opens an answer otherwise while training than while chatting."
NO_END = (
    "The chat template ends an answer with no token of its own; the end-of-text token follows the last answer of "
    "each row, so that the model learns to stop."
)
FOREIGN_END = "Answers end with {token!r}, which is not the tokenizer's end-of-text token: the model must stop at it."
NEVER_ENDS = "The tokenizer has no end-of-text token: nothing teaches the model to stop."


def padding_id(tokenizer: Any) -> int:
    """The token to pad a batch with: the tokenizer's own, else one that never ends an answer, else end-of-text.

    The attention mask and the labels keep padding out of the loss whichever it is.

    Raises:
        DataError: the tokenizer has none of them.
    """
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    vocabulary = tokenizer.get_vocab()
    named = next((vocabulary[token] for token in PADDING if token in vocabulary), None)
    chosen = tokenizer.eos_token_id if named is None else named
    if chosen is None:
        raise DataError("The tokenizer has no token to pad with.", "Set pad_token in its tokenizer_config.json.")
    return int(chosen)


class Encoder:
    """Makes samples of rows, for one tokenizer and template."""

    def __init__(self, tokenizer: Any, template: Template | None = None, max_length: int | None = None) -> None:
        """
        Args:
            tokenizer: of transformers.
            template: as `nibble.prompts.choose_template` returns it; None chooses by the tokenizer alone.
            max_length: tokens of a sample at most; what is longer is cut at its end. None cuts nothing.
        """
        self.tokenizer = tokenizer
        self.template = template or choose_template(tokenizer, "")
        self.max_length = max_length
        self.notes: list[str] = [self.template.note] if self.template.note else []
        self._control = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        self._ending: _Ending | None = None
        if tokenizer.eos_token_id is None:
            self._note(NEVER_ENDS)

    def encode(self, row: Row) -> Sample:
        """A row's tokens and mask.

        Raises:
            NibbleError: the template refuses this conversation.
        """
        ids, spans = self._conversation(row.messages) if row.messages else self._text(row.text)
        ids, spans = self._once(ids, spans)
        trained = [False] * len(ids)
        for start, end in spans:
            trained[max(start, 1) : end] = [True] * (end - max(start, 1))
        longest = self.max_length or len(ids)
        return Sample(row.number, ids[:longest], trained[:longest], truncated=len(ids) > longest)

    @property
    def stop_id(self) -> int | None:
        """The token that ends an answer, at which generation must stop; None where nothing does."""
        token = self._end().token
        return self.tokenizer.eos_token_id if token is None else token

    def ends(self, token: int) -> bool:
        """Whether a token ends the samples made so far."""
        return token == self.tokenizer.eos_token_id or (self._ending is not None and token == self._ending.token)

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def _text(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids = list(self.tokenizer(text)["input_ids"])
        end = self.tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        return ids, [(0, len(ids))]

    def _conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and from where to where the answers stand in them."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._ids(messages[:place], opens=True)
            whole = self._closed(messages[: place + 1], prompt)
            if whole[: len(ids)] != ids:
                spans = []
                self._note(REWRITES)
            # A token that melts the prompt's last letters with the answer's first is trained with the answer.
            start = _common(prompt, whole)
            if start < len(prompt) and not self._text_of(whole).startswith(self._text_of(prompt)):
                self._note(OPENS_OTHERWISE)
            spans.append((start, len(whole)))
            ids = whole
        if self._end().token is None and self.tokenizer.eos_token_id is not None:
            ids = [*ids, self.tokenizer.eos_token_id]
            spans[-1] = (spans[-1][0], len(ids))
        return ids, spans

    def _ids(self, messages: Sequence[Message], *, opens: bool) -> list[int]:
        return self.template.encode(self.tokenizer, messages, opens=opens)

    def _text_of(self, ids: list[int]) -> str:
        return decode(self.tokenizer, ids)

    def _closed(self, messages: Sequence[Message], prompt: list[int]) -> list[int]:
        """The ids of a conversation up to and with the token that ends its last answer."""
        end = self._end()
        if self.template.continues:
            # Nothing stands between prompt and answer: tokenised together they could melt into other tokens than
            # the prompt that the chat goes on from.
            answer = messages[-1]["content"]
            return [*prompt, *self.tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]]
        ids = self._ids(messages, opens=False)
        tail = end.tail
        if tail and ids[-len(tail) :] == tail:
            ids = ids[: -len(tail)]
        return ids if end.token is None else [*ids, end.token]

    def _end(self) -> _Ending:
        if self._ending is None:
            self._ending = self._find_end()
            token = self._ending.token
            if token is None:
                self._note(NO_END)
            elif token != self.tokenizer.eos_token_id:
                self._note(FOREIGN_END.format(token=self.tokenizer.convert_ids_to_tokens(token)))
        return self._ending

    def _find_end(self) -> _Ending:
        """What the template writes after an answer, told by two answers that differ: the ids that are the same."""
        first, second = (
            self._ids([*PROBE, {"role": "assistant", "content": answer}], opens=False) for answer in ("A", "0")
        )
        tail = first[len(first) - _common(first[::-1], second[::-1]) :]
        # Control tokens never melt into the text before them, so the cut is exact from the first one on.
        before = sum(1 for _ in takewhile(lambda token: token not in self._control, tail))
        if before == len(tail):
            return _Ending(tail, None)
        token: int | None = tail[before]
        stops = {*self.template.stops, self.tokenizer.eos_token_id}
        if self.template.name != OWN and token not in stops:
            # Our forms open the next answer after the last one: what stands here is not what ends a turn.
            token = self.template.stops[0] if self.template.stops else None
        return _Ending(tail[before:], token)

    def _once(self, ids: list[int], spans: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Without a second beginning-of-text token, which a text may bring that was written for another tool."""
        bos = self.tokenizer.bos_token_id
        more = 0
        while bos is not None and bos != self.tokenizer.eos_token_id and ids[more : more + 2] == [bos, bos]:
            more += 1
        if more:
            self._note("A second beginning-of-text token, written into the data, was left out.")
        return ids[more:], [(max(start - more, 0), end - more) for start, end in spans]


@dataclass(frozen=True)
class _Ending:
    """How a template ends an answer."""

    tail: list[int]
    """What follows the answer's text, from the control token on where there is one."""
    token: int | None
    """The token that ends the turn."""


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def samples(path: Path, encoder: Encoder, mapping: ColumnMap | None = None) -> Iterator[Sample]:
    """Every row of a file that has a token to train on, in order, as a sample.

    Raises:
        DataError: a faulty row, or one that the template refuses, unless the map leaves such rows out.
    """
    for row in rows(path, mapping):
        try:
            sample = encoder.encode(row)
        except NibbleError as error:
            if mapping and mapping.leave_out:
                continue
            message = f"Row {row.number} of {path.name} cannot be rendered: {error.message}"
            raise DataError(message, "Leave the row out.") from error
        if any(sample.trained):
            yield sample


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of some tokens, control tokens included and nothing tidied."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
