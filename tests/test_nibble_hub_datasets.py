"""Data sets from both hubs: which files are chosen, that they arrive whole or not at all, and how they are named."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nibble.config import Settings
from nibble.data import check, rows, store
from nibble.errors import DataError
from nibble.hub import DownloadError, Listing, RemoteFile, Request, download
from nibble.hub.datasets import choose_data
from nibble.tasks.download import request_from, run
from tests.support.downloads import BOTH, Told, surroundings
from tests.support.hubs import Fault, Hubs

ROOT = Path(__file__).parents[1]
REPO = "org/set"
CANARY = "hf_CANARYCANARY"


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


FILES = {
    "README.md": b"# A data set",
    ".gitattributes": b"*.parquet lfs",
    "dataset_infos.json": b"{}",
    "set.py": b"raise SystemExit",
    "data/train-00000-of-00002.jsonl": lines(*(f"first {n}" for n in range(2000))),
    "data/train-00001-of-00002.jsonl": lines("second"),
    "data/test-00000-of-00001.jsonl": lines("never"),
}


def write(hubs: Hubs, repo: str, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = hubs.root / "datasets" / repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.fixture
def sets(hubs: Hubs) -> Hubs:
    write(hubs, REPO, FILES)
    return hubs


def fetch(home: Path, hub: str, **wishes: str) -> Path:
    return download(Request(**{"repo": REPO, **wishes}, hubs=(hub,), kind="dataset"), Told(), home)


@pytest.mark.parametrize("hub", BOTH)
def test_the_training_split_arrives_joined_and_nothing_else(sets: Hubs, hub: str, home: Path) -> None:
    folder = fetch(home, hub)
    assert folder == home / "data" / "org__set" == store.find(REPO, home)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == {"nibble.json", "data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"}
    texts = [row.text for row in rows(folder)]
    assert texts == [f"first {n}" for n in range(2000)] + ["second"] and check(folder).ok
    assert store.names(home)[-1] == REPO and not list((home / "data").glob(".*.part"))
    assert not sets.count(r"set\.py|test-00000|README")


@pytest.mark.parametrize("hub", BOTH)
@pytest.mark.parametrize("cut", [0, 1, 30_000])
def test_a_cut_leaves_no_data_set_and_the_next_try_has_it(sets: Hubs, hub: str, cut: int, home: Path) -> None:
    sets.faults.append(Fault(r"GET .*train-00000", cut_at=cut))
    with pytest.raises(DownloadError) as told:
        fetch(home, hub)
    assert "start it again" in str(told.value)
    assert store.names(home)[-1] != REPO
    with pytest.raises(DataError, match="not here yet"):
        store.find(REPO, home)
    sets.heal()
    assert len(list(rows(fetch(home, hub)))) == 2001


@pytest.mark.parametrize("hub", BOTH)
def test_a_set_that_is_here_stays_while_a_new_one_fails(sets: Hubs, hub: str, home: Path) -> None:
    fetch(home, hub)
    write(sets, REPO, {"data/train-00001-of-00002.jsonl": lines("changed", "twice")})
    sets.faults.append(Fault(r"GET .*train-00001", cut_at=3))
    with pytest.raises(DownloadError):
        fetch(home, hub)
    assert [row.text for row in rows(store.find(REPO, home))][-1] == "second"
    sets.heal()
    assert [row.text for row in rows(fetch(home, hub))][-1] == "twice"
    assert not sets.count("GET .*(resolve|FilePath).*train-00000")  # its bytes were here


@pytest.mark.parametrize(
    ("status", "headers", "says"),
    [
        (401, {}, "no data set org/set"),
        (403, {}, "refuses org/set"),
        (404, {}, "no data set org/set"),
        (429, {"Retry-After": "30"}, "in 30 s"),
        (503, {}, "a fault of its own"),
    ],
)
@pytest.mark.parametrize("hub", BOTH)
def test_a_refusal_is_one_sentence(sets: Hubs, hub: str, home: Path, status: int, headers: dict, says: str) -> None:
    sets.faults.append(Fault("datasets/", status=status, headers=headers))
    with pytest.raises(DownloadError) as told:
        fetch(home, hub)
    if not (hub == "modelscope" and status == 401):
        assert says in str(told.value)
    assert str(told.value).count("\n") == 0 and told.value.__cause__ is None


def test_a_gated_set_s_page_is_named(sets: Hubs, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets.faults.append(Fault("datasets/", status=403, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": CANARY}))
    with pytest.raises(DownloadError) as told:
        fetch(home, "huggingface")
    assert "https://huggingface.co/datasets/org/set" in told.value.hint and CANARY not in str(told.value)


@pytest.mark.parametrize("hub", BOTH)
def test_a_token_opens_a_private_set_and_is_sent_to_the_hub_alone(
    sets: Hubs, hub: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets.token = CANARY
    with pytest.raises(DownloadError, match="no data set"):
        fetch(home, hub)
    monkeypatch.setenv("HF_TOKEN" if hub == "huggingface" else "MODELSCOPE_API_TOKEN", CANARY)
    assert check(fetch(home, hub)).ok
    assert all(CANARY not in path.read_text() for path in (home / "data").rglob("*") if path.is_file())
    assert {host for host, _ in sets.credentials} == {sets.url.removeprefix("http://")}


def test_a_full_disk_is_said_before_anything_is_fetched(
    sets: Hubs, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nibble.hub.downloads.SPARE_BYTES", 2**60)
    with pytest.raises(DownloadError, match="more, and the disk of"):
        fetch(home, "huggingface")
    assert not sets.count("train-00000")


def test_no_network_is_one_sentence(home: Path, monkeypatch: pytest.MonkeyPatch, hubs: Hubs) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="failed or was cut"):
        fetch(home, "huggingface")


def test_a_model_s_name_is_not_a_data_set_s(sets: Hubs, home: Path) -> None:
    with pytest.raises(DownloadError, match="no data set org/tiny"):
        fetch(home, "huggingface", repo="org/tiny")
    for wrong in ({"repo": "squad"}, {"name": "mine"}, {"repo": "../x"}, {"repo": "org/.."}):
        with pytest.raises(DownloadError):
            fetch(home, "huggingface", **wrong)


def test_a_trusted_model_s_name_is_no_matter(sets: Hubs) -> None:
    settings = Settings(trust_remote_code=("org__set",))
    request = request_from({"repo": REPO, "dataset": True}, settings)
    assert request.kind == "dataset" and not request.code


@pytest.mark.parametrize(
    ("address", "hub"),
    [
        ("https://huggingface.co/datasets/org/set", "huggingface"),
        ("https://huggingface.co/datasets/org/set/tree/main", "huggingface"),
        ("https://hf-mirror.com/datasets/org/set?x=1", "hf-mirror"),
        ("https://modelscope.cn/datasets/org/set", "modelscope"),
    ],
)
def test_the_address_of_its_page_says_that_it_is_a_data_set(address: str, hub: str) -> None:
    request = request_from({"repo": address}, Settings())
    assert (request.repo, request.hubs, request.kind) == (REPO, (hub,), "dataset")


def test_training_fetches_what_it_names_once(
    sets: Hubs, home: Path, guide_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nibble.tasks import finetune
    from nibble.training import session

    monkeypatch.setattr(session, "run", lambda order, *_, **__: {"rows": len(list(rows(order.data)))})
    spec = {"data": REPO, "dry_run": True, "home": str(home), "device": "cpu"}
    assert finetune.run(spec, Told()) == {"rows": 2001}
    assert store.names(home)[-1] == REPO and sets.lines
    sets.heal()
    with pytest.raises(DataError, match="no data set 'nothing'"):
        finetune.run({**spec, "data": "nothing"}, Told())
    with pytest.raises(DownloadError, match="no data set org/other"):
        finetune.run({**spec, "data": "org/other"}, Told())
    assert not sets.count("org/set")


def test_the_task_imports_no_torch_and_the_console_says_how_to_go_on(sets: Hubs, tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", **surroundings(tmp_path, sets), "NIBBLE_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-X", "importtime", "-m", "nibble", "download", REPO, "--dataset"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"python -m nibble finetune --data {REPO}" in done.stdout
    assert not [line for line in done.stderr.splitlines() if line.endswith((" torch", " transformers"))]


def test_a_spec_is_all_it_takes(sets: Hubs, home: Path) -> None:
    done = run({"repo": REPO, "dataset": True, "hub": "huggingface", "home": str(home), "resume": True}, Told())
    assert done["name"] == REPO and done["folder"] == str(store.hub_folder(REPO, home)) and done["bytes"] > 1000


# Which files.

CHOICES: dict[str, tuple[list[str], list[str]]] = {
    "one file": (["README.md", "alpaca.json"], ["alpaca.json"]),
    "parquet before json": (["data/train.parquet", "train.jsonl", "test.jsonl"], ["data/train.parquet"]),
    "not the script's": (["x.py", "train.csv", "dev.csv"], ["train.csv"]),
    "by number": ([f"train-{n}.parquet" for n in (10, 9, 1)], [f"train-{n}.parquet" for n in (1, 9, 10)]),
    "main among subsets": (
        ["main/train-0-of-1.parquet", "main/test-0-of-1.parquet", "socratic/train-0-of-1.parquet"],
        ["main/train-0-of-1.parquet"],
    ),
    "folders of splits": (["train/0.csv", "train/1.csv", "test/0.csv"], ["train/0.csv", "train/1.csv"]),
    "converted": (["default/train/0000.parquet", "default/test/0000.parquet"], ["default/train/0000.parquet"]),
    "the plain name": (["train.jsonl", "train_socratic.jsonl", "test.jsonl"], ["train.jsonl"]),
    "no split": (["part1.jsonl", "part2.jsonl"], ["part1.jsonl", "part2.jsonl"]),
    "latest is not a test": (["latest.json"], ["latest.json"]),
    "other letters": (["数据/训练.jsonl"], ["数据/训练.jsonl"]),
    "tables": (["train.tsv"], ["train.tsv"]),
}  # fmt: skip


def listing(paths: list[str]) -> Listing:
    return Listing("huggingface", REPO, "main", "", tuple(RemoteFile(path, 1) for path in paths))


@pytest.mark.parametrize("case", CHOICES)
def test_the_files_to_train_on(case: str) -> None:
    paths, chosen = CHOICES[case]
    assert [file.path for file in choose_data(listing(paths)).files] == chosen


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        (["a.json", "b.json"], "2 files that may each be meant.*a.json, b.json"),
        (["en/train.parquet", "fr/train.parquet"], "2 subsets.*en, fr"),
        (["test.jsonl"], "no split to train on"),
        (["x.py"], "never run.*refs/convert/parquet"),
        (["data.tar.gz"], "only in archives"),
        (["README.md", "model.safetensors"], "no data file"),
        (["../train.jsonl", ".hidden/train.jsonl", "/train.jsonl", "a/../../train.jsonl"], "no data file"),
    ],
)
def test_where_a_person_must_choose_they_are_asked(paths: list[str], says: str) -> None:
    with pytest.raises(DownloadError) as told:
        choose_data(listing(paths))
    assert re.search(says, str(told.value))


def test_a_file_or_folder_that_is_named_is_taken() -> None:
    both = listing(["en/train.parquet", "en/test.parquet", "fr/a.parquet", "fr/b.parquet", "x.json"])
    assert [file.path for file in choose_data(both, "en").files] == ["en/train.parquet"]
    assert [file.path for file in choose_data(both, "fr/").files] == ["fr/a.parquet", "fr/b.parquet"]
    assert [file.path for file in choose_data(both, "x.json").files] == ["x.json"]
    with pytest.raises(DownloadError, match="no data file or folder"):
        choose_data(both, "de")
