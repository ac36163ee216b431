"""Distances between distributions, beside a plain computation of the same; errors, sizes, sensitivities of layers."""

import gc
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from nibble.devices import Device
from nibble.errors import DataError, ModelError
from nibble.lowbit.blocks import quantize
from nibble.lowbit.formats import FORMATS
from nibble.lowbit.linear import LowBitLinear
from nibble.quality import distance, layers, measuring, sensitivity, subject, windows
from nibble.quality.text import read_text
from nibble.transformers import save_low_bit

CPU = Device("cpu", "bfloat16", "")
TOKENS = 1024


def silent(done: float, total: float) -> None:
    """Progress that nobody reads."""


@pytest.fixture(scope="module")
def scratch() -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        yield file.fileno()


@pytest.fixture(scope="module")
def guide_windows(guide_model: Path) -> list[list[int]]:
    return windows.cut(read_text(), guide_model, windows.load_tokenizer(guide_model), TOKENS)


@pytest.fixture(scope="module")
def guide_reference(guide_model: Path, guide_windows: list[list[int]], scratch: int) -> distance.LogProbs:
    model = subject.load_exact(guide_model, CPU, trusted=False)
    into = distance.LogProbs(scratch, TOKENS, model.config.vocab_size)
    distance.read(model, guide_windows, silent, into=into)
    return into


def plain_log_probs(folder: Path, ids: list[list[int]]) -> torch.Tensor:
    """What transformers itself says in float32, all of it in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        rows = [model(torch.tensor([window])).logits[0, :-1] for window in ids]
    return torch.cat(rows).log_softmax(-1)


@pytest.mark.parametrize("low_bit", ["sym_int4", "fp8_e5m2"])
def test_figures_are_those_of_a_plain_computation(stories: Path, shared_data: Path, low_bit: str) -> None:
    text = read_text(shared_data / "sets" / "tinystories-1000" / "tinystories_1000.json")
    ids = windows.cut(text, stories, windows.load_tokenizer(stories), 700)
    assert len({len(window) for window in ids}) > 1, "windows of different lengths must be told apart"
    p = plain_log_probs(stories, ids).double()
    targets = torch.tensor([token for window in ids for token in window[1:]])

    with tempfile.TemporaryFile() as file:
        reference = distance.LogProbs(file.fileno(), 700, 512)
        exact = distance.read(subject.load_exact(stories, CPU, trusted=False), ids, silent, into=reference)
        model = subject.load(stories, {"load_in_low_bit": low_bit}, Device("cpu", "float32", ""))
        found = distance.read(model, ids, silent, beside=reference)
    with torch.inference_mode():
        q = torch.cat([model(torch.tensor([window])).logits[0, :-1] for window in ids]).log_softmax(-1).double()

    kl = (p.exp() * (p - q)).sum(-1)
    assert exact == {"perplexity": pytest.approx(math.exp(-p[range(700), targets].mean()), rel=1e-5)}
    assert found["perplexity"] == pytest.approx(math.exp(-q[range(700), targets].mean()), rel=1e-5)
    assert found["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found["kl_p95"] == pytest.approx(float(kl.quantile(0.95)), rel=1e-3)
    assert found["top1"] == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert found["kl_mean"] > 0.001


def test_perplexity_of_real_stories_is_the_known_one(stories: Path, shared_data: Path) -> None:
    """5.28: the first 100 stories, each to the end of the model's context."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    texts = json.loads((shared_data / "sets" / "tinystories-1000" / "tinystories_1000.json").read_text())[:100]
    ids = [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][:512] for text in texts]
    model = subject.load_exact(stories, CPU, trusted=False)
    assert distance.read(model, ids, silent)["perplexity"] == pytest.approx(5.28, abs=0.03)


def test_a_reference_of_16_bit_weights_computes_in_float32(
    guide_model: Path, guide_windows: list[list[int]], guide_reference: distance.LogProbs
) -> None:
    plain = plain_log_probs(guide_model, guide_windows)
    assert torch.allclose(guide_reference.values, plain, atol=2e-3)
    model = subject.load_exact(guide_model, CPU, trusted=False)
    again = distance.read(model, guide_windows, silent, beside=guide_reference)
    assert again["kl_mean"] < 1e-8
    assert again["top1"] == 1.0


