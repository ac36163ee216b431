"""The lean way through a decoder layer says what the layer says; the roomy cache holds what the plain one holds."""

import copy
import logging
from pathlib import Path

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicLayer

from nibble.lowbit import lean, prepare
from nibble.transformers import AutoModelForCausalLM

KINDS = {
    "qwen2": (transformers.Qwen2Config, {}),
    "llama": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 12}),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config_class, more = KINDS[request.param]
    config = config_class(
        vocab_size=128, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, **more,
    )  # fmt: skip
    path = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(path)
    return path


def load(folder: Path, name: str = "sym_int4") -> transformers.PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, load_in_low_bit=name)
    prepare(model)
    return model


def run(model: transformers.PreTrainedModel, ids: torch.Tensor, steps: int = 20) -> tuple[torch.Tensor, object]:
    """Logits of a prompt's end and of some fixed tokens after it, and the cache."""
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        out = [model(input_ids=ids, use_cache=True, **{lean.CACHE: cache}).logits[:, -1]]
        for token in range(steps):
            fixed = torch.full((len(ids), 1), token + 3)
            out.append(model(input_ids=fixed, use_cache=True, **{lean.CACHE: cache}).logits[:, -1])
    return torch.stack(out).float(), cache


def took_the_lean_way(model: transformers.PreTrainedModel) -> bool:
    return all(isinstance(vars(layer).get("_nibble_lean"), lean._Lean) for layer in model.model.layers)


@pytest.mark.parametrize("name", ["sym_int4", "asym_int5", "nf4"])
def test_it_says_what_the_layers_say(folder: Path, name: str) -> None:
    ids = torch.randint(3, 128, (1, 17), generator=torch.Generator().manual_seed(1))
    model = load(folder, name)
    ours, cache = run(model, ids)
    assert took_the_lean_way(model)
    for layer in model.model.layers:
        del vars(layer)["forward"]
    theirs, plain = run(model, ids)
    assert torch.equal(ours[0], theirs[0])
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    assert not torch.equal(ours[1:], theirs[1:])
    for one, other in zip(cache.layers, plain.layers, strict=True):
        assert type(other) is not lean.RoomyLayer
        assert one.keys.shape == other.keys.shape
        assert (one.keys.float() - other.keys.float()).norm() < 0.02 * other.keys.float().norm()


def test_the_choice_is_made_at_first_use_too(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True)
    run(model, torch.tensor([[5, 6, 7]]), steps=2)
    assert took_the_lean_way(model)


def test_all_else_takes_the_layers_own_way(folder: Path) -> None:
    model = load(folder)
    batch, _ = run(model, torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(2)), steps=3)
    assert not took_the_lean_way(model)
    single = AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True, dtype=torch.float32)
    run(single, torch.tensor([[5, 6, 7]]), steps=2)
    assert not took_the_lean_way(single)
    eager = AutoModelForCausalLM.from_pretrained(folder, load_in_4bit=True, attn_implementation="eager")
    run(eager, torch.tensor([[5, 6, 7]]), steps=2)
    assert not took_the_lean_way(eager)
    assert torch.isfinite(batch).all()


def test_moving_and_training_leave_it_and_preparing_brings_it_back(folder: Path) -> None:
    model = load(folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    before, _ = run(model, ids)
    stored = {key: value.clone() for key, value in model.state_dict().items()}
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0
    portable, _ = run(model, ids)
    assert (portable - before).norm() < 0.05 * before.norm()
    model.to("cpu")
    prepare(model)
    after, _ = run(model, ids)
    assert torch.equal(after, before)
    for key, value in model.state_dict().items():
        assert torch.equal(value, stored[key]), key


def test_a_changed_bias_is_seen(folder: Path) -> None:
    model = load(folder)
    if model.model.layers[0].self_attn.q_proj.bias is None:
        pytest.skip("this kind of model has no biases")
    ids = torch.tensor([[5, 6, 7, 8]])
    run(model, ids)
    model.load_state_dict(
        {key: value * 3 if key.endswith("bias") else value for key, value in model.state_dict().items()}
    )
    prepare(model)
    ours, _ = run(model, ids)
    for layer in model.model.layers:
        vars(layer).pop("forward")
    theirs, _ = run(model, ids)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_a_way_that_disagrees_is_dropped_with_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lean, "_rotate", lambda heads, cos, sin: heads)
    model = load(folder)
    with caplog.at_level(logging.WARNING):
        run(model, torch.tensor([[5, 6, 7]]), steps=2)
    assert "lean way" in caplog.text
    assert not took_the_lean_way(model)


def test_the_roomy_cache_holds_what_the_plain_one_holds() -> None:
    random = torch.Generator().manual_seed(0)
    plain, roomy = DynamicLayer(), lean.RoomyLayer()
    for turn in range(120):
        new = torch.randn(2, 2, 1 if turn % 5 else 70, 8, generator=random)
        results = [layer.update(new, -new) for layer in (plain, roomy)]
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
        if turn % 7 == 3:
            for layer in (plain, roomy):
                layer.crop(-int(turn % 11))
        if turn % 13 == 5:
            for layer in (plain, roomy):
                layer.reorder_cache(torch.tensor([1, 0]))
        if turn % 17 == 8:
            roomy = copy.deepcopy(roomy)
        assert roomy.get_seq_length() == plain.get_seq_length()
        assert torch.equal(roomy.keys, plain.keys)
    roomy.reset()
    assert roomy.get_seq_length() == 0
    new = torch.randn(1, 2, 3, 8, generator=random)
    assert torch.equal(roomy.update(new, new)[0], new)


def test_a_copy_of_the_cache_goes_its_own_way() -> None:
    layer = lean.RoomyLayer()
    layer.update(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
    other = copy.deepcopy(layer)
    layer.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    other.update(torch.full((1, 1, 1, 2), 2.0), torch.full((1, 1, 1, 2), 2.0))
    assert layer.keys[0, 0, 4, 0] == 1
    assert other.keys[0, 0, 4, 0] == 2
