"""Merging: adapters of PEFT, good and bad, into models that prove themselves; no folder where one is refused."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nibble import library, publish, shards
from nibble.adapters import fingerprint
from nibble.errors import ModelError, NibbleError
from nibble.merging.changes import Change
from nibble.merging.proof import compare
from nibble.tasks import merge
from tests.support.reports import SILENT

LLAMA = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
Q_V = ["q_proj", "v_proj"]


def make_base(home: Path, name: str = "tiny", dtype: torch.dtype = torch.bfloat16, seed: int = 1, **keys: Any) -> Path:
    """A random model in home/models; with `model_type: gpt2` one whose layers store [in, out]."""
    torch.manual_seed(seed)
    if keys.pop("model_type", "llama") == "gpt2":
        config: Any = transformers.GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    elif keys.pop("biased", False):
        config = transformers.Qwen2Config(**{**LLAMA, **keys})
    else:
        config = transformers.LlamaConfig(**{**LLAMA, **keys})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    folder = home / "models" / name
    model.save_pretrained(folder)
    return folder


def make_adapter(
    base: Path, size: float = 0.05, record: bool = True, name: str = "one", seed: int = 2, **keys: Any
) -> Path:
    """An adapter of PEFT with numbers of about this size in B, and in what it saves whole."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 8, "target_modules": Q_V, **keys}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for key, parameter in wrapped.named_parameters():
        if "lora_B" in key or "lora_embedding_A" in key:
            parameter.data = size * torch.randn_like(parameter)
        elif "modules_to_save" in key or (options.get("bias", "none") != "none" and key.endswith("bias")):
            parameter.data += size * torch.randn_like(parameter)
    folder = base.parents[1] / "adapters" / name
    wrapped.save_pretrained(folder)
    if record:
        said = {"name": base.name, "fingerprint": fingerprint(base), "format": "nf4", "family": "llama"}
        facts = {"kind": "adapter", "base": said, "run": "", "stop_token_id": 5}
        (folder / "nibble.json").write_text(json.dumps(facts))
    return folder


def merged(home: Path, name: str = "one", **keys: Any) -> dict[str, Any]:
    return merge.run({"adapter": name, "home": str(home), "device": "cpu", **keys}, SILENT)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change an adapter's tensors."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def configure(folder: Path, **keys: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def left(home: Path, *expected: str) -> bool:
    """Whether these models are there, and nothing besides but locks."""
    found = {path.name for path in (home / "models").iterdir() if not path.name.endswith(".lock")}
    return found == set(expected)


GOOD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "float32": ({"dtype": torch.float32}, {"target_modules": "all-linear"}),
    "float16, rank-stabilised": ({"dtype": torch.float16}, {"use_rslora": True, "r": 8}),
    "patterns": ({}, {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 32}}),
    "some layers": ({}, {"layers_to_transform": [1]}),
    "biases": ({"biased": True}, {"bias": "all"}),
    "a bias in B": ({"biased": True, "dtype": torch.float32}, {"lora_bias": True}),
    "whole modules": ({}, {"modules_to_save": ["lm_head", "norm"]}),
    "tied head": ({"tie_word_embeddings": True}, {"target_modules": ["q_proj", "lm_head"]}),
    "tied embedding": ({"tie_word_embeddings": True, "dtype": torch.float32}, {"target_modules": ["embed_tokens"]}),
    "stored the other way": ({"model_type": "gpt2"}, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("kind", GOOD)
def test_good_adapters_are_merged_as_peft_does(home: Path, kind: str) -> None:
    of_base, of_adapter = GOOD[kind]
    base = make_base(home, **of_base)
    folder = make_adapter(base, **of_adapter)
    result = merged(home)
    report, place = result["report"], Path(result["folder"])
    assert result["name"] == "one-merged" and left(home, "tiny", "one-merged")
    assert report["proven"] and report == json.loads((place / "merge_report.json").read_text())
    total = report["weights"]["total"]
    assert total["of_tolerance"] <= 1 and total["share"] == pytest.approx(1, abs=0.05)
    assert report["logits"]["to_peft_rounded"]["max"] <= report["logits"]["tolerance"]
    publish.verify(place, contents=True)

    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if of_base.get("tie_word_embeddings"):
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    theirs = peft.PeftModel.from_pretrained(plain, folder).merge_and_unload().state_dict()
    dtype = of_base.get("dtype", torch.bfloat16)
    ours = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        # PEFT and we add in another order before rounding: one step of the dtype where a sum lies in the middle.
        assert torch.allclose(ours[name], values.to(dtype).float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6), name
    settings = json.loads((place / "generation_config.json").read_text())
    assert 5 in settings["eos_token_id"]


def nothing(tensors: dict[str, torch.Tensor]) -> None:
    for name, values in tensors.items():
        if "lora_B" in name:
            values.zero_()


def poison(number: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values())).view(-1)[3] = number

    return change


