"""Attention of one new token gives what transformers' sdpa gives, and leaves every other case to it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from nibble.lowbit import attention

HEADS = [(8, 8), (8, 4), (6, 1)]


def model_of(config_class: type, heads: int, shared: int, **more: object):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = config_class(
            vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=heads,
            num_key_value_heads=shared, head_dim=8, max_position_embeddings=128, **more,
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(config).eval()


def logits(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of ten greedy steps after a prompt, one row a step."""
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.parametrize(("heads", "shared"), HEADS)
@pytest.mark.parametrize(
    ("config_class", "more"), [(LlamaConfig, {}), (Qwen2Config, {}), (MistralConfig, {"sliding_window": 7})]
)
@pytest.mark.parametrize("padding", [0, 5])
def test_generation_equals_sdpa(config_class: type, more: dict, heads: int, shared: int, padding: int) -> None:
    model = model_of(config_class, heads, shared, **more)
    assert model.config._attn_implementation == "sdpa"
    ids = torch.randint(1, 64, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    mask[2, : padding // 2] = 0
    expected = logits(model, ids, mask)
    assert attention.use(model)
    ours = logits(model, ids, mask)
    assert torch.allclose(ours, expected, atol=1e-5)


def test_training_is_left_to_sdpa() -> None:
    model = model_of(LlamaConfig, 8, 4)
    ids = torch.randint(1, 64, (2, 1), generator=torch.Generator().manual_seed(2))
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(input_ids=ids, labels=ids.expand(-1, 1)).logits.sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad.clone())
        attention.use(model)
    assert gradients[0].any()
    assert torch.equal(*gradients)


def test_a_direct_call_with_every_kind_of_argument_equals_sdpa() -> None:
    random = torch.Generator().manual_seed(3)
    module = torch.nn.Module()
    module.num_key_value_groups = 4
    query, key, value = (
        torch.randn(2, heads, length, 8, generator=random) for heads, length in ((8, 1), (2, 9), (2, 9))
    )
    shared = torch.rand(2, 1, 1, 9, generator=random) > 0.3
    shared[..., 0] = True
    for mask in (None, shared, torch.where(shared, 0.0, float("-inf")), shared.expand(-1, 8, -1, -1)):
        for scaling in (None, 0.3):
            for more in ({}, {"is_causal": True}, {"sliding_window": 4}, {"dropout": 0.0}):
                expected, _ = attention.sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **more)
                ours, weights = attention.attention(module, query, key, value, mask, scaling=scaling, **more)
                assert weights is None
                assert ours.shape == expected.shape
                assert torch.allclose(ours, expected, atol=1e-6)


def test_a_saved_config_does_not_name_it(tmp_path: Path) -> None:
    model = model_of(LlamaConfig, 8, 4)
    attention.use(model)
    model.save_pretrained(tmp_path)
    assert attention.NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_choice_of_the_caller_is_kept() -> None:
    model = model_of(LlamaConfig, 8, 4)
    model.set_attn_implementation("eager")
    assert not attention.use(model)
    assert model.config._attn_implementation == "eager"
