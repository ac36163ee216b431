"""What a folder is, and what is wrong with it, told before anything is loaded."""

import errno
import json
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nibble import jobs, publish
from nibble.disk import disk_use
from nibble.errors import ModelError
from nibble.library import ModelCard, adapters, find, inspect, models
from nibble.removal import delete
from nibble.screen import check
from tests.support.hostile import edit

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(stories: Path, tmp_path: Path) -> Path:
    """A model that may be broken."""
    copy = tmp_path / "stories"
    shutil.copytree(stories, copy)
    return copy


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


BAD_NAMES = [
    f"{before}{core}{after}"
    for before in ("", "../", "/", "./", "models/../", "-", ".", "..", "\u202e", " ", "~", "$(id)", "%2e/", "\\", "\0")
    for core in ("", "..", "stories/..", "../models-evil", "models-evil/stories", "CON", "nul.txt", "a" * 300, "a b")
    for after in ("", "/", "\0", ";$(id)", "/../../..", "\n", "\u202e", "`id`", "*")
    if f"{before}{core}{after}" not in ("", "CON")
]  # fmt: skip


def test_no_name_leads_out_of_home(stories: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    for place in ("models", "models-evil", "adapters"):
        shutil.copytree(stories, home / place / "stories")
    shutil.copytree(stories, tmp_path / "a b")
    before = sorted(path for path in tmp_path.rglob("*"))
    names = [
        *BAD_NAMES,
        "",
        "CON",
        "con",
        "Nul",
        "com1.x",
        str(home / "models" / "stories"),
        "stories/",
        "st*",
        "x" * 129,
    ]
    assert len(names) >= 500
    for name in names:
        with pytest.raises(ModelError, match="There is no model"):
            find(name, home)
        with pytest.raises(ModelError, match="There is no model or adapter"):
            delete(name, home, loaded=())
    for name in ("x" * 5_000, "~nobody-of-that-name/x", "a\0b"):
        with pytest.raises(ModelError, match="There is no model or folder"):
            find(name, home, paths=True)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_deleting_is_whole_and_frees_what_it_says(stories: Path, tmp_path: Path) -> None:
    for place in ("models/one", "models/two", "adapters/one"):
        shutil.copytree(stories, tmp_path / place)
    size = sum(path.stat().st_size for path in stories.iterdir())
    used = disk_use(tmp_path)
    assert (used.models, used.adapters, used.runs, used.unfinished) == (2 * size, size, 0, 0)
    assert delete("one", tmp_path, loaded=["two"], kind="model") == size
    assert not (tmp_path / "models" / "one").exists()
    assert (tmp_path / "adapters" / "one").exists()
    assert delete("one", tmp_path, loaded=()) == size
    assert list((tmp_path / "adapters").glob("[!.]*")) == []
    with pytest.raises(ModelError, match="two is loaded"):
        delete("two", tmp_path, loaded=["two"])
    with pytest.raises(ModelError, match="guide is part of Nibble"):
        delete("guide", tmp_path, loaded=())
    assert disk_use(tmp_path).models == size


def test_what_a_save_or_a_job_uses_is_not_deleted(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "made-nf4", "made", "made-up"):
        shutil.copytree(stories, tmp_path / "models" / name)
    with publish.alone(tmp_path / "models" / "one"), pytest.raises(ModelError, match="being saved already"):
        delete("one", tmp_path, loaded=())
    job = jobs.start(
        "quantize", {"model": "one", "low_bit": ["nf4"], "out": "made", "home": str(tmp_path)}, home=tmp_path
    )
    try:
        lasting = replace(job, state="running")
        monkeypatch.setattr(jobs, "list_jobs", lambda home: [lasting])
        for name in ("one", "made", "made-nf4"):
            with pytest.raises(ModelError, match=job.id):
                delete(name, tmp_path, loaded=())
        assert delete("made-up", tmp_path, loaded=()) > 0
    finally:
        jobs.stop(job.id, tmp_path)
    monkeypatch.setattr(jobs, "list_jobs", lambda home: [replace(job, state="done")])
    assert delete("one", tmp_path, loaded=()) > 0


@pytest.mark.parametrize(
    ("task", "spec", "used", "free"),
    [
        ("quantize", {"model": "org/m", "low_bit": ["nf4"]}, ("org__m", "org__m-nf4"), ("org__m-fp4", "org", "m")),
        ("quantize", {"model": "https://hf.co/org/m", "low_bit": "fp8"}, ("org__m", "org__m-fp8_e5m2"), ("m",)),
        ("quantize", {"model": "{models}/a", "paths": True, "pick": {}}, ("a", "a-picked", "a-nf4"), ("b", "a-b")),
        ("quantize", {"model": "{models}/a/x.gguf", "paths": True, "out": "b"}, ("a", "b", "b-nf4"), ("x", "x-nf4")),
        ("evaluate", {"model": "a", "against": "b", "device": "cpu", "low_bit": ["nf4"]}, ("a", "b"), ("cpu", "nf4")),
        ("download", {"repo": "org/m"}, ("org__m",), ("m",)),
        ("download", {"repo": "org/m", "file": "q/x.gguf"}, ("org__x",), ("org__m",)),
        ("download", {"repo": "org/m", "name": "b"}, ("b",), ("org__m",)),
        ("finetune", {"model": "a", "out": "b"}, ("a",), ("b",)),
    ],
    ids=str,
)
def test_what_a_job_reads_and_makes_is_not_deleted_and_no_more(
    task: str, spec: dict, used: tuple, free: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "models"
    for name in (*used, *free):
        (root / name).mkdir(parents=True)
    told = {key: value.format(models=root) if isinstance(value, str) else value for key, value in spec.items()}
    job = SimpleNamespace(id="the-job", task=task, spec=told, live=True)
    monkeypatch.setattr(jobs, "list_jobs", lambda home: [job])
    for name in used:
        with pytest.raises(ModelError, match="the-job"):
            delete(name, tmp_path, loaded=())
    for name in free:
        delete(name, tmp_path, loaded=())
    assert {path.name for path in root.glob("[!.]*")} == set(used)


def test_what_a_low_bit_model_was_made_from_is_not_deleted_while_they_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("dense", "dense-nf4"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "models" / "dense-nf4" / "nibble.json").write_text('{"source": "dense"}')
    job = SimpleNamespace(id="the-job", task="evaluate", spec={"model": "dense-nf4"}, live=True)
    monkeypatch.setattr(jobs, "list_jobs", lambda home: [job])
    with pytest.raises(ModelError, match="the-job"):
        delete("dense", tmp_path, loaded=())


@pytest.mark.parametrize("task", ["merge", "compare"])
def test_an_adapter_and_its_base_are_not_deleted_while_it_is_merged_or_compared(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("models/dense", "models/dense-nf4", "models/other", "adapters/worn", "adapters/rest"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "models" / "dense-nf4" / "nibble.json").write_text('{"source": "dense"}')
    (tmp_path / "adapters" / "worn" / "nibble.json").write_text('{"base": {"name": "dense-nf4"}}')
    job = SimpleNamespace(id="the-job", task=task, spec={"adapter": "worn"}, live=True)
    monkeypatch.setattr(jobs, "list_jobs", lambda home: [job])
    for name in ("dense", "dense-nf4", "worn"):
        with pytest.raises(ModelError, match="the-job"):
            delete(name, tmp_path, loaded=())
    for name in ("other", "rest"):
        delete(name, tmp_path, loaded=())


def test_an_adapter_is_not_deleted_while_it_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapters" / "made").mkdir(parents=True)
    job = SimpleNamespace(id="the-job", task="finetune", spec={"model": "a", "out": "made"}, live=True)
    monkeypatch.setattr(jobs, "list_jobs", lambda home: [job])
    with pytest.raises(ModelError, match="the-job"):
        delete("made", tmp_path, loaded=())


def test_a_model_and_an_adapter_of_one_name_are_told_apart(stories: Path, tmp_path: Path) -> None:
    for place in ("models/one", "adapters/one", "adapters/guide"):
        shutil.copytree(stories, tmp_path / place)
    for name in ("one", "guide"):
        with pytest.raises(ModelError, match=f"Both a model and an adapter are called {name}"):
            delete(name, tmp_path, loaded=())
        assert delete(name, tmp_path, loaded=[name], kind="adapter") > 0
        with pytest.raises(ModelError, match=f"There is no adapter '{name}'"):
            delete(name, tmp_path, loaded=(), kind="adapter")
    assert (tmp_path / "models" / "one").is_dir()
    with pytest.raises(ModelError, match="no kind 'folder'"):
        delete("one", tmp_path, loaded=(), kind="folder")
    with pytest.raises(ModelError, match="The guide is part of Nibble"):
        delete("guide", tmp_path, loaded=(), kind="model")


def test_a_report_goes_with_its_model_alone(stories: Path, tmp_path: Path) -> None:
    for place in ("models/one", "adapters/one"):
        shutil.copytree(stories, tmp_path / place)
    report = tmp_path / "reports" / "one.json"
    report.parent.mkdir()
    report.write_text("{}")
    delete("one", tmp_path, loaded=(), kind="adapter")
    assert report.exists()
    delete("one", tmp_path, loaded=())
    assert not report.exists()


def test_a_source_with_code_that_is_trusted_is_one(stories: Path, tmp_path: Path) -> None:
    config = tmp_path / "models" / "awq" / "config.json"
    shutil.copytree(stories, config.parent)
    edit(config, quantization_config={"quant_method": "awq", "bits": 4}, auto_map={"AutoConfig": "x.Config"})
    (refused,) = (card for card in models(tmp_path) if card.name == "awq")
    (source,) = (card for card in models(tmp_path, trusted=["awq"]) if card.name == "awq")
    assert "trust_remote_code" in refused.problem
    assert (source.kind, source.problem) == ("source", "")


def test_a_folder_that_cannot_be_read_carries_its_problem(stories: Path, tmp_path: Path) -> None:
    shutil.copytree(stories, tmp_path / "models" / "one")

    def judge(folder: Path, name: str) -> ModelCard:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    assert {card.name: card.problem.partition(".")[0] for card in models(tmp_path, judge)} == {
        name: f"{name} cannot be read: Permission denied" for name in ("guide", "one")
    }


def test_a_link_is_deleted_and_what_it_leads_to_stays(stories: Path, tmp_path: Path) -> None:
    shutil.copytree(stories, tmp_path / "elsewhere")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "linked").symlink_to(tmp_path / "elsewhere")
    assert [card.name for card in models(tmp_path) if card.loadable] == ["guide", "linked"]
    assert delete("linked", tmp_path, loaded=()) == 0
    assert not (tmp_path / "models" / "linked").is_symlink()
    check(tmp_path / "elsewhere")


@pytest.mark.parametrize("failing", ["rename", "_sync"])
def test_a_delete_that_fails_leaves_the_model_as_it_was(
    failing: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    folder.rename(tmp_path / "models" / "stories")
    place, real = (Path, Path.rename) if failing == "rename" else (publish, publish._sync)
    failures = iter([True])

    def fails(*arguments: object) -> object:
        if next(failures, False):
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)  # type: ignore[operator]

    monkeypatch.setattr(place, failing, fails)
    with pytest.raises(ModelError, match="stories cannot be deleted: Input/output error"):
        delete("stories", tmp_path, loaded=())
    check(tmp_path / "models" / "stories")


def test_a_delete_that_was_killed_is_finished_at_the_next_start(stories: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    shutil.copytree(stories, root / "stories")
    code = (
        "import os, shutil, sys; from pathlib import Path; from nibble import publish\n"
        "shutil.rmtree = lambda *a, **k: os.kill(os.getpid(), 9)\n"
        "publish.remove(Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root / "stories")], cwd=ROOT)
    assert done.returncode == -9
    assert [card.name for card in models(tmp_path)] == ["guide"]
    assert disk_use(tmp_path).unfinished > 0
    publish.clean_all(root)
    assert disk_use(tmp_path).unfinished == 0


def test_kinds_of_folders_are_told_apart(stories: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    for name in ("awq", "bigdl", "plain", "other"):
        shutil.copytree(stories, root / name)
    edit(root / "awq" / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    edit(root / "bigdl" / "config.json", bigdl_transformers_low_bit="sym_int4")
    (root / "bigdl" / "model.safetensors").rename(root / "bigdl" / "pytorch_model.bin")
    edit(root / "other" / "config.json", quantization_config={"quant_method": "eetq"})
    (root / "gguf").mkdir()
    (root / "gguf" / "m-q4_0.gguf").write_bytes(b"GGUF" + bytes(96))
    for leftover in (".plain.tmp-1", ".got.part", ".plain.lock"):
        (root / leftover).mkdir()
    cards = {card.name: card for card in models(tmp_path)}
    assert cards.keys() == {"guide", "awq", "bigdl", "gguf", "other", "plain"}
    assert {name: card.kind for name, card in cards.items() if not card.problem} == {
        "guide": "model", "plain": "model", "awq": "source", "bigdl": "source", "gguf": "source",
    }  # fmt: skip
    assert {name: cards[name].format for name in ("awq", "bigdl", "gguf")} == {
        "awq": "awq", "bigdl": "sym_int4", "gguf": "gguf",
    }  # fmt: skip
    for name in ("awq", "bigdl", "gguf"):
        assert f"nibble quantize {name}" in cards[name].note
        assert cards[name].size_bytes > 0
        assert not cards[name].loadable
    assert "eetq" in cards["other"].problem
    assert (cards["guide"].template, cards["plain"].template) == ("tokenizer", "")


def test_adapters_are_listed_with_their_base(stories: Path, tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    for name in ("mine", "evil", "bare"):
        (root / name).mkdir(parents=True)
        shutil.copy(stories / "model.safetensors", root / name / "adapter_model.safetensors")
    edit(root / "mine" / "adapter_config.json", peft_type="LORA", base_model_name_or_path="guide", r=8)
    edit(root / "evil" / "adapter_config.json", peft_type="LORA", auto_mapping={"parent_library": "evil"})
    cards = {card.name: card for card in adapters(tmp_path)}
    mine = cards["mine"]
    assert (mine.kind, mine.base, mine.format, mine.parameters, mine.problem) == (
        "adapter",
        "guide",
        "LORA",
        260_032,
        "",
    )
    assert "foreign module" in cards["evil"].problem
    assert {card.kind for card in cards.values()} == {"adapter"}
    assert "adapter_config.json" in cards["bare"].problem
    assert adapters(tmp_path / "nowhere") == []


def test_a_manifest_that_lies_is_broken(folder: Path) -> None:
    for files in (
        {"../../x": {"size": 1, "sha256": ""}},
        {"/etc/passwd": {"size": 1, "sha256": ""}},
        {"a": 5},
        {"a": {}},
    ):
        (folder / "nibble.json").write_text(json.dumps({"files": files}))
        with pytest.raises(ModelError, match=r"nibble\.json in stories is broken"):
            publish.read_manifest(folder)
    (folder / "nibble.json").write_bytes(b"[" * 100_000)
    with pytest.raises(ModelError, match=r"nibble\.json in stories is broken"):
        inspect(folder)
