"""What is trained, on what, and in which order: targets by family, the feed, packing, and learning to stop."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoTokenizer

from nibble.data import ColumnMap
from nibble.data.render import Encoder, padding_id
from nibble.data.rows import IGNORED, Sample
from nibble.data.shipped import find
from nibble.errors import ModelError
from nibble.training import feed, packing, targets
from nibble.training.feed import Corpus, Deck, collator
from nibble.training.heldout import heldout_loss
from nibble.training.launch import launch_command
from nibble.training.recipe import ALL_LINEAR, Recipe

QKV = Recipe().targets


def tiny(name: str, **more: Any) -> Any:
    """A random model of a family, one layer."""
    shape = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**shape, **more}))


class Foreign(nn.Module):
    """A model whose code comes with its folder: only the names of its layers matter here."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
        self.head = nn.Linear(4, 4)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (lambda: tiny("Qwen2Config"), QKV),
        (lambda: tiny("GPTNeoXConfig"), ("query_key_value",)),
        (lambda: tiny("Phi3Config"), ("qkv_proj",)),
        (lambda: tiny("GPT2Config"), ("c_attn",)),
        (lambda: tiny("BloomConfig", n_head=2), ("query_key_value",)),
        (lambda: Foreign("c_attn", "c_proj", "w1", "w2"), ("c_attn",)),  # Qwen 1
        (lambda: Foreign("query_key_value", "dense"), ("query_key_value",)),  # ChatGLM
        (lambda: Foreign("W_pack", "o_proj"), ("W_pack",)),  # Baichuan
        (lambda: Foreign("wqkv", "wo"), ("wqkv",)),  # InternLM2
        (lambda: Foreign("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
         ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")),  # DeepSeek
    ],
)  # fmt: skip
def test_the_tutorials_targets_are_found_in_every_family(model: Any, names: tuple[str, ...]) -> None:
    chosen = targets.choose(model(), QKV)
    assert chosen.names == names
    assert bool(chosen.notes) == (names != QKV)


def test_all_linear_is_every_layer_but_the_head() -> None:
    assert targets.choose(Foreign("a", "b"), (ALL_LINEAR,)).names == ("a", "b")
    wanted = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert targets.choose(tiny("Qwen2Config"), (ALL_LINEAR,)).names == wanted


def test_targets_that_are_not_there_are_told_with_those_that_are() -> None:
    with pytest.raises(ModelError, match="None of the layers q_proj, k_proj, v_proj is in Foreign.*: mixer, gate"):
        targets.choose(Foreign("mixer", "gate"), QKV)
    chosen = targets.choose(tiny("Qwen2Config"), ("q_proj", "nowhere"))
    assert chosen.names == ("q_proj",) and "nowhere" in chosen.notes[0]


