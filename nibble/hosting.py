"""Where the page is reached from: root path, who may call it, and the guard that stands before everything.

Promises that a foreign origin or host gets one line that names the setting which would admit it, and that the page
works behind a proxy that strips its prefix and behind one that does not. Knows nothing of Gradio: the guard is plain
ASGI.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from nibble.config import Settings
from nibble.errors import ConfigError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger(__name__)

CONTENT_POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; img-src 'self' data: blob:; connect-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
REPLY_HEADERS = (
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
)
"""On every reply: no foreign scripts, fonts, pictures, calls, frames or plug-ins."""

SPOKEN = (b"host", b"origin", b"sec-fetch-site")
"""Headers that decide who may call."""

FORGOTTEN = (b"x-forwarded-host", b"x-gradio-server")
"""Headers by which a caller could make Gradio believe that it stands at another address."""

CLOSED_PATHS = (
    "/gradio_api/openapi.json", "/gradio_api/process_recording", "/gradio_api/component_server", "/monitoring",
    "/monitoring/summary",
)  # fmt: skip
"""What Gradio serves and the page has no use for."""

UPLOAD_PATH = "/gradio_api/upload"
"""Where data sets arrive; closed in public mode."""

MOST_UPLOAD = 512 * 2**20
"""Bytes of one file."""

MULTIPART = 2**16
"""Bytes that stand around the file."""

ROOM = 2**30
"""Bytes that an upload leaves free on the disk."""

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
NOTEBOOK = re.compile(r"^(/dsw-[\w-]+)(?:/(?:lab|tree|notebooks|edit|terminals)\b.*|/?)$")
"""Address of a ModelScope DSW notebook, whose proxy serves port N under /dsw-…/proxy/N."""


@dataclass(frozen=True)
class Address:
    """Where the page stands in public: `path` without trailing slash ("" is the top), `origin` where it is known."""

    path: str = ""
    origin: str = ""

    @property
    def root_path(self) -> str:
        """What Gradio takes as its root_path: the whole URL where the origin is known, else the path."""
        return self.origin + self.path


def parse_root_path(text: str, port: int) -> Address:
    """An address from whatever a person pastes: a path, a public URL, or the address of a DSW notebook.

    Args:
        text: such as "/dsw-123/proxy/7860/", "dsw-123/proxy/7860" or "https://host/dsw-123/proxy/7860/?token=1".
        port: the port served, for notebook addresses.

    Raises:
        ConfigError: a URL of another scheme than http and https, or with spaces or dots for folders.
    """
    text = text.strip()
    url = urlsplit(text if "://" in text else "//host/" + text.lstrip("/"))
    path = "/" + "/".join(part for part in url.path.split("/") if part)
    if not url.netloc or url.scheme not in ("", "http", "https") or re.search(r"[\s\\<>\"']|/\.\.?(/|$)", path):
        raise ConfigError(f"root_path is {text!r}.", "Paste the page's address as the browser shows it, or its path.")
    notebook = NOTEBOOK.match(path)
    if notebook:
        path = f"{notebook[1]}/proxy/{port}"
    origin = f"{url.scheme}://{url.netloc.rpartition('@')[2].lower()}" if url.scheme else ""
    return Address("" if path == "/" else path, origin)


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_binding(settings: Settings) -> None:
    """Refuse to serve other machines without a password, unless the owner says that strangers are welcome.

    Raises:
        ConfigError: another address than this machine's own, no `auth`, not `public`.
    """
    if not (is_loopback(settings.host) or settings.auth or settings.public):
        raise ConfigError(
            f"host {settings.host} would let other machines in without a password.",
            'Set auth: "user:password" in config.yaml, or public: true to let strangers chat.',
        )


def host_name(netloc: str) -> str:
    """The name in a Host header or origin: lower case, without port and brackets."""
    return (urlsplit("//" + netloc).hostname or "").lower()


@dataclass(frozen=True)
class Doorkeeper:
    """Who may call: the origins and host names that pass, and whether any plain IP address does."""

    origins: frozenset[str]
    hosts: frozenset[str]
    any_ip: bool

    @classmethod
    def for_settings(cls, settings: Settings) -> Doorkeeper:
        """From the public address, `public_origins` and the address listened on."""
        address = parse_root_path(settings.root_path, settings.port)
        origins = {origin.rstrip("/").lower() for origin in (*settings.public_origins, address.origin) if origin}
        hosts = {host_name(urlsplit(origin).netloc) for origin in origins} | {*LOOPBACK_NAMES, settings.host.lower()}
        open_to_others = not is_loopback(settings.host)
        if open_to_others:
            hosts.add(socket.gethostname().lower())
        # A plain IP address cannot be rebound by a foreign name server, so it is safe where others may come in at all.
        return cls(frozenset(origins), frozenset(hosts), any_ip=open_to_others)

    def refusal(self, host: str, origin: str | None, fetch_site: str = "") -> str:
        """Why a request is refused, in one line; empty when it passes.

        Args:
            host: the Host header.
            origin: the Origin header, where there is one.
            fetch_site: the Sec-Fetch-Site header. A browser sets it itself, from the address it shows, and no script
                can: "same-origin" therefore vouches for a page behind a proxy that rewrites Host. The Host is checked
                first, so that a rebound name does not get here (https://words.filippo.io/csrf/).
        """
        name = host_name(host)
        if not (name in self.hosts or (self.any_ip and _is_ip(name))):
            return (
                f"Host {host[:200]!r} is not served here. If it is your proxy's, set root_path in config.yaml "
                f"(or --root-path) to the page's whole public URL, or add its origin to public_origins."
            )
        if origin is None or origin.lower() in self.origins or fetch_site == "same-origin":
            return ""
        if origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}"):
            return ""
        return (
            f"Origin {origin[:200]!r} may not call this page. If it is yours, add it to public_origins in config.yaml, "
            f"or set root_path (--root-path) to the page's whole public URL."
        )


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """ASGI middleware, outermost: refuses foreign origins and hosts, takes the prefix off, dresses every reply."""

    def __init__(self, app: Application, settings: Settings) -> None:
        self.app = app
        self.keeper = Doorkeeper.for_settings(settings)
        self.prefix = parse_root_path(settings.root_path, settings.port).path
        self.closed = (*CLOSED_PATHS, UPLOAD_PATH) if settings.public else CLOSED_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; websockets are closed, as the page uses none."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})

        async def dressed(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *REPLY_HEADERS]
            await send(message)

        headers = dict(scope["headers"])
        said = {name: headers[name].decode("latin-1") for name in SPOKEN if name in headers}
        reason = self.keeper.refusal(said.get(b"host", ""), said.get(b"origin"), said.get(b"sec-fetch-site", ""))
        if reason:
            log.warning("Refused: %s", reason)
            return await _reply(dressed, 403, reason)
        path = self._without_prefix(scope["path"])
        if path.rstrip("/").endswith(self.closed):
            return await _reply(dressed, 404, "not found")
        if path.rstrip("/").endswith(UPLOAD_PATH) and scope["method"] == "POST":
            status, reason = upload_refusal(headers.get(b"content-length", b""))
            if reason:
                return await _reply(dressed, status, reason)
        inner = {
            **scope,
            "path": path,
            "raw_path": path.encode("utf-8"),
            "headers": [item for item in scope["headers"] if item[0] not in FORGOTTEN],
        }
        return await self.app(inner, receive, dressed)

    def _without_prefix(self, path: str) -> str:
        if self.prefix and (path == self.prefix or path.startswith(self.prefix + "/")):
            return path[len(self.prefix) :] or "/"
        return path


def upload_refusal(length: bytes) -> tuple[int, str]:
    """Status and line with which an upload is refused before it is read; the line is empty when it passes.

    Args:
        length: the Content-Length header; empty where there was none.
    """
    if not length.isdigit():
        return 411, "An upload must tell its length."
    if int(length) > MOST_UPLOAD + MULTIPART:
        return 413, f"A file of more than {MOST_UPLOAD >> 20} MB is not taken here: name its path on the console."
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if int(length) + ROOM > free:
        return 507, "There is no room for this file on the disk."
    return 200, ""


async def _reply(send: Send, status: int, line: str) -> None:
    body = (line + "\n").encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def find_dsw(environ: Mapping[str, str] | None = None) -> str:
    """The id of the ModelScope DSW notebook we run in, such as "dsw-123"; empty where there is no sign of one."""
    environ = os.environ if environ is None else environ
    places = [socket.gethostname(), *(value for key, value in environ.items() if "TOKEN" not in key.upper())]
    return next((match[0] for match in (re.search(r"\bdsw-\d+", place) for place in places) if match), "")


def dsw_advice(settings: Settings, notebook: str) -> str:
    """What to set so that the page opens through a DSW notebook's proxy."""
    address = parse_root_path(settings.root_path, settings.port)
    where = f"/{notebook or 'dsw-<id>'}/proxy/{settings.port}/"
    if address.origin:
        return f"open {address.root_path}/"
    return (
        "copy the notebook's address from the browser and start with --root-path 'ADDRESS' "
        f"(or root_path in config.yaml); the page then opens at https://<the same host>{where}"
    )