def halve(tensors: dict[str, torch.Tensor]) -> None:
    for name in sorted(tensors)[: len(tensors) // 2]:
        del tensors[name]


def without_b(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if "lora_B" in name)]


def beyond(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "layers.1." in name]:
        tensors[name.replace("layers.1.", "layers.7.")] = tensors.pop(name)


def hugely(tensors: dict[str, torch.Tensor]) -> None:
    for name, values in tensors.items():
        tensors[name] = values * 1e25


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    for name, values in tensors.items():
        if "lora_A" in name:
            tensors[name] = values[:, :32].contiguous()


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "zero": (lambda folder: edit(folder, nothing), "is zero"),
    "below bf16's rounding": (
        lambda folder: edit(folder, lambda tensors: [each.mul_(1e-5) for each in tensors.values()] and None),
        "changes nothing that bf16 can hold",
    ),
    "mostly below bf16's rounding": (
        lambda folder: edit(folder, lambda tensors: [each.mul_(0.01) for each in tensors.values()] and None),
        "changes next to nothing that bf16 can hold",
    ),
    "not a number": (lambda folder: edit(folder, poison(float("nan"))), "not finite"),
    "infinite": (lambda folder: edit(folder, poison(float("inf"))), "not finite"),
    "beyond the dtype": (lambda folder: edit(folder, hugely), "not finite"),
    "half of it": (lambda folder: edit(folder, halve), "incomplete"),
    "no B": (lambda folder: edit(folder, without_b), "incomplete"),
    "layers that are not there": (lambda folder: edit(folder, beyond), "no counterpart"),
    "wrong shapes": (lambda folder: edit(folder, narrow), "shape"),
    "another rank": (lambda folder: configure(folder, r=8), "shape"),
    "cut short": (cut, "broken"),
    "DoRA": (lambda folder: configure(folder, use_dora=True), "DoRA"),
    "PiSSA": (lambda folder: configure(folder, init_lora_weights="pissa"), "took something away"),
    "another method": (lambda folder: configure(folder, peft_type="IA3"), "IA3"),
    "no such layers": (lambda folder: configure(folder, target_modules=["query"]), "does not fit"),
    "no settings": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_adapters_are_refused_and_leave_no_folder(home: Path, kind: str) -> None:
    spoil, words = BAD[kind]
    folder = make_adapter(make_base(home))
    spoil(folder)
    with pytest.raises(NibbleError, match=words):
        merged(home, low_bit=["sym_int4"])
    assert left(home, "tiny")


def test_an_adapter_of_another_model_of_the_same_shape_is_refused(home: Path) -> None:
    make_adapter(make_base(home))
    make_base(home, seed=9)
    with pytest.raises(ModelError, match="other weights"):
        merged(home)
    assert left(home, "tiny")


def test_an_adapter_whose_base_is_not_here_is_refused(home: Path) -> None:
    base = make_base(home)
    make_adapter(base, record=False)
    base.rename(base.parent / "renamed")
    with pytest.raises(ModelError, match="not here"):
        merged(home)
    assert left(home, "renamed")


def test_a_foreign_adapter_is_merged_and_its_report_says_what_is_not_known(home: Path) -> None:
    make_adapter(make_base(home), record=False)
    report = merged(home)["report"]
    assert report["base_known_by"] == "name" and any("by its name" in note for note in report["notes"])


def test_a_base_in_low_bit_leads_to_the_model_it_was_made_from(home: Path) -> None:
    from nibble.packing import Packing, pack
    from nibble.sources import safetensors

    base = make_base(home)
    packed = home / "models" / "tiny-sym_int4"
    pack(safetensors.open(base), {packed: Packing("sym_int4")}, SILENT)
    folder = make_adapter(base)
    facts = json.loads((folder / "nibble.json").read_text())
    facts["base"] |= {"name": packed.name, "fingerprint": fingerprint(packed), "format": "sym_int4"}
    (folder / "nibble.json").write_text(json.dumps(facts))
    report = merged(home)["report"]
    assert report["base"] == "tiny" and any("low-bit form" in note for note in report["notes"])

    make_base(home, seed=9)
    with pytest.raises(ModelError, match="was not made from"):
        merged(home, out="again")
    base.rename(home / "elsewhere")
    with pytest.raises(ModelError, match="full-precision"):
        merged(home, out="again")
    assert left(home, "tiny-sym_int4", "one-merged")


def test_the_survival_in_low_bit_is_told(home: Path) -> None:
    make_adapter(make_base(home))
    result = merged(home, low_bit=["sym_int8", "sym_int4"])
    eight, four = result["report"]["low_bit"]
    assert [model["name"] for model in result["models"]] == ["one-merged", "one-merged-sym_int8", "one-merged-sym_int4"]
    assert eight["weights"]["share"] == pytest.approx(1, abs=0.1) and eight["weights"]["likeness"] > 0.9
    assert four["weights"]["likeness"] < eight["weights"]["likeness"]
    assert 0 < eight["logits"]["to_tuned"]["kl"] < four["logits"]["to_tuned"]["kl"]
    assert library.inspect(Path(four["folder"])).format == "sym_int4"
    assert publish.read_manifest(Path(four["folder"]))["source"] == "one-merged"


