"""An adapter is matched to its base by what the base is, not by what it is called."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nibble import adapters, publish
from nibble.errors import ModelError

CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 32, "base_model_name_or_path": "/elsewhere/org/base"}


def write_adapter(folder: Path, facts: dict[str, Any] | None = None, **config: Any) -> Path:
    """An adapter of one tensor; with facts as ours have them, else as PEFT writes it."""
    tensors = {"base_model.model.x.lora_A.weight": torch.ones(8, 2)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    if facts is None:
        folder.mkdir()
        save_file(tensors, folder / adapters.WEIGHTS)
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
        return folder
    with publish.publication(folder, {"kind": "adapter", **facts}) as fresh:
        save_file(tensors, fresh / adapters.WEIGHTS)
        (fresh / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def test_a_fingerprint_is_of_the_weights_alone(guide_model: Path, tmp_path: Path) -> None:
    tensors = load_file(guide_model / "model.safetensors")
    whole = adapters.fingerprint(guide_model)
    (tmp_path / "config.json").write_text("{}")
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: tensors[name] for name in part}, tmp_path / f"model-{number:05d}-of-00002.safetensors")
    index = {name: f"model-{1 + place % 2:05d}-of-00002.safetensors" for place, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert adapters.fingerprint(tmp_path) == whole
    changed = tensors[names[0]].clone()
    changed.view(torch.uint8).view(-1)[-1] ^= 1
    part = {name: tensors[name] for name in names[::2]} | {names[0]: changed}
    save_file(part, tmp_path / "model-00001-of-00002.safetensors")
    assert adapters.fingerprint(tmp_path) != whole


def test_the_base_is_found_by_its_weights(guide_model: Path, home: Path) -> None:
    mark = adapters.fingerprint(guide_model)
    ours = write_adapter(home / "adapters" / "a", {"base": {"name": "guide", "fingerprint": mark, "format": "nf4"}})
    found = adapters.read(ours)
    assert (found.base, found.fingerprint, found.format) == ("guide", mark, "nf4")
    assert adapters.base_folder(found, home) == guide_model
    renamed = write_adapter(home / "adapters" / "b", {"base": {"name": "gone", "fingerprint": mark}})
    assert adapters.base_folder(adapters.read(renamed), home) == guide_model
    # What was made of the base has its name too, and comes first by its own.
    made = Path(shutil.copytree(guide_model, home / "models" / "aa"))
    (made / "nibble.json").write_text(json.dumps({"source": "guide"}))
    weights = load_file(made / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, made / "model.safetensors")
    assert adapters.base_folder(adapters.read(renamed), home) == guide_model
    other = write_adapter(home / "adapters" / "c", {"base": {"name": "guide", "fingerprint": "0" * 64}})
    with pytest.raises(ModelError, match="trained on guide, and guide here has other weights"):
        adapters.base_folder(adapters.read(other), home)


def test_a_foreign_adapter_is_matched_by_name(guide_model: Path, home: Path) -> None:
    foreign = adapters.read(write_adapter(home / "adapters" / "f"))
    assert (foreign.base, foreign.fingerprint, dict(foreign.recipe)) == ("base", "", {})
    with pytest.raises(ModelError, match="trained on base, and it is not here"):
        adapters.base_folder(foreign, home)
    shutil.copytree(guide_model, home / "models" / "org__base")
    assert adapters.base_folder(foreign, home) == home / "models" / "org__base"


def test_scales_follow_peft(tmp_path: Path) -> None:
    plain = adapters.read(write_adapter(tmp_path / "plain"))
    assert plain.scale("model.layers.0.q_proj") == 4
    patterns = adapters.read(
        write_adapter(
            tmp_path / "patterns", use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"layers.1.v_proj": 16}
        )
    )
    assert patterns.scale("model.layers.0.q_proj") == 32 / math.sqrt(4)
    assert patterns.scale("model.layers.1.v_proj") == 16 / math.sqrt(8)
    assert patterns.scale("model.layers.11.k_proj") == 32 / math.sqrt(8)
    endless = adapters.read(write_adapter(tmp_path / "endless", rank_pattern={"(a+)+$": 4}))
    with pytest.raises(ModelError, match="no module's name"):
        endless.scale("model.layers.0.q_proj")


def test_what_is_no_adapter_is_told(guide_model: Path) -> None:
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        adapters.read(guide_model)
