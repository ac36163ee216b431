"""What goes wrong at a hub is one sentence and what to do; the next hub is asked only where that may help."""

import json
from pathlib import Path

import pytest

from nibble.hub import DownloadError, HubUnavailable, Request, download, plan
from tests.support.downloads import BOTH, REPO, Told, fetch, tree
from tests.support.hubs import Fault, Hubs

pytestmark = pytest.mark.full

NOWHERE = "http://127.0.0.1:9"
"""Nobody listens on the discard port."""
GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model org/tiny is restricted"}
LISTING = {"huggingface": "GET /api/models/", "modelscope": "GET /api/v1/models/.*repo/files"}
FILE = {"huggingface": "(HEAD|GET) /org/tiny/resolve", "modelscope": "GET /api/v1/models/.*FilePath"}


@pytest.mark.parametrize("hub", BOTH)
@pytest.mark.parametrize("where", [LISTING, FILE], ids=["listing", "file"])
@pytest.mark.parametrize(
    ("status", "words", "elsewhere"),
    [
        (403, "refuses", False),
        (404, "There is no model org/tiny", False),
        (418, "HTTP 418", False),
        (429, "no more requests", True),
        (500, "HTTP 500", True),
        (503, "HTTP 503", True),
    ],
)
def test_every_status_is_a_sentence(
    hubs: Hubs, hub: str, where: dict[str, str], status: int, words: str, elsewhere: bool, home: Path
) -> None:
    hubs.faults.append(Fault(where[hub], status=status, body=b'{"Message": "secret-of-the-server"}'))
    with pytest.raises(DownloadError, match=words) as told:
        fetch(home, hub)
    assert isinstance(told.value, HubUnavailable) == elsewhere
    assert told.value.hint and "secret-of-the-server" not in str(told.value)
    assert not list((home / "models").glob("[!.]*"))
    hubs.heal()
    fetch(home, hub)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("where", [LISTING, FILE], ids=["listing", "file"])
def test_a_gated_model_says_where_to_accept_its_terms(
    hubs: Hubs, status: int, where: dict[str, str], home: Path
) -> None:
    hubs.faults.append(Fault(where["huggingface"], status=status, headers=GATED))
    with pytest.raises(DownloadError, match="is gated") as told:
        fetch(home, "huggingface")
    assert "https://huggingface.co/org/tiny" in told.value.hint and "HF_TOKEN" in told.value.hint


@pytest.mark.parametrize("hub", BOTH)
def test_a_private_model_and_a_wrong_token(hubs: Hubs, hub: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = {"huggingface": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}[hub]
    hubs.token = "the-right-one"
    with pytest.raises(DownloadError, match="or it is private") as told:
        fetch(home, hub)
    assert variable in told.value.hint
    monkeypatch.setenv(variable, "a-wrong-one")
    with pytest.raises(DownloadError, match="does not accept the token"):
        fetch(home, hub)
    monkeypatch.setenv(variable, "the-right-one")
    fetch(home, hub)


@pytest.mark.parametrize("hub", BOTH)
@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"Retry-After": "37"}, "in 37 s"),
        ({"Retry-After": "3600"}, "in 60 minutes"),
        ({"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}, "in some minutes"),
        ({"Retry-After": "soon"}, "in some minutes"),
        ({}, "in some minutes"),
    ],
)
def test_too_many_requests_says_when_to_come_back(
    hubs: Hubs, hub: str, headers: dict[str, str], words: str, home: Path
) -> None:
    hubs.faults.append(Fault(LISTING[hub], status=429, headers=headers))
    with pytest.raises(HubUnavailable) as told:
        fetch(home, hub)
    assert words in told.value.hint


def test_hugging_faces_own_limit_header(hubs: Hubs, home: Path) -> None:
    hubs.faults.append(Fault(LISTING["huggingface"], status=429, headers={"RateLimit": '"api";r=0;t=55'}))
    with pytest.raises(HubUnavailable, match="come back in 55 s"):
        fetch(home, "huggingface")


