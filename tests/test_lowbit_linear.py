"""The packed layer: values, gradients, moves, copies, and its kernel against the portable path."""

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from nibble.errors import ModelError
from nibble.lowbit import FORMATS, LowBitLinear, kernel_name, kernels, prepare, quantize
from nibble.lowbit.blocks import QuantizedTensor
from nibble.lowbit.recipes import RECIPES

PACKED = [name for name, row in FORMATS.items() if row.quantized]
WITH_KERNEL = list(RECIPES)


def layer_of(name: str, rows: int, width: int, *, bias: bool = True, seed: int = 0) -> LowBitLinear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LowBitLinear.from_linear(nn.Linear(width, rows, bias=bias), name).eval()


def rows_of(count: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count)).to(dtype)


@pytest.mark.parametrize("name", PACKED)
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 70), st.integers(1, 180), st.integers(1, 5))
def test_values_and_gradient_are_those_of_the_dense_layer(name: str, rows: int, width: int, count: int) -> None:
    layer = layer_of(name, rows, width)
    results = []
    for compute in (layer, lambda given: linear(given, layer.dequantize(), layer.bias)):
        given_rows = rows_of(count, width).unsqueeze(0).requires_grad_()
        out = compute(given_rows)
        out.backward(rows_of(count, rows).unsqueeze(0) + 1)
        results.append((out.detach(), given_rows.grad, layer.bias.grad))
        layer.bias.grad = None
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(layer(rows_of(count, width)), results[1][0][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WITH_KERNEL)
@pytest.mark.parametrize(("rows", "width"), [(64, 64), (16, 172), (208, 96), (144, 320)])
def test_the_kernel_agrees_with_the_portable_path(name: str, rows: int, width: int) -> None:
    if not kernels.agrees(name):
        pytest.skip("this CPU's int4 kernel does not serve this format")
    layer = layer_of(name, rows, width)
    prepare(layer.to(torch.bfloat16))
    assert layer.kernel == "int4 kernel of torch"
    for count in (1, 2, 17, 100):
        given_rows = rows_of(count, width, torch.bfloat16)
        exact = linear(given_rows.float(), layer.dequantize(), layer.bias.float())
        with torch.inference_mode():
            out = layer(given_rows)
        assert (out.float() - exact).norm() <= kernels.TOLERANCE * exact.norm()


@pytest.mark.parametrize("name", WITH_KERNEL)
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 15), st.integers(1, 200), st.integers(0, 2**31))
def test_the_kernel_layout_comes_back_bit_for_bit(name: str, sixteens: int, width: int, seed: int) -> None:
    weight = torch.randn(16 * sixteens, width, generator=torch.Generator().manual_seed(seed))
    packed = quantize(weight, name)
    if not kernels.accepts(packed, torch.bfloat16):
        pytest.skip("this CPU's int4 kernel does not serve this format")
    assert torch.equal(kernels.convert(packed).canonical(), packed.codes)


@pytest.mark.parametrize("name", WITH_KERNEL)
def test_everybody_else_sees_the_stored_form(name: str) -> None:
    layer = layer_of(name, 64, 172)
    stored = {key: value.clone() for key, value in layer.state_dict().items()}
    prepare(layer.to(torch.bfloat16))
    assert torch.equal(layer.state_dict()["weight"], stored["weight"])
    assert torch.equal(layer.quantized.codes, stored["weight"])
    assert torch.equal(copy.deepcopy(layer).state_dict()["weight"], stored["weight"])
    fresh = LowBitLinear((64, 172), FORMATS[name], bias=True)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.dequantize(), layer.dequantize())
    layer.to("cpu")
    assert layer.kernel == "portable"
    assert torch.equal(layer.weight, stored["weight"])


def test_loading_into_a_prepared_layer_replaces_its_weight() -> None:
    layer, other = layer_of("sym_int4", 64, 64), layer_of("sym_int4", 64, 64, seed=1)
    prepare(layer.to(torch.bfloat16))
    layer.load_state_dict(other.state_dict())
    prepare(layer)
    assert torch.equal(layer.dequantize(), other.dequantize())


