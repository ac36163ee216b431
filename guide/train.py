"""Trains the guide from scratch: corpus -> tokenizer -> model -> a Hugging Face folder.

    python -m guide.train --steps 8000 --out guide/model

With `--start guide/model` it goes on from a trained model, whose tokenizer stays, and asks more often the topics whose
answers that model does not know: after a change of the corpus a CPU needs an hour where training anew takes a GPU.

Promises: works on CPU, CUDA and XPU; one seed fixes the data. No question of the examination is ever trained on, not
even by chance. What is reported is the development set: a share of the topics' questions, chosen by hash, that is
never trained on either unless --all is given.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from guide.corpus import LANGUAGES, Conversation, Corpus, Generator, is_held_out, load_corpus, normalise
from guide.exam import read_exam
from guide.quant import fake_q4_0, linear_weights
from guide.tokenizer import CONTEXT, Encoder, save_tokenizer, train_tokenizer

END_ID, PAD_ID = 2, 0
POOL = 3000  # conversations sorted by length together, so that a batch holds little padding
KNOWN = 0.15  # nats per token of a topic's answer; answers that were trained lie below 0.05, changed ones far above


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome."""

    steps: int = 8000
    seed: int = 0
    tokens: int = 32768  # a step, padding included
    rate: float = 1.5e-3
    warmup: int = 300
    decay: float = 0.2
    dropout: float = 0.15
    smoothing: float = 0.05
    merge_dropout: float = 0.15
    first: float = 4.0  # weight of an answer's first tokens, where the topic is decided
    aux: float = 0.15  # weight of predicting the user's words too
    quantized_from: float = 0.75  # share of the steps after which half of them see Q4_0 weights
    workers: int = 4
    all: bool = False  # train on the development set too
    start: str = ""  # the folder of a trained model to go on from
    favour: float = 8.0  # how much more often a topic is asked whose answer the start does not know


def model_config(vocabulary: int) -> Qwen2Config:
    """About 13 million parameters; every width is a multiple of 64, so that each format's blocks fit."""
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=7,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )


class Batches(IterableDataset):
    """Endless right-padded batches: token ids, and the place of each learned token (0: given, -1: padding)."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, recipe: Recipe, favoured: frozenset[str]) -> None:
        self._corpus, self._tokenizer, self._recipe, self._favoured = corpus, tokenizer, recipe, favoured
        self._withheld = frozenset(normalise(turn) for question in read_exam() for turn in question.turns)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = get_worker_info()
        seed = self._recipe.seed * 1000 + (info.id if info else 0) + 1
        generator = Generator(
            self._corpus, seed, hold_out=not self._recipe.all, withheld=self._withheld,
            favoured=dict.fromkeys(self._favoured, self._recipe.favour),
        )  # fmt: skip
        encoder = Encoder(self._tokenizer, self._recipe.merge_dropout, seed)
        order = torch.Generator().manual_seed(seed)
        while True:
            pool = [encoder.encode(generator.conversation()) for _ in range(POOL)]
            pool = sorted((item for item in pool if len(item[0]) <= CONTEXT), key=lambda item: len(item[0]))
            batches = list(self._cut(pool))
            for i in torch.randperm(len(batches), generator=order).tolist():
                yield batches[i]

    def _cut(self, pool: list[tuple[list[int], list[int]]]) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        while start < len(pool):
            end = start + 1
            while end < len(pool) and (end + 1 - start) * len(pool[end][0]) <= self._recipe.tokens:
                end += 1
            width = len(pool[end - 1][0])
            rows = pool[start:end]
            ids = torch.tensor([r + [PAD_ID] * (width - len(r)) for r, _ in rows], dtype=torch.int32)
            places = torch.tensor([p + [-1] * (width - len(p)) for _, p in rows], dtype=torch.int16)
            yield ids, places
            start = end


def add_dropout(model: Qwen2ForCausalLM, chance: float) -> None:
    """Dropout after the embedding and after every block's two halves, where Qwen2 has none; off in eval mode."""

    def hook(module: nn.Module, _inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
        if not module.training:
            return output
        if isinstance(output, tuple):
            return (F.dropout(output[0], chance), *output[1:])
        return F.dropout(output, chance)

    model.model.embed_tokens.register_forward_hook(hook)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(hook)
        layer.mlp.register_forward_hook(hook)


def loss_of(model: Qwen2ForCausalLM, ids: Tensor, places: Tensor, recipe: Recipe, quantized: bool) -> Tensor:
    """Weighted cross-entropy of the next token; right padding needs no attention mask under a causal one."""
    body, head = model.model, model.lm_head.weight
    if quantized:
        swapped = {name: fake_q4_0(weight) for name, weight in linear_weights(body).items()}
        hidden = torch.func.functional_call(body, swapped, (ids[:, :-1],), {"use_cache": False}).last_hidden_state
        head = fake_q4_0(head)
    else:
        hidden = body(ids[:, :-1], use_cache=False).last_hidden_state
    target, place = ids[:, 1:], places[:, 1:]
    weight = torch.where(place > 0, 1.0, recipe.aux * (place == 0))
    weight = torch.where((place > 0) & (place <= 6), recipe.first, weight)
    chosen = weight > 0
    logits = F.linear(hidden[chosen], head).float()
    losses = F.cross_entropy(logits, target[chosen], reduction="none", label_smoothing=recipe.smoothing)
    return (losses * weight[chosen]).sum() / weight[chosen].sum()


def rate_at(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to a hundredth."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def optimiser_of(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.AdamW:
    """AdamW; norms and biases are not decayed."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=device.type == "cuda")


@torch.inference_mode()
def answer_all(model: Any, tokenizer: Tokenizer, conversations: list[Conversation], batch: int = 1024) -> list[str]:
    """The greedy answer to each conversation, which ends with a user's message."""
    encoder = Encoder(tokenizer)
    opening = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False).ids
    prompts = [encoder.encode(c)[0] + opening for c in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        width = max(len(prompts[i]) for i in rows)
        ids = torch.tensor([[PAD_ID] * (width - len(prompts[i])) + prompts[i] for i in rows], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows], device=model.device
        )
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=160, do_sample=False)
        for i, row in zip(rows, out[:, width:].tolist(), strict=True):
            answers[i] = tokenizer.decode(row, skip_special_tokens=True)
    return answers


