"""The page's document: one cookie, one script in its head, and every other reply untouched."""

import asyncio
from collections.abc import Callable

from nibble.doorstep import COOKIE, FIND_OURSELVES, TOKEN, Doorstep, visitor_of

DOCUMENT = '<html><head><title>ü</title><script type="module" src="./a.js"></script></head><body></body></html>'


def served(body: bytes, kind: bytes, pieces: int = 1) -> Callable:
    """An application that answers with that body, in so many pieces."""

    async def application(scope: dict, receive: object, send: Callable) -> None:
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        step = max(1, -(-len(body) // pieces))
        parts = [body[at : at + step] for at in range(0, len(body), step)] or [b""]
        for number, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": number < len(parts) - 1})

    return application


def get(application: Callable, path: str = "/", method: str = "GET", **headers: str) -> tuple[dict[str, str], bytes]:
    """Headers and body of a reply."""
    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": pairs, "scheme": "http"}
    asyncio.run(Doorstep(application)(scope, None, send))  # type: ignore[arg-type]
    fields = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return fields, b"".join(message.get("body", b"") for message in sent[1:])


def test_the_script_comes_before_the_page_s_own_and_the_length_is_right() -> None:
    for pieces in (1, 3, 7):
        headers, body = get(served(DOCUMENT.encode(), b"text/html; charset=utf-8", pieces))
        assert body.decode() == DOCUMENT.replace('<script type="module"', FIND_OURSELVES + '<script type="module"')
        assert int(headers["content-length"]) == len(body)


def test_a_known_visitor_gets_no_second_cookie_and_a_forged_one_is_replaced() -> None:
    application = served(DOCUMENT.encode(), b"text/html")
    token = get(application)[0]["set-cookie"].partition(";")[0].partition("=")[2]
    assert TOKEN.fullmatch(token)
    assert "set-cookie" not in get(application, cookie=f"a=b; {COOKIE}={token}")[0]
    for forged in ("x", "../../../etc", token + "0", "", token[:-1] + "!"):
        assert "set-cookie" in get(application, cookie=f"{COOKIE}={forged}")[0]
    assert visitor_of({COOKIE: token}) == token
    assert visitor_of({COOKIE: "short"}) is None
    assert visitor_of({}) is None


def test_two_visitors_get_two_names() -> None:
    application = served(DOCUMENT.encode(), b"text/html")
    assert len({get(application)[0]["set-cookie"] for _ in range(20)}) == 20


def test_other_replies_pass_as_they_are() -> None:
    script = served(b"let a = '</head>'", b"text/javascript")
    assert get(script, "/assets/a.js") == (
        {"content-type": "text/javascript", "content-length": "17"},
        b"let a = '</head>'",
    )
    assert get(script)[1] == b"let a = '</head>'"
    assert "set-cookie" not in get(served(DOCUMENT.encode(), b"text/html"), "/", method="POST")[0]
    assert get(served(b"", b"text/html"), method="HEAD")[1] == b""
