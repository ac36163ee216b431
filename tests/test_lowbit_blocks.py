"""Packed values equal the references' bit for bit; any width is taken."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.errors import FormatError, ModelError
from nibble.lowbit import FORMATS, quantize
from nibble.lowbit.blocks import pack_bits, unpack_bits

GGML = {"sym_int4": "Q4_0", "asym_int4": "Q4_1", "sym_int5": "Q5_0", "asym_int5": "Q5_1", "sym_int8": "Q8_0"}
PACKED = [name for name, row in FORMATS.items() if row.quantized]

weights = st.tuples(
    st.integers(1, 40), st.integers(1, 6), st.sampled_from((1e-3, 0.02, 1.0, 30.0)),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16)), st.integers(0, 2**31),
)  # fmt: skip
"""Rows, blocks of 64, size, dtype and seed of a random weight."""


def make(rows: int, width: int, size: float, dtype: torch.dtype, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    weight = size * torch.randn(rows, width, generator=random)
    weight[0, : width // 2] = 0
    # Equal magnitudes of both signs: the first of them decides the scale.
    weight[-1] = weight[-1].sign() * size
    return weight.to(dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to the last bit, but for the sign of a zero."""
    return torch.equal((one + 0.0).view(torch.int32), (other + 0.0).view(torch.int32))


@pytest.mark.parametrize("name", GGML)
@settings(max_examples=100, deadline=None)
@given(weights)
def test_values_equal_those_of_gguf(name: str, drawn: tuple) -> None:
    quants = pytest.importorskip("gguf.quants")
    rows, blocks, size, dtype, seed = drawn
    weight = make(rows, 64 * blocks, size, dtype, seed)
    kind = quants.GGMLQuantizationType[GGML[name]]
    expected = quants.dequantize(quants.quantize(weight.float().numpy(), kind), kind)
    assert same_bits(quantize(weight, name).dequantize(), torch.from_numpy(np.ascontiguousarray(expected)))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@settings(max_examples=100, deadline=None)
@given(weights)
def test_values_equal_those_of_bitsandbytes(name: str, drawn: tuple) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    rows, blocks, size, dtype, seed = drawn
    weight = make(rows, 64 * blocks, size, dtype, seed)
    codes, state = functional.quantize_4bit(weight.float(), blocksize=64, quant_type=name)
    assert same_bits(quantize(weight, name).dequantize(), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("name", PACKED)
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 200), st.integers(0, 2**31))
def test_any_width_is_taken_and_whole_blocks_do_not_change(name: str, rows: int, width: int, seed: int) -> None:
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    packed = quantize(weight, name)
    assert packed.nbytes == FORMATS[name].nbytes(rows, width)
    assert packed.codes.shape == FORMATS[name].code_shape(rows, width)
    values = packed.dequantize()
    assert values.shape == weight.shape
    block = FORMATS[name].block
    if block:
        whole = width // block * block
        if whole:
            assert torch.equal(values[:, :whole], quantize(weight[:, :whole], name).dequantize())
        # The worst a code can be off, as a share of the block's range: half a step of the coarsest format.
        assert (values - weight).abs().max() <= 0.17 * weight.abs().max()


@pytest.mark.parametrize(("name", "bound"), [("fp8_e4m3", 2**-4), ("fp8_e5m2", 2**-3)])
def test_float8_rounds_to_the_nearest(name: str, bound: float) -> None:
    weight = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    packed = quantize(weight, name)
    values = packed.dequantize()
    kind = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[name]
    scale = weight.abs().amax(1, keepdim=True) / torch.finfo(kind).max
    assert torch.allclose(values, packed.codes[:, 0].view(kind).float() * scale, rtol=1e-6, atol=0)
    large = weight.abs() > 0.01
    assert ((values - weight).abs() / weight.abs())[large].max() <= bound * 1.001


def test_every_float8_number_is_decoded_as_torch_decodes_it() -> None:
    for name, kind in {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}.items():
        numbers = torch.arange(256, dtype=torch.uint8)
        numbers = numbers[torch.isfinite(numbers.view(kind).float())]
        packed = quantize(torch.ones(1, len(numbers)), name)
        packed.codes[0, 0] = numbers
        packed.scales.fill_(1.0)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(packed.dequantize(dtype)[0], numbers.view(kind).to(dtype))


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_bits_come_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape[-1] == 64 * bits // 8
    assert torch.equal(unpack_bits(packed, bits), codes)


@pytest.mark.parametrize("name", FORMATS)
def test_other_dtypes_are_the_float32_values_rounded(name: str) -> None:
    packed = quantize(torch.randn(20, 172, generator=torch.Generator().manual_seed(1)), name)
    exact = packed.dequantize()
    for dtype, bound in ((torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
        rounded = packed.dequantize(dtype)
        assert rounded.dtype == dtype
        assert (rounded.float() - exact).abs().max() <= bound * exact.abs().max()


@pytest.mark.parametrize("name", PACKED)
def test_small_weights_survive_float16(name: str) -> None:
    packed = quantize(0.02 * torch.randn(9, 128, generator=torch.Generator().manual_seed(1)), name)
    exact = packed.dequantize()
    assert (packed.dequantize(torch.float16).float() - exact).norm() <= 2**-10 * exact.norm()


def test_a_zero_weight_stays_zero() -> None:
    for name in FORMATS:
        assert not quantize(torch.zeros(3, 100), name).dequantize().any()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", PACKED)
def test_a_weight_that_is_not_finite_is_refused(name: str, number: float) -> None:
    weight = torch.zeros(2, 64)
    weight[1, 7] = number
    with pytest.raises(ModelError, match=name):
        quantize(weight, name)


def test_a_weight_too_large_for_the_scale_is_refused() -> None:
    with pytest.raises(ModelError, match="too large"):
        quantize(torch.full((1, 32), 1e7), "sym_int4")


def test_what_is_no_matrix_of_numbers_is_refused() -> None:
    for weight in (torch.zeros(3), torch.zeros(2, 2, 2), torch.zeros(2, 2, dtype=torch.int8)):
        with pytest.raises(ModelError):
            quantize(weight, "sym_int4")
    with pytest.raises(FormatError):
        quantize(torch.zeros(2, 2), "sym_int6")