def test_the_guide_loses_less_with_more_bits(
    guide_model: Path, guide_windows: list[list[int]], guide_reference: distance.LogProbs
) -> None:
    def kl(low_bit: str) -> float:
        model = subject.load(guide_model, {"load_in_low_bit": low_bit}, CPU)
        return distance.read(model, guide_windows, silent, beside=guide_reference)["kl_mean"]

    assert kl("sym_int4") > 1.5 * kl("sym_int5") > 3 * kl("sym_int8") > 0
    assert 1.5 * kl("nf4") < kl("fp4")


def test_the_same_twice_is_the_same(guide_model: Path, guide_windows: list[list[int]]) -> None:
    short = guide_windows[:1]
    model = subject.load(guide_model, {"load_in_low_bit": "sym_int4"}, CPU)
    assert distance.read(model, short, silent) == distance.read(model, short, silent)


def test_logits_that_are_no_numbers_are_told(stories: Path) -> None:
    model = subject.load_exact(stories, CPU, trusted=False)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="finite"):
        distance.read(model, [[1, 2, 3]], silent)


def test_a_token_that_cannot_come_adds_nothing() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    q = torch.tensor([[0.25, 0.75, 0.0]]).log()
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(distance._divergence(p, q)) == pytest.approx(expected)


def test_errors_of_layers_are_those_of_their_weights(guide_model: Path) -> None:
    model = subject.load(guide_model, {"load_in_low_bit": "nf4", "overrides": {"lm_head": "sym_int8"}}, CPU)
    found = {row["name"]: row for row in layers.errors(model, layers.DenseWeights(guide_model))}
    assert len(found) == 7 * 7 + 1
    with safe_open(guide_model / "model.safetensors", framework="pt") as file:
        for name, stored in (
            ("model.layers.3.mlp.down_proj", "model.layers.3.mlp.down_proj"),
            ("lm_head", "model.embed_tokens"),  # tied
        ):
            weight = file.get_tensor(f"{stored}.weight").float()
            low_bit = found[name]["format"]
            difference = weight - quantize(weight, low_bit).dequantize()
            assert found[name]["error"] == pytest.approx(float(difference.norm() / weight.norm()), rel=1e-4)
    assert found["lm_head"]["format"] == "sym_int8"
    values = [row["error"] for row in found.values()]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("low_bit", ["sym_int4", "asym_int5", "fp8_e4m3", "bf16"])
def test_the_size_is_that_of_the_saved_tensors(guide_model: Path, tmp_path: Path, low_bit: str) -> None:
    model = subject.load(guide_model, {"load_in_low_bit": low_bit}, CPU)
    if FORMATS[low_bit].quantized:
        save_low_bit(model, tmp_path / "saved")
    else:
        model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert subject.stored_bytes(model) == stored


def test_peak_sees_what_was_held_and_given_back() -> None:
    with subject.Peak("cpu") as peak:
        before = peak.now()
        for _ in range(3):
            torch.ones(40_000_000).sum()
    assert before + 120_000_000 < peak.bytes < before + 400_000_000


def test_weights_in_a_mapped_file_are_counted(guide_model: Path) -> None:
    size = (guide_model / "model.safetensors").stat().st_size
    gc.collect()  # other tests' models may be mapped still, and must not go meanwhile
    before = subject.mapped_weights()
    dense = subject.load(guide_model, {"load_in_low_bit": "bf16"}, CPU)
    subject.speed(dense, [1, 2, 3])
    assert 0.5 * size < subject.mapped_weights() - before < 1.1 * size


def test_speed_is_a_rate(stories: Path) -> None:
    model = subject.load(stories, {"load_in_low_bit": "sym_int4"}, CPU)
    assert 1 < subject.speed(model, list(range(3, 200))) < 1e5