@pytest.mark.parametrize("out", ["tiny", "guide", "../out", "a b"])
def test_names_that_cannot_be(home: Path, out: str) -> None:
    make_adapter(make_base(home))
    before = fingerprint(home / "models" / "tiny")
    with pytest.raises(ModelError):
        merged(home, out=out)
    assert left(home, "tiny") and fingerprint(home / "models" / "tiny") == before


def test_a_model_is_not_called_as_an_adapter_is(home: Path) -> None:
    make_adapter(make_base(home))
    [adapter] = library.adapters(home)
    with pytest.raises(ModelError, match=f"An adapter here is called {adapter.name}"):
        merged(home, out=adapter.name)
    assert left(home, "tiny")


def test_what_is_written_wrongly_is_noticed() -> None:
    torch.manual_seed(3)
    weight, left_side, right = torch.randn(8, 16).bfloat16(), torch.randn(8, 2), torch.randn(2, 16)
    change = Change(left_side, right, 0.5)
    right_result = (weight.float() + 0.5 * left_side @ right).bfloat16()
    assert compare(weight, right_result, change).strain <= 1
    one_step = right_result.clone()
    one_step.view(torch.int16)[3, 3] += 1
    assert compare(weight, one_step, change).strain > 1
    assert compare(weight, (weight.float() + 0.505 * left_side @ right).bfloat16(), change).strain > 1
    assert compare(weight, weight, change).strain > 1


def test_a_change_that_is_mostly_lost_is_told(home: Path) -> None:
    make_adapter(make_base(home), size=3e-5)
    report = merged(home)["report"]
    share = report["weights"]["total"]["share"]
    assert 0.05 < share < 0.5, share
    assert any("mostly lost in bf16" in line for line in report["sentences"])


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("model.norm.weight", "is no target of the adapter and differs"),
        ("lm_head.weight", "is no target of the adapter and differs"),
        ("model.layers.1.self_attn.v_proj.weight", "is off by"),
    ],
)
def test_one_wrong_bit_in_the_files_is_found(
    home: Path, monkeypatch: pytest.MonkeyPatch, where: str, words: str
) -> None:
    make_adapter(make_base(home))
    add = shards.Writer.add

    def flip(self: shards.Writer, name: str, tensor: torch.Tensor) -> None:
        if name == where:
            tensor = tensor.clone()
            tensor.view(torch.uint8).view(-1)[6] ^= 0x10
        add(self, name, tensor)

    monkeypatch.setattr(shards.Writer, "add", flip)
    with pytest.raises(ModelError, match=words):
        merged(home)
    assert left(home, "tiny")


def test_a_full_disk_leaves_no_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_adapter(make_base(home))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(ModelError, match="disk became full"):
        merged(home)
    assert left(home, "tiny")


@pytest.mark.full
def test_a_kill_at_any_time_leaves_all_or_nothing(home: Path) -> None:
    make_adapter(make_base(home))
    command = [sys.executable, "-m", "nibble", "merge", "one", "--home", str(home)]
    for wait in (0, 0.2, 0.5, 1, 2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not list((home / "models").glob(".one-merged.*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        place = home / "models" / "one-merged"
        if place.exists():
            publish.verify(place, contents=True)
            assert json.loads((place / "merge_report.json").read_text())["proven"]
            publish.remove(place)
    merged(home)
    assert left(home, "tiny", "one-merged")


def test_the_merged_guide_chats_in_low_bit(home: Path, guide_model: Path) -> None:
    from nibble.engines.base import Sampling
    from nibble.engines.local import LocalEngine

    (home / "models").mkdir(parents=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(guide_model, dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=Q_V, task_type="CAUSAL_LM"))
    for key, parameter in wrapped.named_parameters():
        if "lora_B" in key:
            parameter.data = 1e-3 * torch.randn_like(parameter)
    wrapped.save_pretrained(home / "adapters" / "of-guide")
    result = merged(home, "of-guide", low_bit="sym_int4")
    packed = result["report"]["low_bit"][0]
    assert publish.read_manifest(Path(result["folder"]))["made_from"]["base"] == "guide"
    cards = {card.name: card for card in library.models(home)}
    assert cards[packed["name"]].loadable and cards["of-guide-merged"].template == library.OWN_TEMPLATE
    engine = LocalEngine.load(Path(packed["folder"]), "")
    try:
        question: Any = [{"role": "user", "content": "What is Nibble?"}]
        chunks = list(engine.stream(question, Sampling(max_new_tokens=24), threading.Event()))
    finally:
        engine.close()
    assert "Nibble" in "".join(chunk.text for chunk in chunks)
