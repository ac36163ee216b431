"""The task `quantize`: which model a name means, what the new ones are called, and what is refused."""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nibble import publish
from nibble.errors import FormatError, NibbleError
from nibble.lowbit import LowBitLinear
from nibble.quality import Proposal, kept
from nibble.screen import check
from nibble.shards import Writer
from nibble.sources import open_source
from nibble.tasks import download
from nibble.tasks import quantize as task
from nibble.tasks.quantize import run
from nibble.transformers import AutoModelForCausalLM
from tests.support.downloads import Told
from tests.support.ggufs import write_gguf


@pytest.fixture
def tiny(stories: Path, home: Path) -> str:
    """Name of a model in home/models."""
    shutil.copytree(stories, home / "models" / "tiny")
    return "tiny"


def quantize(model: str, home: Path, **more: Any) -> dict[str, Any]:
    return run({"model": model, "home": str(home), "evaluate": False, **more}, Told())


def names(home: Path) -> set[str]:
    return {path.name for path in (home / "models").iterdir() if not path.name.startswith(".")}


def test_a_format_is_a_folder_that_can_be_loaded(tiny: str, home: Path) -> None:
    told = Told()
    result = run({"model": tiny, "low_bit": ["sym_int4"], "home": str(home), "evaluate": False}, told)
    [model] = result["models"]
    assert (model["name"], model["format"], model["quality"]) == ("tiny-sym_int4", "sym_int4", None)
    assert model["folder"] == str(home / "models" / "tiny-sym_int4")
    weights = Path(model["folder"]) / "model.safetensors"
    assert 0 < model["bytes"] < weights.stat().st_size < model["from_bytes"]
    assert result["report"] is None
    stages = {stage for *_, stage in told.steps}
    assert stages == {"pack"} and told.steps[-1][0] == told.steps[-1][1] == 47
    assert AutoModelForCausalLM.load_low_bit(model["folder"]).config.quantization_config.low_bit == "sym_int4"


def test_a_name_whose_code_may_run_is_not_given_to_another_model(tiny: str, home: Path) -> None:
    config = home / "config.yaml"
    config.write_text("trust_remote_code: [t, tiny-nf4, t-fp4]\n")
    for low_bit, out in ((["nf4"], "t"), (["nf4"], ""), (["fp4", "nf4"], "t")):
        with pytest.raises(NibbleError, match="stands in trust_remote_code"):
            quantize(tiny, home, low_bit=low_bit, out=out, config=str(config))
    assert names(home) == {"tiny"}
    config.write_text("trust_remote_code: [tiny, t]\n")
    quantize(tiny, home, low_bit=["nf4"], out="t", config=str(config))
    assert names(home) == {"tiny", "t"}


def test_names(tiny: str, home: Path) -> None:
    quantize(tiny, home, low_bit=["nf4"], out="mine")
    quantize(tiny, home, low_bit=["nf4", "fp8", "nf4"], out="mine")
    quantize("guide", home, low_bit="sym_int8,asym_int4")
    expected = {"tiny", "mine", "mine-nf4", "mine-fp8_e5m2", "guide-sym_int8", "guide-asym_int4"}
    assert names(home) == expected
    assert publish.read_manifest(home / "models" / "guide-sym_int8")["source"] == "guide"


def test_an_earlier_model_is_replaced_whole_and_a_foreign_folder_is_not(tiny: str, home: Path) -> None:
    for low_bit in ("nf4", "sym_int8"):
        quantize(tiny, home, low_bit=[low_bit], out="mine")
        assert publish.read_manifest(home / "models" / "mine")["format"] == low_bit
    (home / "models" / "theirs").mkdir()
    (home / "models" / "theirs" / "letter.txt").write_text("dear")
    with pytest.raises(NibbleError, match="not replaced"):
        quantize(tiny, home, low_bit=["nf4"], out="theirs")
    with pytest.raises(NibbleError, match="its own low-bit form"):
        quantize(tiny, home, low_bit=["nf4"], out="tiny")
    assert (home / "models" / "theirs" / "letter.txt").read_text() == "dear"


def test_an_earlier_report_is_not_the_new_models(tiny: str, home: Path) -> None:
    (home / "reports").mkdir()
    for name in ("mine", "gone", "theirs"):
        (home / "reports" / f"{name}.json").write_text("{}")
    quantize(tiny, home, low_bit=["nf4"], out="gone")
    quantize(tiny, home, low_bit=["nf4"], out="mine")
    (home / "reports" / "mine.json").write_text("{}")
    quantize(tiny, home, low_bit=["sym_int8"], out="mine")
    (home / "models" / "theirs").mkdir()
    (home / "models" / "theirs" / "letter.txt").write_text("dear")
    with pytest.raises(NibbleError, match="not replaced"):
        quantize(tiny, home, low_bit=["nf4"], out="theirs")
    assert [file.name for file in (home / "reports").glob("*.json")] == ["theirs.json"]


