"""Root paths as people paste them, and who passes the guard."""

import asyncio
import logging

import pytest

from nibble.config import Settings
from nibble.errors import ConfigError
from nibble.hosting import Address, Doorkeeper, Guard, check_binding, dsw_advice, find_dsw, parse_root_path

DSW = "https://dsw-gateway.example.com"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("", Address()),
        ("/", Address()),
        ("/dsw-123/proxy/7860", Address("/dsw-123/proxy/7860")),
        ("/dsw-123/proxy/7860/", Address("/dsw-123/proxy/7860")),
        ("dsw-123/proxy/7860/", Address("/dsw-123/proxy/7860")),
        (f"{DSW}/dsw-123/proxy/7860/?__theme=dark#x", Address("/dsw-123/proxy/7860", DSW)),
        (f"{DSW}/dsw-123/lab/tree/notes.ipynb?token=1", Address("/dsw-123/proxy/7860", DSW)),
        ("/dsw-123/", Address("/dsw-123/proxy/7860")),
        ("HTTPS://Example.COM/a/", Address("/a", "https://example.com")),
        ("http://user:secret@127.0.0.1:9000/a", Address("/a", "http://127.0.0.1:9000")),
    ],
)
def test_root_path_forms(text: str, address: Address) -> None:
    assert parse_root_path(text, 7860) == address


@pytest.mark.parametrize("text", ["ftp://host/a", "/a b", "/a/../b", "http://", "/<script>"])
def test_root_path_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(ConfigError, match="root_path"):
        parse_root_path(text, 7860)


PUBLIC = Settings(root_path=f"{DSW}/dsw-1/proxy/7860", public_origins=("https://friend.example",))


@pytest.mark.parametrize(
    ("host", "origin", "passes"),
    [
        ("127.0.0.1:7860", None, True),
        ("localhost:7860", "http://localhost:7860", True),
        ("[::1]:7860", None, True),
        ("127.0.0.1:9000", "http://127.0.0.1:9000", True),
        ("dsw-gateway.example.com", DSW, True),
        ("127.0.0.1:7860", DSW, True),
        ("127.0.0.1:7860", "https://friend.example", True),
        ("friend.example", None, True),
        ("127.0.0.1:7860", "https://evil.example", False),
        ("127.0.0.1:7860", "null", False),
        ("127.0.0.1:7860", "http://localhost:3000", False),
        ("evil.example", None, False),
        ("evil.example", "http://evil.example", False),
        ("192.168.1.7:7860", None, False),
        ("", None, False),
    ],
)
def test_who_passes(host: str, origin: str | None, passes: bool) -> None:
    reason = Doorkeeper.for_settings(PUBLIC).refusal(host, origin)
    assert (reason == "") is passes
    assert passes or ("root_path" in reason and "public_origins" in reason and "\n" not in reason)


def test_a_server_for_the_local_network_takes_plain_addresses_but_no_foreign_names() -> None:
    keeper = Doorkeeper.for_settings(Settings(host="0.0.0.0", auth="me:secret"))
    assert keeper.refusal("192.168.1.7:7860", "http://192.168.1.7:7860") == ""
    assert keeper.refusal("rebind.example:7860", None)
    assert keeper.refusal("192.168.1.7:7860", "https://evil.example")


def call(guard: Guard, path: str = "/", **headers: str) -> tuple[int, dict[str, str], str]:
    """One GET through the guard: status, headers, body."""
    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    async def receive() -> dict:
        return {"type": "http.request"}

    pairs = [(key.replace("_", "-").encode(), value.encode()) for key, value in headers.items()]
    scope = {"type": "http", "method": "GET", "path": path, "headers": pairs}
    asyncio.run(guard(scope, receive, send))
    fields = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
    return sent[0]["status"], fields, sent[1]["body"].decode()


async def echo(scope: dict, receive: object, send: object) -> None:
    """Answers with the path and the forwarded host that the application saw."""
    forwarded = dict(scope["headers"]).get(b"x-forwarded-host", b"none")
    await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": scope["path"].encode() + b" " + forwarded})  # type: ignore[operator]


def test_the_guard_strips_the_prefix_once_and_forgets_forwarded_hosts() -> None:
    guard = Guard(echo, PUBLIC)
    host = "127.0.0.1:7860"
    assert call(guard, "/dsw-1/proxy/7860/config", host=host)[2] == "/config none"
    assert call(guard, "/dsw-1/proxy/7860", host=host)[2] == "/ none"
    assert call(guard, "/config", host=host, x_forwarded_host="evil.example")[2] == "/config none"
    assert call(guard, "/dsw-1/proxy/78601", host=host)[2] == "/dsw-1/proxy/78601 none"


def test_every_reply_is_dressed_and_a_refusal_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(echo, Settings())
    status, headers, _ = call(guard, host="localhost")
    assert status == 200
    assert "connect-src 'self'" in headers["content-security-policy"]
    with caplog.at_level(logging.WARNING):
        status, headers, body = call(guard, host="localhost", origin="https://evil.example")
    assert status == 403
    assert "public_origins" in body
    assert "access-control-allow-origin" not in headers
    assert "https://evil.example" in caplog.text
    assert call(guard, "/gradio_api/openapi.json", host="localhost")[0] == 404


def test_binding_elsewhere_needs_a_password_or_an_open_door() -> None:
    check_binding(Settings())
    check_binding(Settings(host="0.0.0.0", auth="a:b"))
    check_binding(Settings(host="0.0.0.0", public=True))
    with pytest.raises(ConfigError, match="auth"):
        check_binding(Settings(host="0.0.0.0"))


def test_dsw_is_found_and_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    assert find_dsw({"PWD": "/mnt/workspace", "JUPYTER_URL": "/dsw-4711/lab"}) == "dsw-4711"
    assert find_dsw({"MY_TOKEN": "dsw-1"}) == ""
    assert "--root-path" in dsw_advice(Settings(), "dsw-4711")
    assert f"{DSW}/dsw-1/proxy/7860/" in dsw_advice(PUBLIC, "dsw-1")
