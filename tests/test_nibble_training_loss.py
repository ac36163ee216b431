"""The loss without logits, beside transformers' own; attention and dropout as training meets them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from nibble import qlora
from nibble.lowbit import attention
from nibble.lowbit.quantizer import pack_model
from nibble.training.loss import IGNORED, frugal

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "mistral": transformers.MistralConfig,
}  # fmt: skip


def model_of(
    config: Callable[..., Any] = transformers.LlamaConfig, dtype: torch.dtype = torch.float32, **more: Any
) -> Any:
    torch.manual_seed(0)
    made = config(**SIZES, num_key_value_heads=2, initializer_range=0.2, use_cache=False, **more)
    return transformers.AutoModelForCausalLM.from_config(made).to(dtype)


def adapted(base: Any) -> Any:
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj"]
    config = qlora.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    return qlora.get_peft_model(qlora.prepare_model_for_kbit_training(base), config).train()


def batch() -> dict[str, torch.Tensor]:
    """Two samples of unlike length; only a part of each is trained."""
    ids = torch.randint(5, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    seen, labels = torch.ones_like(ids), ids.clone()
    labels[:, :6] = IGNORED
    labels[1, 15:], seen[1, 15:] = IGNORED, 0
    return {"input_ids": ids, "attention_mask": seen, "labels": labels}


def learnt(model: Any, **more: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch(), **more).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("total", [None, torch.tensor(50)])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers(
    monkeypatch: pytest.MonkeyPatch, family: str, total: torch.Tensor | None
) -> None:
    # Several parts, the last a short one.
    monkeypatch.setattr("nibble.training.loss.LOGITS", 7 * 300)
    model = adapted(model_of(FAMILIES[family]))
    more = {} if total is None else {"num_items_in_batch": total}
    loss, gradients = learnt(model, **more)
    assert frugal(model)
    ours, again = learnt(model, **more)
    assert model(**batch()).logits is None
    assert torch.allclose(ours, loss, rtol=1e-5)
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(again, gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip", [[], ["lm_head"]], ids=["packed head", "dense head"])
def test_a_packed_base_is_served_whatever_its_head(skip: list[str], dtype: torch.dtype) -> None:
    model = adapted(pack_model(model_of(dtype=dtype), "nf4", skip))
    loss, gradients = learnt(model)
    assert frugal(model)
    ours, again = learnt(model)
    bound = 1e-4 if dtype == torch.float32 else 0.03
    assert abs(float(ours - loss)) <= bound * float(loss)
    pairs = [torch.cat([each.flatten() for each in made]) for made in (again, gradients)]
    assert (pairs[0] - pairs[1]).norm() <= bound * pairs[1].norm()


def test_without_labels_there_are_logits() -> None:
    model = adapted(model_of())
    ids = batch()["input_ids"]
    before = model(input_ids=ids).logits
    assert frugal(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.training


def test_models_whose_logits_are_something_else_are_left_alone() -> None:
    capped = adapted(model_of(transformers.Gemma2Config, head_dim=16, final_logit_softcapping=5.0))
    before = learnt(capped)[0]
    assert not frugal(capped)
    assert torch.equal(learnt(capped)[0], before)
    scaled = adapted(model_of(transformers.GraniteConfig, logits_scaling=3.0))
    assert not frugal(scaled)
    assert not frugal(adapted(model_of(dtype=torch.float16)))


def test_a_head_that_is_trained_is_left_alone() -> None:
    config = qlora.LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    assert not frugal(qlora.get_peft_model(model_of(), config))


@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_attention_over_short_samples_is_exact(kind: str) -> None:
    """Nearer to float32 than torch's own in bfloat16 is."""
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, heads, 40, 16, generator=random).bfloat16().requires_grad_() for heads in (6, 2, 2)]
    given = torch.randn(2, 40, 6, 16, generator=random).bfloat16()
    sees = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    sees[1, :, 25:, :10] = False
    added = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.bfloat16).min).bfloat16()
    mask = {"none": None, "bool": sees, "added": added}[kind]
    if mask is None:
        sees = torch.ones(40, 40, dtype=torch.bool).tril()

    def results(
        compute: Callable[..., torch.Tensor], tensors: list[torch.Tensor], to: torch.Tensor
    ) -> list[torch.Tensor]:
        out = compute(*tensors)
        out.backward(to)
        return [out.detach().float(), *(tensor.grad.float() for tensor in tensors)]

    def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = key.repeat_interleave(3, 1), value.repeat_interleave(3, 1)
        return scaled_dot_product_attention(query, key, value, attn_mask=sees, scale=0.3).transpose(1, 2)

    def ours(*tensors: torch.Tensor) -> torch.Tensor:
        return attention.attention(torch.nn.Identity(), *tensors, mask, scaling=0.3, dropout=0.0)[0]

    exact = results(plain, [each.detach().float().requires_grad_() for each in inputs], given.float())
    for one, other in zip(results(ours, inputs, given), exact, strict=True):
        assert (one - other).norm() <= 0.004 * other.norm()


def test_dropout_drops_the_share_it_says_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer, ones = qlora.Dropout(0.05), torch.ones(1001, 999, requires_grad=True)
    out = layer(ones)
    out.sum().backward()
    assert torch.equal(ones.grad, out.detach())
    assert abs(float((out == 0).float().mean()) - 0.05) < 0.001
    assert abs(float(out.mean()) - 1) < 0.001
    state = torch.get_rng_state()
    one = layer(ones)
    torch.set_rng_state(state)
    assert torch.equal(layer(ones), one)
    assert torch.equal(layer.eval()(ones), ones)
    assert torch.equal(qlora.Dropout(0.0)(ones), ones)


def test_dropout_is_put_on_adapters() -> None:
    config = qlora.LoraConfig(target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    model = qlora.get_peft_model(model_of(), config)
    assert any(isinstance(module, qlora.Dropout) and module.p == 0.1 for module in model.modules())
