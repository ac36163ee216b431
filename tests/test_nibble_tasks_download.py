"""The task and the command `download`."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nibble import jobs
from nibble.config import Settings
from nibble.errors import NibbleError
from nibble.screen import check
from nibble.tasks.download import request_from, run
from tests.support.downloads import BOTH, REPO, Told, surroundings, tree
from tests.support.hubs import Fault, Hubs

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[1]
CANARY = "hf_CANARYCANARY"


@pytest.mark.parametrize("hub", BOTH)
def test_a_spec_is_all_it_takes(hubs: Hubs, hub: str, home: Path) -> None:
    done = run({"repo": REPO, "hub": hub, "name": "mine", "resume": True}, Told())
    assert done["name"] == "mine" and done["folder"] == str(home / "models" / "mine")
    assert done["bytes"] == sum(len(content) for content in tree(home / "models" / "mine").values())
    check(home / "models" / "mine")


@pytest.mark.parametrize("key", ["token", "trust_remote_code", "trusted", "endpoint"])
def test_a_spec_cannot_say_more_than_what_to_fetch(hubs: Hubs, key: str) -> None:
    with pytest.raises(NibbleError, match=f"no setting '{key}'"):
        run({"repo": REPO, key: "x"}, Told())
    assert not hubs.lines


def test_settings_say_the_hubs_and_whose_code_may_run() -> None:
    settings = Settings(hubs=("modelscope", "hf-mirror"), trust_remote_code=("org__tiny",))
    assert request_from({"repo": REPO}, settings).hubs == ("modelscope", "hf-mirror")
    assert request_from({"repo": REPO, "hub": "huggingface"}, settings).hubs == ("huggingface",)
    assert request_from({"repo": REPO}, settings).trusted == ("org__tiny",)


@pytest.mark.parametrize(
    ("repo", "name"), [("evil/x", "t"), ("evil/x", "org__tiny"), ("org__a/b", ""), ("org/x", "org__tiny")]
)
def test_a_trusted_name_is_for_its_own_repository_alone(hubs: Hubs, home: Path, repo: str, name: str) -> None:
    settings = Settings(trust_remote_code=("t", "org__tiny", "org__a__b"))
    with pytest.raises(NibbleError, match="stands in trust_remote_code"):
        request_from({"repo": repo, "name": name}, settings)
    assert request_from({"repo": "org/tiny", "name": name and "org__tiny"}, settings).code
    assert request_from({"repo": "org/a__b"}, settings).code
    assert not request_from({"repo": "evil/x"}, settings).code
    config = home / "mine.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text("trust_remote_code: [t, org__tiny, org__a__b]\n")
    with pytest.raises(NibbleError, match="stands in trust_remote_code"):
        run({"repo": repo, "name": name, "config": str(config)}, Told())
    assert not hubs.lines


@pytest.mark.parametrize(
    ("address", "repo", "hub", "revision"),
    [
        ("https://huggingface.co/Qwen/Qwen2-1.5B", "Qwen/Qwen2-1.5B", "huggingface", ""),
        ("https://huggingface.co/Qwen/Qwen2-1.5B/tree/main", "Qwen/Qwen2-1.5B", "huggingface", "main"),
        ("https://huggingface.co/Qwen/Qwen2-1.5B?library=x#top", "Qwen/Qwen2-1.5B", "huggingface", ""),
        (" https://hf-mirror.com/a/b/ ", "a/b", "hf-mirror", ""),
        ("https://www.modelscope.cn/models/a/b", "a/b", "modelscope", ""),
        ("https://modelscope.cn/models/a/b/", "a/b", "modelscope", ""),
    ],
)
def test_the_address_of_a_page_will_do(address: str, repo: str, hub: str, revision: str) -> None:
    request = request_from({"repo": address}, Settings())
    assert (request.repo, request.hubs, request.revision) == (repo, (hub,), revision)


def test_a_hub_that_is_asked_for_must_be_one_of_ours() -> None:
    """An address may stand in the settings only: else a visitor could send the server anywhere."""
    for hub in ("http://10.0.0.1", "https://evil.test", "elsewhere"):
        with pytest.raises(NibbleError, match="no hub"):
            request_from({"repo": REPO, "hub": hub}, Settings())
    assert request_from({"repo": REPO}, Settings(hubs=("https://mirror.test",))).hubs == ("https://mirror.test",)


@pytest.mark.parametrize("address", ["https://evil.test/a/b", "https://huggingface.co.evil.test/a/b", "file:///a/b"])
def test_another_address_will_not(address: str) -> None:
    with pytest.raises(NibbleError, match="not a model on a hub"):
        request_from({"repo": address}, Settings())


@pytest.mark.parametrize("hub", BOTH)
def test_a_download_imports_no_torch_and_shows_no_bars(hubs: Hubs, hub: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom nibble.tasks.download import run\nfrom tests.support.downloads import Told\n"
        f"run({{'repo': {REPO!r}, 'hub': {hub!r}, 'home': {str(tmp_path / 'home')!r}}}, Told())\n"
        "print(*sorted({'torch', 'transformers', 'gradio'} & sys.modules.keys()))"
    )
    environment = {"PATH": "/usr/bin:/bin", **surroundings(tmp_path, hubs)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def console(hubs: Hubs, folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = {"PATH": "/usr/bin:/bin", **surroundings(folder, hubs), "NIBBLE_HOME": str(folder / "home")}
    command = [sys.executable, "-m", "nibble", "download", *words]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def test_the_console_downloads_and_says_how_to_go_on(hubs: Hubs, tmp_path: Path) -> None:
    done = console(hubs, tmp_path, REPO)
    assert done.returncode == 0, done.stderr
    assert "python -m nibble ask --model org__tiny" in done.stdout
    assert "100 %" in done.stderr and "downloading" in done.stderr
    check(tmp_path / "home" / "models" / "org__tiny")
    again = console(hubs, tmp_path, REPO, "--hub", "modelscope", "--revision", "v1", "--name", "two")
    assert again.returncode == 0 and "--model two" in again.stdout and hubs.count("Revision=v1")


def test_the_console_says_in_a_line_what_was_wrong(hubs: Hubs, tmp_path: Path) -> None:
    hubs.faults.append(Fault("/api/models", status=500))
    done = console(hubs, tmp_path, REPO)
    assert done.returncode == 1 and "HTTP 500" in done.stderr and "Traceback" not in done.stderr
    assert console(hubs, tmp_path, REPO, "--hub", "elsewhere").returncode == 2
    assert console(hubs, tmp_path, "../x").returncode == 1


@pytest.mark.parametrize("hub", BOTH)
def test_a_detached_download_is_stopped_and_goes_on(
    hubs: Hubs, hub: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", CANARY)
    shard = "model-00002-of-00002.safetensors"
    hubs.faults.append(Fault(f"GET /lfs/.*{shard}", pause=0.1))
    job = jobs.start("download", {"repo": REPO, "hub": hub, "home": str(home)}, home=home)
    wait(lambda: hubs.sent[shard] > 10_000 or not jobs.find(job.id, home).live)
    assert jobs.stop(job.id, home).state == "stopped"
    assert not (home / "models" / "org__tiny").exists()
    hubs.heal()
    jobs.resume(job.id, home)
    wait(lambda: not jobs.find(job.id, home).live)
    assert jobs.find(job.id, home).state == "done"
    check(home / "models" / "org__tiny")
    assert "config.json" not in hubs.sent
    assert hubs.credentials and not [name for name, text in tree(home).items() if CANARY.encode() in text]


def wait(condition: Callable[[], bool]) -> None:
    """Until it holds; a minute at most."""
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()
