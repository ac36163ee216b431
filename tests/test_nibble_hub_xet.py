"""Xet, by which Hugging Face moves large files: used where it can be reached, and never in the way where it cannot."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nibble.screen import check
from tests.support.downloads import REPO, Told, fetch, surroundings, tree
from tests.support.hubs import Fault, Hubs

pytestmark = pytest.mark.full

pytest.importorskip("hf_xet", reason="hf_xet has no build for this machine")

SHARD = "model-00002-of-00002.safetensors"
HASTE = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}


@pytest.fixture
def official(hubs: Hubs, monkeypatch: pytest.MonkeyPatch) -> Hubs:
    """The hub on this machine in the place of huggingface.co, and offering large files by Xet."""
    for name, value in HASTE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_ENDPOINT")
    for module in ("huggingface", "downloads"):
        monkeypatch.setattr(f"nibble.hub.{module}.OFFICIAL", hubs.url)
    hubs.xet = hubs.url
    return hubs


def test_large_files_come_by_xet(official: Hubs, home: Path) -> None:
    told = Told()
    folder = fetch(home, "huggingface", told)
    check(folder)
    assert (folder / SHARD).read_bytes() == (official.root / REPO / SHARD).read_bytes()
    assert official.count("GET /xorb/") == 3 and not official.count("GET /lfs/")
    steps = [step[0] for step in told.steps if step[3] == "downloading"]
    assert steps == sorted(steps) and steps[-1] == told.steps[0][1]


def test_a_mirror_is_not_asked_for_them(hubs: Hubs, home: Path) -> None:
    hubs.xet = hubs.url
    check(fetch(home, "huggingface"))
    assert not hubs.count("/xorb/|/reconstructions/|xet-read-token")


@pytest.mark.parametrize(
    ("address", "fault"),
    [
        ("http://127.0.0.1:9", None),
        ("", Fault("/reconstructions/", status=500)),
        ("", Fault("/reconstructions/", status=404)),
        ("", Fault("GET /xorb/", status=403)),
        ("", Fault("GET /xorb/", cut_at=1000)),
        ("", Fault("GET /xorb/", flip=3)),
    ],
    ids=["nobody", "fault", "unknown", "refused", "cut", "malformed"],
)
def test_where_xet_fails_the_plain_way_takes_over(
    official: Hubs, home: Path, address: str, fault: Fault | None
) -> None:
    official.xet = address or official.url
    official.faults += [fault] if fault else []
    told = Told()
    check(fetch(home, "huggingface", told))
    assert official.count("GET /lfs/.*safetensors") == 2
    assert told.steps[-1][:2] == (told.steps[-1][1], told.steps[-1][1])
    last = [step for step in told.steps if step[3] == "downloading"][-1]
    assert last[0] == last[1]


def test_bytes_that_xet_got_wrong_are_found(official: Hubs, home: Path) -> None:
    official.faults.append(Fault("GET /xorb/", flip=500))
    with pytest.raises(Exception, match="corrupted"):
        fetch(home, "huggingface")
    official.heal()
    check(fetch(home, "huggingface"))


def test_ctrl_c_does_not_wait_for_xet(official: Hubs, tmp_path: Path) -> None:
    official.faults.append(Fault("GET /xorb/", pause=0.2))
    code = (
        "from nibble.hub import huggingface, downloads\n"
        f"huggingface.OFFICIAL = downloads.OFFICIAL = {official.url!r}\n"
        "from tests.support.downloads import Told, fetch\n"
        f"from pathlib import Path\nfetch(Path({str(tmp_path / 'home')!r}), 'huggingface')"
    )
    environment = {"PATH": "/usr/bin:/bin", **surroundings(tmp_path, official), **HASTE}
    del environment["HF_ENDPOINT"]
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 60
    while official.sent[SHARD] < 8000 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert 0 < official.sent[SHARD] < (official.root / REPO / SHARD).stat().st_size
    assert SHARD not in tree(tmp_path / "home")