def test_sensitivity_foretells_what_a_layer_costs(
    guide_model: Path, guide_windows: list[list[int]], guide_reference: distance.LogProbs
) -> None:
    dense = subject.load(guide_model, {"load_in_low_bit": "bf16"}, CPU)
    rows = sensitivity.sensitivities(dense, guide_windows, ["sym_int4", "sym_int8"], silent)
    assert len(rows) == 7 * 7 + 1
    rows.sort(key=lambda row: -row["kl"]["sym_int4"])
    assert all(row["kl"]["sym_int8"] < row["kl"]["sym_int4"] / 20 for row in rows)

    exact = subject.load_exact(guide_model, CPU, trusted=False)
    # The least of all costs a millionth of a nat, which is less than what is measured resolves.
    for row in (rows[0], rows[len(rows) // 2]):
        layer = exact.get_submodule(row["name"])
        rounded = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        rounded.weight = torch.nn.Parameter(layer.dequantize())
        packed = LowBitLinear.from_linear(rounded, "sym_int4")
        packed.bias = layer.bias
        exact.set_submodule(row["name"], packed)
        measured = distance.read(exact, guide_windows, silent, beside=guide_reference)["kl_mean"]
        exact.set_submodule(row["name"], layer)
        assert measured / 1.5 < row["kl"]["sym_int4"] < 1.5 * measured


def test_windows_are_cut_from_running_text_without_overlap(stories: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("Once upon a time there was a small red ball. " * 200, encoding="utf-8")
    tokenizer = windows.load_tokenizer(stories)
    found = windows.cut(read_text(file), stories, tokenizer, 10**6)
    assert {window[0] for window in found} == {tokenizer.bos_token_id}
    assert {len(window) for window in found[:-1]} == {512}
    joined = [token for window in found for token in window[1:]]
    assert joined == tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    assert distance.positions(windows.cut(read_text(file), stories, tokenizer, 777)) == 777


def test_windows_of_conversations_hold_whole_ones_as_chat_sends_them(guide_model: Path) -> None:
    tokenizer = windows.load_tokenizer(guide_model)
    found = windows.cut(read_text(), guide_model, tokenizer, 3000)
    turn = read_text().documents[0]
    assert isinstance(turn, list)
    prompt = tokenizer.apply_chat_template(turn[:1], add_generation_prompt=True)["input_ids"]
    assert found[0][: len(prompt)] == prompt
    assert turn[1]["content"] in tokenizer.decode(found[0])
    for window in found[:-1]:
        assert window[-1] == tokenizer.eos_token_id
        assert 300 < len(window) <= windows.WINDOW
    assert distance.positions(found) == 3000


def test_tokenizers_differ_where_a_token_does(guide_model: Path, stories: Path) -> None:
    one, other = windows.load_tokenizer(guide_model), windows.load_tokenizer(stories)
    assert windows.fingerprint(one) == windows.fingerprint(windows.load_tokenizer(guide_model))
    assert windows.fingerprint(one) != windows.fingerprint(other)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\n ", "empty"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.json", b"{", "list of texts"),
        ("a.json", b"[1, 2]", "list of texts"),
        ("a.json", b"[]", "list of texts"),
        ("a.jsonl", b'{"text": "a"}', "conversation"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}', "conversation"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": 1}]}',
            "conversation",
        ),
    ],
)
def test_a_text_that_cannot_be_used_gets_a_sentence(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_text(tmp_path / name)


def test_a_text_that_is_not_there_or_too_short_gets_a_sentence(tmp_path: Path, stories: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_text(tmp_path / "none.txt")
    (tmp_path / "a.txt").write_text("Once upon a time.", encoding="utf-8")
    with pytest.raises(DataError, match="too short"):
        windows.cut(read_text(tmp_path / "a.txt"), stories, windows.load_tokenizer(stories), 1000)


def test_the_shipped_text_is_in_two_languages_and_long_enough(guide_model: Path) -> None:
    text = read_text()
    answers = "".join(turns[-1]["content"] for turns in text.documents)  # type: ignore[index]
    chinese = sum("\u4e00" <= letter <= "\u9fff" for letter in answers)
    assert chinese > 2000
    assert len(answers) - chinese > 15_000
    found = windows.cut(text, guide_model, windows.load_tokenizer(guide_model), 10**6)
    assert distance.positions(found) > 2 * measuring.TOKENS