def corpus_of(lengths: list[int], seed: int = 0) -> Corpus:
    """Samples of random tokens; every second one trains its latter half alone."""
    dice, corpus = random.Random(seed), Corpus()
    for row, length in enumerate(lengths):
        ids = [dice.randrange(1, 128) for _ in range(length)]
        corpus.add(Sample(row, ids, [place >= (length // 2 if row % 2 else 1) for place in range(length)]))
    return corpus


def test_what_is_held_out_depends_on_the_seed_alone() -> None:
    def split(count: int, *given: Any) -> tuple[list[int], list[int]]:
        train, held = feed.split(corpus_of([9] * count), *given)
        return list(train), list(held)

    train, held = split(200, 0.05, 42)
    assert len(held) == 10 and sorted(train + held) == list(range(200))
    assert split(200, 0.05, 42) == (train, held) != split(200, 0.05, 43)
    assert split(1, 0.5, 0) == ([0], []) and split(10, 0.0, 0) == (list(range(10)), [])
    assert len(split(10, 0.01, 0)[1]) == 1
    assert len(split(2000, 0.9, 0)[1]) == feed.HELD_OUT


def test_a_sample_that_stands_again_is_on_one_side_alone() -> None:
    corpus = Corpus()
    for number in range(60):
        corpus.add(Sample(number, [1 + number % 20, 2, 3], [True] * 3))
    corpus.add(Sample(60, [77, 2, 3], [True] * 3))
    corpus.add(Sample(61, [78, 2, 3], [True] * 3))
    for seed in range(40):
        train, held = feed.split(corpus, 0.2, seed)
        texts = [{corpus.mark(place) for place in places} for places in (train, held)]
        assert not texts[0] & texts[1] and len(texts[0] | texts[1]) == 22
        assert sorted([*train, *held]) == list(range(62))


def test_every_pass_of_a_deck_deals_each_row_once_and_from_anywhere_alike() -> None:
    corpus = corpus_of([3 + row for row in range(7)])
    deck = Deck(corpus, [[row] for row in range(7)], 21, seed=1)
    dealt = [len(deck[place][0][0]) for place in range(21)]
    for start in (0, 7, 14):
        assert sorted(dealt[start : start + 7]) == [3 + row for row in range(7)]
    assert dealt[:7] != dealt[7:14]
    again = Deck(corpus, [[row] for row in range(7)], 21, seed=1)
    assert [len(again[place][0][0]) for place in reversed(range(21))] == dealt[::-1]
    assert [len(deck.longest_first(3)[place][0][0]) for place in range(3)] == [9, 8, 7]


def test_padding_is_never_in_the_loss_and_the_end_always_is_though_they_be_one_token() -> None:
    end = 9
    rows = [[([5, 6, 7, end], [IGNORED, 6, 7, end])], [([5, end], [IGNORED, end])]]
    batch = collator(end)(rows)
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, end], [IGNORED, end, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, end], [5, end, end, end]]


@pytest.mark.parametrize("name", ["quotes", "instructions"])
def test_the_model_learns_to_stop(name: str, guide_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(guide_model)
    corpus, _ = feed.read(find(name), Encoder(tokenizer, max_length=512), ColumnMap())
    stop = Encoder(tokenizer).stop_id
    assert len(corpus) > 100
    for place in range(len(corpus)):
        ids, labels = corpus[place]
        assert ids[-1] == labels[-1] == stop and labels.count(stop) == 1
    # A tokenizer whose padding is the end of text too.
    tokenizer.pad_token = tokenizer.eos_token
    batch = collator(padding_id(tokenizer))([[corpus[0]], [corpus[1]], [corpus[2]]])
    assert (batch["labels"] == stop).sum(dim=1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Qwen2Config", "LlamaConfig", "GPTNeoXConfig", "Phi3Config", "MistralConfig"])
def test_packed_samples_have_the_losses_that_they_have_alone(name: str, attention: str) -> None:
    model = tiny(name, attn_implementation=attention).eval()
    corpus = corpus_of([5, 17, 9, 30, 3, 12])
    assert packing.inexact(model, corpus, range(6), 0, torch.float32) == ""
    rows = feed.pack(corpus, range(6), 32)
    assert sorted(place for row in rows for place in row) == list(range(6)) and len(rows) == 3
    assert all(sum(corpus.tokens(place) for place in row) <= 32 for row in rows)
    alone = heldout_loss(model, [[corpus[place]] for place in range(6)], 0, 2, "cpu")
    batch = collator(0, torch.float32)([[corpus[place] for place in row] for row in rows])
    with torch.no_grad():
        together = float(model(**batch).loss)
    assert together == pytest.approx(alone, rel=1e-4)


def test_packing_is_refused_where_neighbours_would_be_seen() -> None:
    model = tiny("BloomConfig", n_head=2).eval()
    assert packing.inexact(model, corpus_of([9, 9, 9]), range(3), 0, torch.float32)
    assert packing.inexact(model, corpus_of([9]), range(1), 0, torch.float32) == "there is only one."


def test_the_command_for_several_devices_is_written_out() -> None:
    one = launch_command("run.yaml", 2)
    assert one == "torchrun --nproc-per-node=2 --standalone -m nibble.tasks.finetune run.yaml"
    many = launch_command("a b.yaml", 8, machines=2, machine=1, address="10.0.0.1")
    assert many == (
        "torchrun --nproc-per-node=8 --nnodes=2 --node-rank=1 --master-addr=10.0.0.1 --master-port=29500 "
        "-m nibble.tasks.finetune 'a b.yaml'"
    )
