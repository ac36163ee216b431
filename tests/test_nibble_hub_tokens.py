"""A token reaches its hub and nothing else: no log, no file, no status, no exception, no other host."""

import base64
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from nibble.hub import DownloadError, Request, download
from tests.support.downloads import BOTH, REPO, Told, fetch, surroundings, tree
from tests.support.hubs import Fault, Hubs

pytestmark = pytest.mark.full

CANARY = "hf_CANARY+p9/Zq==x7"
VARIABLE = {"huggingface": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}


def forms(secret: str) -> list[bytes]:
    """A secret as it is, in a URL, reversed, in hex, and in base64 at any of its three offsets."""
    plain = secret.encode()
    encoded = [base64.b64encode(b"x" * shift + plain + b"xxx")[4:-8] for shift in range(3)]
    return [plain, quote(secret, safe="").encode(), plain[::-1], plain.hex().encode(), *encoded]


def found(secret: str, contents: dict[str, bytes]) -> list[str]:
    """Where a secret stands."""
    return [name for name, content in contents.items() if any(form in content for form in forms(secret))]


def test_the_search_itself_finds_every_form() -> None:
    raw = CANARY.encode()
    for shift, before in itertools.product((0, 1, 2), (b"", b"Bearer ")):
        assert found(CANARY, {"x": base64.b64encode(b"y" * shift + before + raw + b"tail")})
    assert found(CANARY, {"x": b"?token=" + quote(CANARY, safe="").encode()})
    assert not found(CANARY, {"x": b"hf_CANARY"})


FAULTS = {
    "none": [],
    "cut": [Fault("/lfs/", cut_at=100)],
    "refused": [Fault("safetensors", status=401, headers={"X-Error-Message": f"Invalid {CANARY}"})],
    "gated": [Fault("api", status=403, headers={"X-Error-Code": "GatedRepo"}, body=f'"{CANARY}"'.encode())],
    "broken": [Fault("json", status=500, body=f'{{"Message": "Bearer {CANARY}", "Data": "{CANARY}"}}'.encode())],
    "elsewhere": [Fault("safetensors", status=302, headers={"Location": f"http://localhost:9/?token={CANARY}"})],
    "teapot": [Fault("config", status=418, headers={"X-Request-Id": CANARY}, body=CANARY.encode())],
    "html": [Fault(".", status=200, headers={"Content-Length": "19"}, body=CANARY.encode())],
}
"""What a hub may do, hostile ones that say the token back among them."""


EVERY_FAULT = """
import logging, pathlib, sys, time, traceback
from nibble.tasks.download import run
from tests.support.downloads import REPO, Told
logging.basicConfig(level=logging.DEBUG)
time.sleep = lambda _: None
hub, home, *names = sys.argv[1:]
for name in names:
    sys.stdin.readline()
    told = Told()
    try:
        print(run({"repo": REPO, "hub": hub, "home": home, "name": name}, told))
    except Exception:
        traceback.print_exc()
    print("end of", name, told, flush=True)
    pathlib.Path(home, f"{name}.done").touch()
"""


@pytest.mark.parametrize("hub", BOTH)
def test_no_byte_written_holds_the_token(hubs: Hubs, hub: str, tmp_path: Path) -> None:
    """One process goes through every fault, with the libraries' logs at their loudest and tracebacks printed."""
    environment = {
        "PATH": os.environ["PATH"], **surroundings(tmp_path, hubs), VARIABLE[hub]: CANARY, "HF_DEBUG": "1",
        "HF_HUB_VERBOSITY": "debug", "MODELSCOPE_LOG_LEVEL": "DEBUG", "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0",
        "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
    }  # fmt: skip
    hubs.token = CANARY
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", EVERY_FAULT, hub, str(tmp_path / "home"), *FAULTS], env=environment, text=True,
            cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=out, stderr=err,
        )  # fmt: skip
        assert process.stdin
        for name, faults in FAULTS.items():
            hubs.faults = list(faults)
            process.stdin.write("go\n")
            process.stdin.flush()
            while not (tmp_path / "home" / f"{name}.done").exists() and process.poll() is None:
                time.sleep(0.01)
        process.stdin.close()
        assert process.wait() == 0, (tmp_path / "err").read_text()
    written = {name: text for name, text in tree(tmp_path).items() if not name.startswith("root/")}
    output = written["out"].decode() + written["err"].decode()
    assert "'name': 'none'" in output and output.count("Traceback") == len(FAULTS) - 1, output
    assert found(CANARY, written) == []
    # It did reach the hub, and only the hub: the host of large files never sees it.
    hosts = {host for host, credential in hubs.credentials if CANARY in credential}
    assert hosts == {hubs.url.removeprefix("http://")}


@pytest.mark.parametrize("hub", BOTH)
def test_a_file_that_only_its_owner_can_read_holds_it_too(
    hubs: Hubs, hub: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = home / "tokens" / hub
    file.parent.mkdir(parents=True)
    hubs.token = CANARY
    file.write_text(CANARY + "\n")
    for mode in (0o644, 0o640, 0o604, 0o660):
        file.chmod(mode)
        with pytest.raises(DownloadError, match="others can read") as told:
            fetch(home, hub)
        assert f"chmod 600 {file}" in told.value.hint and CANARY not in str(told.value)
        assert not hubs.lines
    file.chmod(0o600)
    fetch(home, hub)
    monkeypatch.setenv(VARIABLE[hub], "another")
    with pytest.raises(DownloadError, match="does not accept"):
        fetch(home, hub, name="again")


@pytest.mark.parametrize("text", ["", " \n", "two words", "ünïcode"])
def test_a_file_without_a_token_is_told(hubs: Hubs, home: Path, text: str) -> None:
    file = home / "tokens" / "huggingface"
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="utf-8")
    file.chmod(0o600)
    with pytest.raises(DownloadError, match="does not hold a token"):
        fetch(home, "huggingface")


def test_a_mirror_from_the_list_never_sees_the_token(hubs: Hubs, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    download(Request(REPO, hubs=(hubs.url,)), Told(), home)
    assert hubs.lines and not hubs.credentials
    # HF_ENDPOINT is the person's own word that the token is meant for that address.
    download(Request(REPO, hubs=("huggingface",), name="two"), Told(), home)
    assert hubs.credentials