def test_no_way_to_a_model_lets_it_be_replaced_by_its_own_low_bit_form(tiny: str, home: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(home)
    with pytest.raises(NibbleError, match="its own low-bit form"):
        quantize(str(tmp_path / "link" / "models" / tiny), home, low_bit=["nf4"], out=tiny, paths=True)
    file = home / "models" / "folder" / "one.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    with pytest.raises(NibbleError):
        quantize(str(file), home, low_bit=["nf4"], out="folder", paths=True)
    assert file.read_bytes() == b"GGUF"


def test_a_folder_whose_name_no_model_can_have_is_told_before_the_work(tiny: str, home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "models" / tiny, tmp_path / "My Model (1)")
    with pytest.raises(NibbleError, match="cannot be a model's name"):
        quantize(str(tmp_path / "My Model (1)"), home, low_bit=["nf4"], paths=True)


def test_mixed_bits(tiny: str, home: Path) -> None:
    [model] = quantize(tiny, home, low_bit=["sym_int4"], skip=["lm_head"], overrides={"down_proj": "fp8"})["models"]
    layers = dict(AutoModelForCausalLM.load_low_bit(model["folder"]).named_modules())
    assert type(layers["lm_head"]) is torch.nn.Linear
    down = layers["model.layers.2.mlp.down_proj"]
    assert isinstance(down, LowBitLinear) and down.format.name == "fp8_e5m2"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"model": "nothing"}, "no model 'nothing'"),
        ({"model": ""}, "No model is named"),
        ({"model": "../tiny"}, "no model"),
        ({"model": "/etc"}, "no model"),
        ({"model": "~/tiny.gguf"}, "no model"),
        ({"low_bit": ["sym_int3"]}, "sym_int3"),
        ({"low_bit": ["bf16"]}, "packs nothing"),
        ({"low_bit": []}, "holds no packed weights.*--low-bit"),
        ({"out": "guide"}, "'guide' cannot be"),
        ({"out": "../up"}, "cannot be a model's name"),
        ({"out": "a/b"}, "cannot be a model's name"),
        ({"out": ".hidden"}, "cannot be a model's name"),
        ({"overrides": {"lm_head": "int3"}}, "int3"),
        ({"pick": {"max_kl": 0.1}}, "Either a format"),
        ({"pick": {"max_kl": -1}, "low_bit": []}, "-1.0 nats"),
        ({"pick": {"max_lk": 1}, "low_bit": []}, "no setting 'max_lk'"),
        ({"token": "x"}, "no setting 'token'"),
        ({"trust_remote_code": True}, "no setting 'trust_remote_code'"),
    ],
)
def test_what_cannot_be_is_a_sentence(more: dict[str, Any], words: str, tiny: str, home: Path) -> None:
    with pytest.raises(NibbleError) as caught:
        quantize(**{"model": tiny, "home": home, "low_bit": ["nf4"], **more})
    assert re.search(words, str(caught.value))
    assert names(home) == {"tiny"}


def test_a_path_is_for_the_console_alone(stories: Path, home: Path) -> None:
    with pytest.raises(NibbleError, match="no model"):
        quantize(str(stories), home, low_bit=["nf4"])
    [model] = quantize(str(stories), home, low_bit=["nf4"], paths=True)["models"]
    assert model["name"] == "stories260K-hf-nf4"


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_gguf_keeps_what_it_has(place: str, stories: Path, home: Path, tmp_path: Path) -> None:
    """Its Q4_0 tensors as they are, by the file's path or by the name of a folder that holds it."""
    folder = home / "models" / "small" if place == "folder" else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    file = write_gguf(stories, folder / "stories.gguf", "Q4_0", (stories, ""))
    more = {"paths": True} if place == "file" else {}
    [model] = quantize(str(file) if more else "small", home, **more)["models"]
    assert model["name"] == ("stories-sym_int4" if more else "small-sym_int4") and model["format"] == "sym_int4"
    # Of each of the five layers all but down_proj, whose 172 columns are no whole blocks; and the head.
    assert model["kept"] == 5 * 6 + 1
    source, ours = open_source(file), AutoModelForCausalLM.load_low_bit(model["folder"])
    name = "model.layers.3.self_attn.q_proj"
    assert torch.equal(ours.get_submodule(name).weight, source.tensors[f"{name}.weight"].read().codes)
    assert type(ours.model.layers[0].mlp.down_proj) is torch.nn.Linear
    check(Path(model["folder"]))
    told = Told()
    spec = {"model": str(file), "low_bit": ["nf4"], "home": str(home), "evaluate": False, "paths": True}
    assert run(spec, told)["models"][0]["kept"] == 0
    assert "loses a second time" in told.notes[0]


def test_a_low_bit_model_is_not_packed_again(tiny: str, home: Path) -> None:
    quantize(tiny, home, low_bit=["nf4"])
    with pytest.raises(NibbleError, match="low-bit model already"):
        quantize("tiny-nf4", home, low_bit=["sym_int4"])


