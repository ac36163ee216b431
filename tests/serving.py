"""The page and a proxy before it, each served from a thread of the test's own process."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import uvicorn

from app import build_server
from nibble.config import Settings
from tests.scripted import ScriptedHost


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(application: Any, port: int) -> Iterator[str]:
    """Serve an ASGI application; yields its address."""
    config = uvicorn.Config(application, port=port, log_config=None, ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@contextlib.contextmanager
def page(home: Any, host: ScriptedHost | None = None, **settings: Any) -> Iterator[str]:
    """The page with a scripted host; yields its address."""
    port = settings.pop("port", 0) or free_port()
    with running(build_server(Settings(port=port, home=str(home), **settings), host or ScriptedHost()), port) as url:
        yield url


class Proxy:
    """A reverse proxy that serves an address under a prefix, as ModelScope DSW and jupyter-server-proxy do."""

    def __init__(self, target: str, prefix: str, *, strip: bool, keep_host: bool, forget: tuple[str, ...] = ()) -> None:
        self.target, self.prefix, self.strip, self.keep_host = target, prefix, strip, keep_host
        self.forget = {"host", *forget} if not keep_host else set(forget)
        self.client = httpx.AsyncClient(timeout=None)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass one request on, and its reply back as it comes."""
        if scope["type"] != "http":
            return
        path = scope["path"]
        if not path.startswith(self.prefix):
            await send({"type": "http.response.start", "status": 502, "headers": []})
            await send({"type": "http.response.body", "body": b"not proxied"})
            return
        if self.strip:
            path = path[len(self.prefix) :] or "/"
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = [(key, value) for key, value in scope["headers"] if key.decode() not in self.forget]
        url = httpx.URL(self.target).copy_with(path=path, query=scope["query_string"] or None)
        request = self.client.build_request(scope["method"], url, headers=headers, content=body)
        reply = await self.client.send(request, stream=True)
        kept = [(k, v) for k, v in reply.headers.raw if k.lower() not in (b"transfer-encoding", b"connection")]
        await send({"type": "http.response.start", "status": reply.status_code, "headers": kept})
        try:
            async for piece in reply.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        finally:
            await reply.aclose()
        await send({"type": "http.response.body", "body": b""})
