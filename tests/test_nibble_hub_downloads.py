"""Downloads from both hubs, through their own libraries, against a server that speaks as they do."""

import errno
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from nibble.errors import ModelError
from nibble.hub import DownloadError, Request, default_name, download, plan
from nibble.hub.part import SOURCE_FILE, alone
from nibble.library import models
from nibble.publish import MANIFEST, publication, read_manifest, verify
from nibble.screen import check
from tests.support.downloads import BOTH, REPO, Told, fetch, surroundings, tree
from tests.support.hubs import Fault, Hubs
from tests.support.tiny import WANTED, write_model

pytestmark = pytest.mark.full

SHARD = "model-00002-of-00002.safetensors"


def stands(home: Path) -> list[str]:
    """What is in home/models but for locks."""
    return sorted(path.name for path in (home / "models").iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("hub", BOTH)
def test_a_model_arrives_whole_and_nothing_else_does(hubs: Hubs, hub: str, home: Path) -> None:
    told = Told()
    folder = fetch(home, hub, told)
    assert folder == home / "models" / "org__tiny"
    original = tree(hubs.root / REPO)
    assert {name: content for name, content in tree(folder).items() if name != MANIFEST} == {
        name: original[name] for name in WANTED
    }
    assert stands(home) == ["org__tiny"]
    verify(folder, contents=True)
    facts = read_manifest(folder)
    assert (facts["source"], facts["hub"], set(facts["files"])) == (REPO, hub, set(WANTED))
    assert hubs.sent == {name: len(original[name]) for name in WANTED}
    check(folder)
    assert [card.name for card in models(home) if not card.problem][-1] == "org__tiny"
    total = sum(len(original[name]) for name in WANTED)
    weights = sum(len(original[name]) for name in WANTED if name.endswith(".safetensors"))
    for stage, size in (("downloading", total), ("checking", weights)):
        steps = [step for step in told.steps if step[3] == stage]
        assert [step[0] for step in steps] == sorted(step[0] for step in steps)
        assert steps[-1] == (size, size, "B", stage)


def test_an_earlier_report_is_not_the_new_models(hubs: Hubs, home: Path) -> None:
    report = home / "reports" / "org__tiny.json"
    report.parent.mkdir(parents=True)
    report.write_text("{}")
    fetch(home, BOTH[0], Told())
    assert not report.exists()


@pytest.mark.parametrize("hub", BOTH)
def test_twenty_cuts_on_each_hub_and_every_next_try_completes(hubs: Hubs, hub: str, home: Path) -> None:
    sizes = {name: len(content) for name, content in tree(hubs.root / REPO).items() if name in WANTED}
    cuts = [(SHARD, sizes[SHARD] * n // 12) for n in range(12)] + [(SHARD, 1), (SHARD, 8), (SHARD, sizes[SHARD] - 1)]
    cuts += [("tokenizer.json", 0), ("tokenizer.json", 5000), ("config.json", 3), ("tokenizer.model", 2999)]
    cuts += [("model-00001-of-00002.safetensors", 60_000)]
    for number, (file, offset) in enumerate(cuts):
        name = f"cut{number}"
        hubs.heal()
        hubs.faults.append(Fault(f"GET .*{file}", cut_at=offset, reset=bool(number % 2)))
        with pytest.raises(DownloadError, match="failed or was cut"):
            fetch(home, hub, name=name)
        assert not (home / "models" / name).exists()
        part = tree(home / "models" / f".{name}.part")
        whole = {path for path, size in sizes.items() if len(part.get(path, b"")) == size}
        begun = len(part.get(f"{file}.incomplete", b""))
        assert file not in whole
        hubs.heal()
        folder = fetch(home, hub, name=name)
        assert set(tree(folder)) == {*WANTED, MANIFEST}
        assert all((folder / path).read_bytes() == (hubs.root / REPO / path).read_bytes() for path in WANTED)
        # What was whole is not asked for again; ModelScope's library goes on inside the broken file.
        assert not whole & set(hubs.sent)
        assert hubs.sent[file] == sizes[file] - begun
        if hub == "modelscope" and not number % 2:
            assert begun == offset
    assert stands(home) == [f"cut{number}" for number in sorted(range(len(cuts)), key=str)]


@pytest.mark.parametrize("hub", BOTH)
def test_a_cut_that_heals_is_not_even_noticed(
    hubs: Hubs, hub: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_RETRY_TIMES", 1)
    # huggingface_hub goes on inside a file within one call, after the last whole chunk.
    monkeypatch.setattr("nibble.hub.huggingface.CHUNK_BYTES", 10_000)
    hubs.faults.append(Fault(f"GET /lfs/.*{SHARD}", cut_at=50_000, times=1))
    told = Told()
    check(fetch(home, hub, told))
    assert hubs.sent[SHARD] == (hubs.root / REPO / SHARD).stat().st_size
    assert all(done <= total for done, total, _, _ in told.steps)


@pytest.mark.parametrize("hub", BOTH)
def test_killed_at_once_and_taken_up_again(hubs: Hubs, hub: str, home: Path, tmp_path: Path) -> None:
    hubs.faults.append(Fault(f"GET /lfs/.*{SHARD}", pause=0.05))
    code = f"from nibble.tasks.download import run\nfrom tests.support.downloads import Told\nrun({{'repo': {REPO!r}, 'hub': {hub!r}, 'home': {str(home)!r}}}, Told())"  # noqa: E501
    environment = {"PATH": "/usr/bin:/bin", **surroundings(tmp_path, hubs)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 60
    while hubs.sent[SHARD] < 20_000 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    part = tree(home / "models" / ".org__tiny.part")
    assert "config.json" in part and SHARD not in part
    hubs.heal()
    folder = fetch(home, hub)
    check(folder)
    assert set(tree(folder)) == {*WANTED, MANIFEST}
    assert "config.json" not in hubs.sent


@pytest.mark.parametrize("hub", BOTH)
def test_a_second_download_takes_over_what_is_the_same(hubs: Hubs, hub: str, home: Path) -> None:
    folder = fetch(home, hub)
    hubs.heal()
    (hubs.root / REPO / "generation_config.json").write_bytes(b'{"do_sample": true}')
    fetch(home, hub)
    assert set(hubs.sent) == {"generation_config.json"}
    assert json.loads((folder / "generation_config.json").read_bytes()) == {"do_sample": True}


def test_what_one_hub_began_the_other_ends_by_the_hashes(hubs: Hubs, home: Path) -> None:
    hubs.faults.append(Fault(f"GET .*{SHARD}", cut_at=1000))
    with pytest.raises(DownloadError):
        fetch(home, "modelscope")
    whole = set(tree(home / "models" / ".org__tiny.part")) - {SOURCE_FILE}
    hubs.heal()
    check(fetch(home, "huggingface"))
    assert "config.json" not in whole or not hubs.sent["tokenizer.model"]
    assert hubs.sent[SHARD] == (hubs.root / REPO / SHARD).stat().st_size


@pytest.mark.parametrize("hub", BOTH)
def test_an_existing_model_is_replaced_whole_or_stays(hubs: Hubs, hub: str, home: Path) -> None:
    old = home / "models" / "org__tiny"
    with publication(old, {}) as fresh:
        (fresh / "config.json").write_text('{"model_type": "old"}')
    before = tree(old)
    hubs.faults.append(Fault(f"GET .*{SHARD}", cut_at=1000))
    (hubs.root / REPO / SHARD).write_bytes((hubs.root / REPO / SHARD).read_bytes()[:-1] + b"?")
    with pytest.raises(DownloadError):
        fetch(home, hub)
    assert tree(old) == before
    hubs.heal()
    fetch(home, hub)
    assert set(tree(old)) == {*WANTED, MANIFEST}
    assert stands(home) == ["org__tiny"]


def test_a_folder_put_there_by_hand_is_not_replaced(hubs: Hubs, home: Path) -> None:
    own = write_model(home / "models" / "org__tiny")
    before = tree(own)
    with pytest.raises(DownloadError, match="not put there by Nibble"):
        fetch(home, "huggingface")
    assert tree(own) == before and not hubs.lines


@pytest.mark.parametrize("hub", BOTH)
def test_a_revision_is_passed_on_and_an_unknown_one_is_told(hubs: Hubs, hub: str, home: Path) -> None:
    fetch(home, hub, revision="v1")
    assert hubs.count("v1")
    with pytest.raises(DownloadError, match="no revision 'v9'"):
        fetch(home, hub, revision="v9", name="other")


@pytest.mark.parametrize("hub", BOTH)
def test_bytes_that_changed_on_the_way_are_found_and_fetched_again(hubs: Hubs, hub: str, home: Path) -> None:
    hubs.faults.append(Fault(f"GET .*{SHARD}", flip=60_000))
    with pytest.raises(DownloadError, match="corrupted"):
        fetch(home, hub)
    assert not (home / "models" / "org__tiny").exists()
    hubs.heal()
    check(fetch(home, hub))
    assert set(hubs.sent) == {SHARD}


@pytest.mark.parametrize("file", ["config.json", "chat_template.jinja"])
def test_a_changed_small_file_is_found_too(hubs: Hubs, home: Path, file: str) -> None:
    hubs.faults.append(Fault(f"GET .*{file}", flip=1))
    with pytest.raises((DownloadError, ModelError)):
        fetch(home, "huggingface")
    assert not (home / "models" / "org__tiny").exists()
    hubs.heal()
    check(fetch(home, "huggingface"))


@pytest.mark.parametrize("hub", BOTH)
@pytest.mark.parametrize(
    ("listed", "fault"), [(50_000, None), (500_000, None), (None, Fault(f"GET .*{SHARD}", extra=9))]
)
def test_a_wrong_size_is_told(hubs: Hubs, hub: str, home: Path, listed: int | None, fault: Fault | None) -> None:
    hubs.listed |= {SHARD: listed} if listed else {}
    hubs.faults += [fault] if fault else []
    with pytest.raises(DownloadError, match=r"another size|instead of|HTTP 416"):
        fetch(home, hub)
    assert not (home / "models" / "org__tiny").exists()
    hubs.heal()
    hubs.listed.clear()
    check(fetch(home, hub))


def test_without_hashes_a_broken_header_does_not_stay(hubs: Hubs, home: Path) -> None:
    hubs.hidden_hashes = True
    hubs.faults.append(Fault(f"GET .*{SHARD}", flip=1))
    with pytest.raises(ModelError, match="broken"):
        fetch(home, "modelscope")
    hubs.heal()
    check(fetch(home, "modelscope"))


@pytest.mark.parametrize("hub", BOTH)
def test_too_small_a_disk_is_told_before_anything_is_fetched(
    hubs: Hubs, hub: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=200_000))
    assert not plan(Request(REPO, hubs=(hub,)), home, Told()).fits
    with pytest.raises(DownloadError, match=r"needs 0\.3 MB more, and the disk of .* has 0\.2 MB free"):
        fetch(home, hub)
    assert not hubs.sent


@pytest.mark.parametrize("hub", BOTH)
@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "cannot be written")])
def test_a_disk_that_fills_up_meanwhile_is_told(
    hubs: Hubs, hub: str, home: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    real_open = io.open

    def full(file: object, mode: str = "r", *rest: object, **options: object) -> object:
        stream = real_open(file, mode, *rest, **options)  # type: ignore[call-overload]
        if "incomplete" in str(file) and ("w" in mode or "a" in mode):

            def write(_: bytes) -> int:
                raise OSError(number, "no", str(file))

            return type("Full", (), {
                "write": staticmethod(write), "__enter__": lambda self: self, "tell": lambda self: 0,
                "__exit__": lambda self, *_: stream.close(), "flush": lambda self: None,
            })()  # fmt: skip
        return stream

    with monkeypatch.context() as patch:
        patch.setattr("io.open", full)
        patch.setattr("builtins.open", full)
        with pytest.raises(DownloadError, match=words):
            fetch(home, hub)
    check(fetch(home, hub))


@pytest.mark.parametrize("hub", BOTH)
def test_paths_in_the_list_cannot_leave_the_folder(hubs: Hubs, hub: str, home: Path, tmp_path: Path) -> None:
    hubs.more = [
        "../evil.json", "../../../evil.safetensors", "/tmp/evil.json", "a/../../evil.txt",
        "additional_chat_templates/../../evil.jinja",
        ".hidden.json", "~/evil.json", "..\\evil.json", "CON.json/../evil.json", "model.safetensors/../../evil.json",
    ]  # fmt: skip
    check(fetch(home, hub))
    assert not list(tmp_path.rglob("*evil*")) and not Path("/tmp/evil.json").exists()


@pytest.mark.parametrize("hub", BOTH)
def test_a_model_that_would_run_code_is_refused_before_its_weights_come(hubs: Hubs, hub: str, home: Path) -> None:
    config = hubs.root / REPO / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModel": "modeling_own.M"}}))
    with pytest.raises(ModelError, match="^org__tiny wants to run Python code of its own") as told:
        fetch(home, hub)
    assert "trust_remote_code: [org__tiny]" in told.value.hint
    assert not [name for name in hubs.sent if name.endswith(".safetensors")]
    trusting = Request(REPO, hubs=(hub,), trusted=("org__tiny",))
    assert "modeling_own.py" in tree(download(trusting, Told(), home))


@pytest.mark.parametrize("hub", BOTH)
def test_gguf_files_are_taken_one_by_one(hubs: Hubs, hub: str, home: Path) -> None:
    repo = hubs.root / "org" / "some-GGUF"
    for name in ("m-q4_0.gguf", "m-q8_0.gguf", "big/m-00001-of-00002.gguf", "big/m-00002-of-00002.gguf"):
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_bytes(b"GGUF" + name.encode())
    with pytest.raises(DownloadError, match="GGUF files only") as told:
        fetch(home, hub, repo="org/some-GGUF")
    assert "m-q4_0.gguf" in told.value.hint
    with pytest.raises(DownloadError, match=r"no file m-q2\.gguf"):
        fetch(home, hub, repo="org/some-GGUF", file="m-q2.gguf")
    one = fetch(home, hub, repo="org/some-GGUF", file="m-q4_0.gguf")
    assert (one.name, set(tree(one))) == ("org__m-q4_0", {"m-q4_0.gguf", MANIFEST})
    split = fetch(home, hub, repo="org/some-GGUF", file="big/m-00001-of-00002.gguf", name="split")
    assert set(tree(split)) == {"m-00001-of-00002.gguf", "m-00002-of-00002.gguf", MANIFEST}
    for wrong in ("../m.gguf", "m.bin", "/etc/passwd.gguf", "a/../../b.gguf"):
        with pytest.raises(DownloadError, match="not the name of a GGUF file"):
            fetch(home, hub, repo="org/some-GGUF", file=wrong, name="x")


@pytest.mark.parametrize("hub", BOTH)
def test_pickles_alone_are_refused(hubs: Hubs, hub: str, home: Path) -> None:
    for path in (hubs.root / REPO).glob("*.safetensors"):
        path.unlink()
    with pytest.raises(DownloadError, match="only as pickles"):
        fetch(home, hub)
    assert not hubs.sent


def test_a_second_process_is_refused_meanwhile(hubs: Hubs, home: Path) -> None:
    (home / "models").mkdir(parents=True)
    with alone(home / "models", "org__tiny"), pytest.raises(DownloadError, match="being downloaded already"):
        fetch(home, "huggingface")
    check(fetch(home, "huggingface"))


@pytest.mark.parametrize("hub", BOTH)
def test_the_hubs_own_cache_spares_the_way(hubs: Hubs, hub: str, home: Path) -> None:
    if hub == "huggingface":
        from huggingface_hub import constants, snapshot_download

        snapshot_download(REPO, endpoint=hubs.url, cache_dir=constants.HF_HUB_CACHE, allow_patterns=["*.safetensors"])
    else:
        from modelscope_hub import HubApi, HubConfig

        HubApi(config=HubConfig()).download_repo(REPO, "model", allow_patterns=["*.safetensors"], revision="master")
    hubs.heal()
    check(fetch(home, hub))
    assert not [name for name in hubs.sent if name.endswith(".safetensors")]
    assert hubs.sent["config.json"]


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"repo": "../etc"}, "not a model on a hub"),
        ({"repo": "a/b/c"}, "not a model on a hub"),
        ({"repo": "-x/y"}, "not a model on a hub"),
        ({"repo": "a/b..c"}, "not a model on a hub"),
        ({"repo": ""}, "not a model on a hub"),
        ({"repo": "https://huggingface.co/org/tiny"}, "not a model on a hub"),
        ({"repo": REPO, "revision": "../x"}, "not a revision"),
        ({"repo": REPO, "revision": "--upload-pack"}, "not a revision"),
        ({"repo": REPO, "name": "../x"}, "cannot be the name"),
        ({"repo": REPO, "name": ".x"}, "cannot be the name"),
        ({"repo": REPO, "name": "guide"}, "cannot be the name"),
        ({"repo": "guide"}, "cannot be the name"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(wishes: dict[str, str], words: str) -> None:
    with pytest.raises(DownloadError, match=words):
        Request(**wishes)


def test_default_names() -> None:
    assert default_name("Qwen/Qwen2-1.5B-Instruct") == "Qwen__Qwen2-1.5B-Instruct"
    assert default_name("gpt2") == "gpt2"
    assert default_name("Qwen/Qwen2-GGUF", "sub/qwen2-q4_0.gguf") == "Qwen__qwen2-q4_0"