def test_a_model_on_a_hub_is_downloaded_first(stories: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(spec: dict[str, Any], report: Told) -> dict[str, Any]:
        asked.append(spec["repo"])
        report.progress(1, 2, "B", "downloading")
        shutil.copytree(stories, home / "models" / "org__stories")
        return {}

    monkeypatch.setattr(download, "run", fetch)
    told = Told()
    spec = {"model": "org/stories", "low_bit": ["nf4"], "home": str(home), "evaluate": False}
    [model] = run(spec, told)["models"]
    assert model["name"] == "org__stories-nf4"
    assert told.steps[0] == (1, 2, "B", "download")
    run(spec | {"low_bit": ["fp4"]}, Told())
    assert asked == ["org/stories"]


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "became full"), (errno.EIO, os.strerror(errno.EIO))])
def test_a_failing_disk_is_a_sentence(
    code: int, words: str, tiny: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(writer: Writer) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Writer, "finish", fail)
    with pytest.raises(NibbleError, match=words):
        quantize(tiny, home, low_bit=["nf4", "sym_int4"])
    assert names(home) == {"tiny"}


def test_a_folder_of_bigdl_keeps_its_form(tiny: str, home: Path) -> None:
    folder = home / "models" / tiny
    config = json.loads((folder / "config.json").read_text()) | {"bigdl_transformers_low_bit": "sym_int4"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(NibbleError, match="packing it again would lose twice"):
        quantize(tiny, home, low_bit=["nf4"])
    with pytest.raises(NibbleError, match="lacks|lack"):
        quantize(tiny, home)
    assert names(home) == {"tiny"}


def test_a_text_that_cannot_be_read_is_told_first(tiny: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(NibbleError, match="cannot be read"):
        quantize(tiny, home, low_bit=["nf4"], evaluate=True, text=str(tmp_path / "none.txt"), paths=True)
    assert names(home) == {"tiny"}


@pytest.mark.full
def test_what_was_lost_is_kept_with_each_model(tiny: str, home: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time, there was a little girl named Lily. She loved to play outside. " * 8)
    result = quantize(tiny, home, low_bit=["sym_int4", "sym_int8"], evaluate=True, text=str(text), paths=True)
    rows = {row["format"]: row for row in result["report"]["formats"]}
    assert 0 < rows["sym_int8"]["kl_mean"] < rows["sym_int4"]["kl_mean"]
    for model in result["models"]:
        assert model["quality"] == rows[model["format"]]
        assert publish.read_manifest(Path(model["folder"]))["quality"]["formats"] == [model["quality"]]
        assert kept(model["name"], home)["formats"] == [model["quality"]]
        publish.verify(Path(model["folder"]), contents=True)
    assert [row["format"] for row in kept(tiny, home)["formats"]] == ["sym_int4", "sym_int8"]


def test_formats_are_checked_before_a_download(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "run", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(FormatError):
        quantize("org/model", home, low_bit=["sym_int3"])


def test_what_is_picked_is_packed(tiny: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search itself is tried with the quality of models; here, what becomes of its proposal."""
    proposals = [
        Proposal("sym_int4", {"layers.1": "sym_int8"}, True, "It fits.", 0.01, 1, 1),
        Proposal("sym_int8", {}, False, "Nothing loses so little.", 0.2, 1, 1),
    ]
    asked = []
    monkeypatch.setattr(task, "pick", lambda folder, limits, *_: asked.append(limits) or proposals.pop(0))
    with pytest.raises(NibbleError, match="as it was measured"):
        quantize(tiny, home, pick={"memory_bytes": 10**9}, overrides={"lm_head": "sym_int8"})
    result = quantize(tiny, home, pick={"memory_bytes": 10**9})
    [model] = result["models"]
    config = json.loads((Path(model["folder"]) / "config.json").read_text())["quantization_config"]
    assert (model["name"], model["format"]) == ("tiny-picked", "sym_int4")
    assert config["overrides"] == [["layers.1", "sym_int8"]]
    assert result["pick"]["why"] == "It fits." and asked[0].memory_bytes == 10**9
    with pytest.raises(NibbleError, match="Nothing loses so little"):
        quantize(tiny, home, pick={"max_kl": 0.001})
    with pytest.raises(NibbleError, match="not in full precision"):
        quantize("tiny-picked", home, pick={"max_kl": 0.1})


@pytest.mark.full
@pytest.mark.timeout(900)
def test_pick_for_me(tiny: str, home: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time, there was a little girl named Lily. She loved to play outside. " * 8)
    result = quantize(tiny, home, pick={"max_kl": 0.2}, text=str(text), paths=True)
    assert result["pick"]["holds"] and result["pick"]["kl_mean"] <= 0.2
    assert result["models"][0]["format"] == result["pick"]["format"]
