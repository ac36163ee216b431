"""The guide's tokenizer: byte-level BPE learned from the corpus, and its chat template.

Promises: any Unicode text round-trips; digits and Chinese characters stand one by one, so that wording never seen
shares its pieces with wording that was. Knows nothing of the model.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from guide.corpus import Conversation, Corpus, Generator

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 6144  # a multiple of 64, as is every other width of the model
CONTEXT = 2048  # tokens that a conversation may have
SAMPLE = 60_000  # conversations that the merges are learned from

# Letters with the space before them, single Chinese characters, single digits, runs of marks, runs of spaces.
_PIECES = r"\p{Han}| ?[\p{L}\p{M}&&[^\p{Han}]]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"

# ChatML, with no system prompt of its own. Contents are trimmed: a stray newline must not change how they are cut.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] | trim) + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def _texts(corpus: Corpus, seed: int) -> Iterator[str]:
    generator = Generator(corpus, seed, hold_out=False)
    for _ in range(SAMPLE):
        for message in generator.conversation().messages:
            # Answers come back thousands of times; questions should decide what a word is.
            if message["role"] == "user" or generator.chance(0.1):
                yield message["content"]
    for _, _, question in corpus.questions():
        yield from (question, f" {question}", question.lower())
    yield from corpus.answers()
    for groups in corpus.lexicon.values():
        for group in groups:
            yield " ".join(group)


def train_tokenizer(corpus: Corpus, seed: int = 0) -> Tokenizer:
    """A tokenizer of `VOCABULARY` entries; ids 0 to 2 are PAD, START and END."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(_texts(corpus, seed), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and its configuration into `folder`, as AutoTokenizer reads them."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


class Encoder:
    """Turns conversations into token ids and a mask of what is learned."""

    def __init__(self, tokenizer: Tokenizer, dropout: float = 0.0, seed: int = 0) -> None:
        """`dropout`: chance with which a merge is left out in a question's second way of cutting (BPE-dropout)."""
        self._plain = tokenizer
        self._rng = random.Random(seed)
        self._dropped = None
        if dropout:
            state = json.loads(tokenizer.to_str())
            state["model"]["dropout"] = dropout
            self._dropped = Tokenizer.from_str(json.dumps(state))
        self._answers: dict[str, list[int]] = {}
        self._head = {role: self._ids(f"{START}{role}\n") for role in ("system", "user", "assistant")}
        self._end, self._newline = self._ids(END), self._ids("\n")

    def _ids(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def _question(self, text: str) -> list[int]:
        if self._dropped is not None and self._rng.random() < 0.25:
            return self._dropped.encode(text, add_special_tokens=False).ids
        return self._ids(text)

    def encode(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Token ids, and for each 0 (given) or its place, from 1, in the assistant's turn (to be learned)."""
        ids: list[int] = []
        places: list[int] = []
        for message in conversation.messages:
            role, text = message["role"], message["content"].strip()
            head = self._head[role]
            if role == "assistant":
                if text not in self._answers:
                    self._answers[text] = self._ids(text)
                body = self._answers[text] + self._end
                learned = list(range(1, len(body) + 1))
            else:
                body = self._question(text) + self._end
                learned = [0] * len(body)
            ids += head + body + self._newline
            places += [0] * len(head) + learned + [0] * len(self._newline)
        return ids, places