def development_score(model: Qwen2ForCausalLM, tokenizer: Tokenizer, corpus: Corpus) -> dict[str, float]:
    """Share of the held-out questions whose answer begins as its topic's does (160 tokens), by language."""
    held = [(t, lang, q) for t, lang, q in corpus.questions() if corpus.topics[t].kind == "topic" and is_held_out(q)]
    asked = [Conversation([{"role": "user", "content": q}]) for _, _, q in held]
    model.eval()
    answers = answer_all(model, tokenizer, asked)
    model.train()
    right = [
        corpus.topics[t].answer[lang].startswith(a) and bool(a) for (t, lang, _), a in zip(held, answers, strict=True)
    ]
    scores = {"all": sum(right) / len(right)}
    for language in LANGUAGES:
        marks = [r for r, (_, lang, _) in zip(right, held, strict=True) if lang == language]
        scores[language] = sum(marks) / len(marks)
    return scores


@torch.inference_mode()
def unknown_topics(model: Qwen2ForCausalLM, tokenizer: Tokenizer, corpus: Corpus) -> frozenset[str]:
    """The topics whose answer, in any language, is news to the model when it is asked by the topic's first question."""
    encoder = Encoder(tokenizer)
    unknown = set()
    for topic in corpus.topics.values():
        for language in LANGUAGES if topic.kind in ("topic", "tour") else ():
            asked = Conversation()
            asked.add(topic.ask[language][0], topic.answer[language])
            ids, places = map(torch.tensor, encoder.encode(asked))
            losses = F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="none")
            if losses[places[1:] > 0].mean() > KNOWN:
                unknown.add(topic.id)
    return frozenset(unknown)


def first_model(recipe: Recipe, corpus: Corpus, tokenizer: Tokenizer) -> tuple[Any, frozenset[str]]:
    """The float32 model that training begins with, on the CPU, and the topics to ask more often."""
    if not recipe.start:
        return Qwen2ForCausalLM(model_config(tokenizer.get_vocab_size())), frozenset()
    model = Qwen2ForCausalLM.from_pretrained(recipe.start, dtype=torch.float32).eval()
    return model, unknown_topics(model, tokenizer, corpus)


def train(recipe: Recipe, corpus: Corpus, tokenizer: Tokenizer) -> Qwen2ForCausalLM:
    """Train one model; prints its progress."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.manual_seed(recipe.seed)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape of batch, and no two are alike
    model, favoured = first_model(recipe, corpus, tokenizer)
    model.to(device)
    model.generation_config = generation_config()
    add_dropout(model, recipe.dropout)
    optimiser = optimiser_of(model, recipe, device)
    loader = DataLoader(
        Batches(corpus, tokenizer, recipe, favoured), batch_size=None, num_workers=recipe.workers, prefetch_factor=8
    )
    model.train()
    began, seen, counted = time.monotonic(), 0, 0
    total: float | Tensor = 0.0
    about = {"parameters": model.num_parameters(), "device": str(device), "news": sorted(favoured)}
    print(json.dumps(about), flush=True)
    for step, (ids, places) in zip(range(recipe.steps), loader, strict=False):
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate * rate_at(step, recipe)
        quantized = step >= recipe.quantized_from * recipe.steps and step % 2 == 0
        ids, places = ids.to(device, non_blocking=True).long(), places.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(model, ids, places, recipe, quantized)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        seen, total, counted = seen + ids.numel(), total + loss.detach(), counted + 1
        if (step + 1) % max(1, recipe.steps // 20) == 0:
            speed = seen / (time.monotonic() - began)
            print(f"step {step + 1} loss {float(total) / counted:.4f} tokens/s {speed:,.0f}", flush=True)
            total, counted = 0.0, 0
        if not recipe.all and (step + 1) % max(1, recipe.steps // 2) == 0 and step + 1 < recipe.steps:
            print("development set", json.dumps(development_score(model, tokenizer, corpus)), flush=True)
    return model.eval()


def generation_config() -> GenerationConfig:
    """Greedy: the same question gets the same answer."""
    return GenerationConfig(do_sample=False, eos_token_id=END_ID, pad_token_id=PAD_ID, max_new_tokens=1024)


def export(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the bf16 model with its tokenizer into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def main() -> None:
    """The command line: one flag for each field of Recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("model"))
    for name, default in Recipe().__dict__.items():
        if isinstance(default, bool):
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    flags = vars(parser.parse_args())
    out = flags.pop("out")
    recipe = Recipe(**flags)
    print(json.dumps(recipe.__dict__), flush=True)
    corpus = load_corpus()
    tokenizer = (
        Tokenizer.from_file(str(Path(recipe.start, "tokenizer.json"))) if recipe.start else train_tokenizer(corpus)
    )
    model = train(recipe, corpus, tokenizer)
    export(model, tokenizer, out)
    if not recipe.all:
        print("development set", json.dumps(development_score(model, tokenizer, corpus)), flush=True)


if __name__ == "__main__":
    main()
