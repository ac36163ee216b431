"""What a visit begins with: a visitor's identity, and the address at which the page really stands.

Promises that a visitor is known again by an opaque cookie that no script can read, and that the page calls the address
at which the browser found it, whatever a proxy did to Host and path. Plain ASGI; knows nothing of Gradio beyond the two
marks in its document that are named here.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any

from nibble.hosting import Application, Receive, Scope, Send

COOKIE = "nibble_visitor"
TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
"""256 random bits, as secrets.token_urlsafe(32) writes them."""

YEAR_S = 365 * 24 * 3600

FIND_OURSELVES = """<script>
(() => {
if (!location.pathname.endsWith("/")) location.replace(location.pathname + "/" + location.search + location.hash);
const here = location.origin + location.pathname.replace(/\\/$/, "");
if (window.gradio_config) window.gradio_config.root = here;
fetch(here + "/health", {method: "POST"}).then(async (reply) => {
  if (reply.status !== 403) return;
  const banner = document.createElement("div");
  banner.id = "banner";
  banner.setAttribute("role", "alert");
  banner.style = "position:fixed;inset:0 0 auto 0;z-index:9999;padding:.7rem 1rem;font:15px/1.5 system-ui;" +
    "color:#7a2e0e;background:#fffaeb;border-bottom:1px solid #fedf89";
  banner.textContent = (await reply.text()).trim();
  document.documentElement.append(banner);
}).catch(() => {});
})();
</script>"""
"""Relative addresses need the slash; the root that a server behind a proxy works out may be one nobody can reach. Where
the server refuses calls from this address, its line, which names the setting, stands over a page that cannot answer."""

BEFORE = re.compile(r"<script type=\"module\"|</head>")
"""Gradio's own script, which reads `window.gradio_config.root`; ours must come first."""


def visitor_of(cookies: Mapping[str, str]) -> str | None:
    """The visitor's token among a request's cookies; None where there is none, or not one of our making."""
    token = cookies.get(COOKIE, "")
    return token if TOKEN.fullmatch(token) else None


class Doorstep:
    """ASGI middleware between the guard and the page: on the page's document it leaves the cookie and the script."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; all but the document passes untouched."""
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD") or scope["path"] not in ("", "/"):
            return await self.app(scope, receive, send)
        # Compressed, the document could not be written into.
        plain = [item for item in scope["headers"] if item[0] != b"accept-encoding"]
        return await self.app({**scope, "headers": plain}, receive, _Writer(send, _new_cookie(scope)).send)


class _Writer:
    """Collects an HTML reply and sends it on whole, with the script in its head."""

    def __init__(self, send: Send, cookie: bytes | None) -> None:
        self._send = send
        self._cookie = cookie
        self._start: Any = None
        self._body = b""

    async def send(self, message: Any) -> None:
        """Take the application's next message."""
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            if self._cookie:
                headers.append((b"set-cookie", self._cookie))
            message = {**message, "headers": headers}
            if _field(headers, b"content-type").startswith(b"text/html"):
                self._start = message
                return
        elif self._start is not None and message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if message.get("more_body"):
                return
            message = await self._begin()
        await self._send(message)

    async def _begin(self) -> Any:
        document = self._body.decode("utf-8")
        # A HEAD has no body, and its length must stay the document's own.
        if document:
            mark = BEFORE.search(document)
            at = mark.start() if mark else 0
            self._body = (document[:at] + FIND_OURSELVES + document[at:]).encode("utf-8")
            kept = [item for item in self._start["headers"] if item[0].lower() != b"content-length"]
            self._start["headers"] = [*kept, (b"content-length", str(len(self._body)).encode())]
        await self._send(self._start)
        return {"type": "http.response.body", "body": self._body}


def _field(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    return next((value for key, value in headers if key.lower() == name), b"")


def _new_cookie(scope: Scope) -> bytes | None:
    """The Set-Cookie line for a visitor who brings no token of ours."""
    cookies: SimpleCookie = SimpleCookie()
    try:
        cookies.load(_field(scope["headers"], b"cookie").decode("latin-1"))
    except CookieError:
        cookies.clear()
    if visitor_of({name: item.value for name, item in cookies.items()}):
        return None
    # No Path: the browser then takes the folder that it sees, which behind a proxy is the page's own.
    secure = scope.get("scheme") == "https" or _field(scope["headers"], b"x-forwarded-proto").startswith(b"https")
    line = f"{COOKIE}={secrets.token_urlsafe(32)}; Max-Age={YEAR_S}; HttpOnly; SameSite=Lax"
    return (line + ("; Secure" if secure else "")).encode()
