"""What a folder is, and what is wrong with it, told before anything is loaded."""

import json
import shutil
import struct
from pathlib import Path

import pytest

from nibble.errors import ModelError
from nibble.library import find, inspect, models
from nibble.screen import check


@pytest.fixture
def folder(stories: Path, tmp_path: Path) -> Path:
    """A model that may be broken."""
    copy = tmp_path / "stories"
    shutil.copytree(stories, copy)
    return copy


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def test_a_good_folder_is_described(folder: Path) -> None:
    check(folder)
    card = inspect(folder)
    assert (card.family, card.format, card.parameters, card.context) == ("llama", "fp32", 260_032, 512)


def test_names_lead_to_folders(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(folder, home / "models" / "tiny")
    assert find("tiny", home) == home / "models" / "tiny"
    assert [card.name for card in models(home) if card.name != "guide"] == ["tiny"]
    assert find(str(folder), home, paths=True) == folder
    for name in (str(folder), "../home/models/tiny", "..", "", "nothing", "tiny/../tiny", "tiny\0"):
        with pytest.raises(ModelError, match="There is no model"):
            find(name, home)


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        check(folder)
    check(folder, tokenizer=False)


def test_a_shard_cut_anywhere_is_named(folder: Path) -> None:
    shard = folder / "model.safetensors"
    whole = shard.read_bytes()
    for cut in (0, 3, 8, 100, 5_000, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:cut])
        with pytest.raises(ModelError, match=r"model\.safetensors in stories is broken"):
            check(folder)
    shard.write_bytes(whole + b"x")
    with pytest.raises(ModelError, match="broken"):
        check(folder)


@pytest.mark.parametrize(
    "header",
    [b"[]", b'{"a": 1}', b'{"a": {"data_offsets": "xy"}}', b"{" * 50_000, b'{"a": {"data_offsets": [0]}}', b"\xff\xff"],
)
def test_a_malformed_header_is_named(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ModelError, match="broken"):
        check(folder)


def test_an_index_that_lies_is_named(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    for shard, words in (("gone.safetensors", "lacks the shard"), ("../model.safetensors", "outside the folder")):
        index.write_text(json.dumps({"weight_map": {"x": shard}}), encoding="utf-8")
        with pytest.raises(ModelError, match=words):
            check(folder)


def test_pickles_alone_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        check(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_its_own_is_refused_unless_trusted(folder: Path, file: str) -> None:
    edit(folder / file, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    with pytest.raises(ModelError, match="trust_remote_code"):
        check(folder)
    check(folder, trust_remote_code=True)


def test_keys_that_run_code_are_refused_even_when_trusted(folder: Path) -> None:
    edit(folder / "config.json", _attn_implementation_internal="someone/kernel")
    with pytest.raises(ModelError, match="_attn_implementation_internal"):
        check(folder, trust_remote_code=True)


def test_gguf_alone_is_told_what_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="GGUF"):
        check(tmp_path)


def test_a_broken_model_does_not_hide_the_others(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(folder, home / "models" / "good")
    shutil.copytree(folder, home / "models" / "bad")
    (home / "models" / "bad" / "config.json").write_text("{", encoding="utf-8")
    cards = {card.name: card for card in models(home)}
    assert cards["good"].problem == ""
    assert "not valid JSON" in cards["bad"].problem
