"""The whole way on the guide: every format from the console, and proposals that are packed and measured again."""

import json
from pathlib import Path

import pytest

from nibble import quality
from nibble.lowbit.formats import FORMATS
from nibble.quality.kept import kept
from nibble.quality.picking import SHORT, Limits
from nibble.transformers import AutoModelForCausalLM
from tests.test_nibble_commands import nibble

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]


def test_every_format_of_the_guide(home: Path, guide_model: Path) -> None:
    run = nibble("evaluate", "guide", "--tokens", "2048", "--json", timeout=1500)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    rows = {row["format"]: row for row in report["formats"]}
    assert list(rows) == [row.name for row in FORMATS.values() if row.quantized]
    kl = {name: row["kl_mean"] for name, row in rows.items()}
    assert kl["sym_int4"] > kl["sym_int5"] > kl["sym_int8"] > 0
    assert kl["asym_int4"] > kl["asym_int5"]
    assert kl["nf4"] <= kl["fp4"]
    agreement = {name: row["top1"] for name, row in rows.items()}
    assert agreement["sym_int8"] > agreement["sym_int4"] > 0.9
    assert rows["sym_int4"]["size_bytes"] < rows["sym_int5"]["size_bytes"] < report["reference"]["size_bytes"]
    assert kept("guide", home) == report
    again = nibble("evaluate", "guide", "--low-bit", "fp16", "--tokens", "2048", timeout=600)
    assert "fp16" in again.stdout
    assert len((kept("guide", home) or {})["formats"]) == len(rows) + 1


@pytest.mark.parametrize("max_kl", [0.05, 0.001, 0.0002])
def test_a_proposal_holds_when_it_is_packed(guide_model: Path, tmp_path: Path, max_kl: float) -> None:
    limits = Limits(max_kl, memory_bytes=10**9)
    found = quality.pick(guide_model, limits, SHORT)
    assert found.holds, found.why
    model = AutoModelForCausalLM.from_pretrained(guide_model, load_in_low_bit=found.format, overrides=found.overrides)
    model.save_low_bit(tmp_path / "picked")
    report = quality.compare([quality.Subject(tmp_path / "picked")], guide_model, SHORT)
    row = report["formats"][0]
    assert row["kl_mean"] <= max_kl
    assert row["peak_bytes"] <= limits.memory_bytes
    assert row["size_bytes"] == found.size_bytes
    assert row.get("overrides", {}) == found.overrides


def test_where_no_form_holds_the_nearest_is_named(guide_model: Path) -> None:
    found = quality.pick(guide_model, Limits(1e-7), SHORT)
    assert not found.holds
    assert found.format == "sym_int8"
