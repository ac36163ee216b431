"""Names of formats: every one is answered, and asking needs no torch."""

import subprocess
import sys

import pytest

from nibble.errors import FormatError
from nibble.lowbit.formats import FORMATS, resolve


@pytest.mark.parametrize("name", FORMATS)
def test_every_name_resolves_to_itself(name: str) -> None:
    assert resolve(name).name == name
    assert resolve(f" {name.upper()} ").name == name


def test_plain_fp8_is_e5m2() -> None:
    assert resolve("fp8").name == "fp8_e5m2"


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("q4_k", "GGUF"), ("q6_k", "GGUF"), ("gguf_iq2_xxs", "GGUF"), ("gguf_iq1_m", "GGUF"), ("gguf_q4k_m", "GGUF"),
        ("nf3", "nf4"), ("fp6", "asym_int5"), ("fp6_k", "asym_int5"), ("mixed_fp8", "fp8_e4m3"),
        ("woq_int4", "sym_int4"),
        ("q4_0", "sym_int4"), ("sym_int8_rtn", "sym_int8"),
    ],
)  # fmt: skip
def test_names_of_ipex_llm_are_answered(name: str, answer: str) -> None:
    with pytest.raises(FormatError) as caught:
        resolve(name)
    assert name in caught.value.message
    assert answer in caught.value.hint


@pytest.mark.parametrize(("name", "near"), [("sym_int3", "sym_int"), ("symint4", "sym_int4"), ("nf-4", "nf4")])
def test_an_unknown_name_gets_the_list_and_the_nearest(name: str, near: str) -> None:
    with pytest.raises(FormatError) as caught:
        resolve(name)
    assert f"Did you mean {near}" in caught.value.hint
    assert all(known in caught.value.hint for known in FORMATS)


@pytest.mark.parametrize("name", [None, 4, "", "????"])
def test_nonsense_gets_the_list(name: object) -> None:
    with pytest.raises(FormatError) as caught:
        resolve(name)
    assert "sym_int4" in caught.value.hint


def test_sizes_follow_from_the_row() -> None:
    # ggml's block sizes: Q4_0 18 bytes for 32 weights, Q4_1 20, Q5_0 22, Q5_1 24, Q8_0 34.
    blocks = {"sym_int4": 18, "asym_int4": 20, "sym_int5": 22, "asym_int5": 24, "sym_int8": 34}
    for name, size in blocks.items():
        assert FORMATS[name].nbytes(1, 32) == size
        assert FORMATS[name].nbytes(3, 33) == 6 * size
    assert FORMATS["nf4"].nbytes(1, 64) == 36
    assert FORMATS["fp8_e4m3"].nbytes(2, 172) == 2 * (172 + 4)
    assert FORMATS["bf16"].nbytes(2, 3) == 12
    assert FORMATS["asym_int5"].bits_per_weight == 6.0


def test_asking_imports_no_torch() -> None:
    code = "import sys, nibble.lowbit, nibble.lowbit.formats, nibble.publish; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