@pytest.mark.parametrize("hub", BOTH)
@pytest.mark.parametrize(
    ("address", "words"),
    [(NOWHERE, "failed or was cut"), ("http://no-such-host.invalid", "cannot be looked up")],
)
def test_no_network_and_no_name(
    hubs: Hubs, hub: str, address: str, words: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", address)
    with pytest.raises(HubUnavailable, match=words):
        fetch(home, hub)


@pytest.mark.parametrize("hub", BOTH)
def test_a_login_page_in_between(hubs: Hubs, hub: str, home: Path) -> None:
    page = Fault(".", status=200, headers={"Content-Type": "text/html"}, body=b"<html>Log in to HotelNet</html>")
    hubs.faults.append(page)
    page.headers["Content-Length"] = str(len(page.body))
    with pytest.raises(HubUnavailable, match="does not speak its language"):
        fetch(home, hub)


@pytest.mark.parametrize("hub", BOTH)
def test_an_answer_of_another_shape(hubs: Hubs, hub: str, home: Path) -> None:
    for value in ([], {}, {"sha": 1}, {"Data": {"Files": [1]}}, {"siblings": [{}]}, None, "x"):
        body = json.dumps(value).encode()
        hubs.faults = [Fault(".", status=200, body=body, headers={"Content-Length": str(len(body))})]
        with pytest.raises(DownloadError) as told:
            fetch(home, hub)
        assert told.value.hint


def test_switched_off(hubs: Hubs, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
        fetch(home, "huggingface")
    assert not hubs.lines


@pytest.mark.parametrize("hub", BOTH)
def test_a_file_that_is_listed_and_not_there(hubs: Hubs, hub: str, home: Path) -> None:
    hubs.more = ["added_tokens.json"]
    with pytest.raises(DownloadError, match=r"is not there|There is no model"):
        fetch(home, hub)


def test_the_next_hub_is_asked_where_one_cannot_answer(hubs: Hubs, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    told = Told()
    folder = download(Request(REPO, hubs=("huggingface", hubs.url, "modelscope")), told, home)
    assert "config.json" in tree(folder)
    assert hubs.count("/api/models/") and not hubs.count("/api/v1/")
    assert "failed or was cut" in told.notes[0] and told.notes[0].endswith(f"Trying {hubs.url}.")
    assert plan(Request(REPO, hubs=("huggingface", "modelscope")), home, told).hub == "ModelScope"


@pytest.mark.parametrize("kind", ["cut", "server"])
def test_the_next_hub_goes_on_where_one_breaks_off(hubs: Hubs, kind: str, home: Path) -> None:
    shard = "model-00002-of-00002.safetensors"
    # One try and the five more that huggingface_hub makes.
    cut = Fault(f"GET /lfs/.*{shard}", cut_at=10, times=6)
    hubs.faults.append(cut if kind == "cut" else Fault(f"HEAD .*{shard}", status=500))
    told = Told()
    folder = download(Request(REPO, hubs=("huggingface", "modelscope")), told, home)
    assert {path for path in tree(folder) if path.endswith(".safetensors")} == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip
    assert len(told.notes) == 3
    assert hubs.sent["tokenizer.json"] == len(tree(folder)["tokenizer.json"])


def test_the_next_hub_is_not_asked_for_what_the_first_refuses(hubs: Hubs, home: Path) -> None:
    """The same name on another hub may be somebody else's."""
    with pytest.raises(DownloadError, match="There is no model org/other on 127"):
        download(Request("org/other", hubs=("huggingface", "modelscope")), Told(), home)
    assert not hubs.count("/api/v1/") and not list((home / "models").iterdir())


def test_an_unknown_hub_is_named(home: Path) -> None:
    with pytest.raises(DownloadError, match="no hub 'ftp://x'") as told:
        download(Request(REPO, hubs=("ftp://x",)), Told(), home)
    assert "modelscope" in told.value.hint