@pytest.mark.parametrize("name", PACKED)
def test_a_cast_of_the_model_leaves_the_weight_as_it_is(name: str) -> None:
    layer = layer_of(name, 32, 100)
    before = layer.dequantize()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer.to(dtype)
        assert layer.bias.dtype == dtype
        assert torch.equal(layer.dequantize(), before)


def test_training_after_chatting_uses_the_exact_weight() -> None:
    layer = layer_of("asym_int5", 64, 64).to(torch.bfloat16)
    with torch.inference_mode():
        layer(rows_of(5, 64, torch.bfloat16))
    kernel = layer.kernel
    given_rows = rows_of(3, 64).requires_grad_()
    layer(given_rows).sum().backward()
    assert torch.allclose(given_rows.grad, layer.dequantize().sum(0).expand(3, -1), atol=1e-5)
    with torch.inference_mode():
        layer(rows_of(1, 64, torch.bfloat16))
    assert layer.kernel == "portable"
    layer.prepare(torch.bfloat16)
    assert layer.kernel == kernel


def test_backward_after_the_layout_changed_uses_the_right_weight() -> None:
    layer = layer_of("sym_int4", 64, 64, bias=False)
    given_rows = rows_of(2, 64).requires_grad_()
    out = layer(given_rows)
    layer.prepare(torch.bfloat16)
    out.sum().backward()
    assert torch.allclose(given_rows.grad, layer.dequantize().sum(0).expand(2, -1), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_is_computed_again_for_backward_is_unpacked_once_for_both(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = nn.Sequential(layer_of("nf4", 96, 64), nn.SiLU(), layer_of("nf4", 64, 96, seed=1)).to(dtype).train()
    unpacked: list[torch.dtype] = []
    dequantize = QuantizedTensor.dequantize

    def counted(tensor: QuantizedTensor, wanted: torch.dtype = torch.float32) -> torch.Tensor:
        unpacked.append(wanted)
        return dequantize(tensor, wanted)

    monkeypatch.setattr(QuantizedTensor, "dequantize", counted)
    results = []
    for again in (False, True):
        given_rows = rows_of(5, 64, dtype).requires_grad_()
        out = checkpoint(layers, given_rows, use_reentrant=False) if again else layers(given_rows)
        forward = len(unpacked)
        out.float().square().sum().backward()
        results.append((out.detach(), given_rows.grad))
        # Two layers forward; then two backward, or two for the second forward and its backward together.
        assert (forward, len(unpacked)) == (2, 4)
        unpacked.clear()
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_a_kernel_that_disagrees_is_dropped_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels.agrees.cache_clear()
    monkeypatch.setattr(kernels, "TOLERANCE", 1e-9)
    try:
        with caplog.at_level(logging.WARNING):
            layers = [layer_of("sym_int4", 64, 64).to(torch.bfloat16) for _ in range(3)]
            for layer in layers:
                prepare(layer)
        assert [layer.kernel for layer in layers] == ["portable"] * 3
        assert len([record for record in caplog.records if "sym_int4" in record.getMessage()]) == 1
        out = layers[0](rows_of(1, 64, torch.bfloat16))
        assert torch.allclose(out.float(), layers[0](rows_of(1, 64)), rtol=0.05, atol=0.05)
    finally:
        kernels.agrees.cache_clear()


def test_shapes_the_kernel_does_not_take_are_served_portably() -> None:
    layer = layer_of("sym_int4", 20, 64).to(torch.bfloat16)
    prepare(layer)
    assert kernel_name(layer) == "portable"
    assert layer(rows_of(1, 64, torch.bfloat16)).shape == (1, 20)


def test_autocast_is_honoured() -> None:
    layer = layer_of("nf4", 48, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(rows_of(2, 64).requires_grad_()).dtype == torch.bfloat16


def test_integers_are_refused_with_a_sentence() -> None:
    with pytest.raises(ModelError, match="uint8"):
        layer_of("sym_int4", 16, 32)(torch.zeros(1, 32, dtype=torch.uint8))


@pytest.mark.parametrize("name", PACKED)
def test_peft_attaches_lora_and_trains_it(name: str) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(layer_of(name, 32, 40)), peft.LoraConfig(target_modules=["0"], init_lora_weights=True)
    )
    model(rows_of(3, 40)).sum().backward()
    trained = [parameter for key, parameter in model.named_parameters() if "lora_B" in key]
    assert trained
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)
