"""The page behind proxies, seen by Chromium and by a script: what DSW and its like do to paths and Host."""

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from gradio_client import Client
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import Watch, answers, ask, settled
from tests.serving import Proxy, free_port, running
from tests.serving import page as serve

Open = Callable[[BrowserContext, str], Page]
PREFIX = "/dsw-123/proxy/7860"

pytestmark = pytest.mark.browser


@pytest.mark.parametrize(
    ("form", "strip", "keep_host"),
    [
        *(("path", strip, keep) for strip in (True, False) for keep in (True, False)),
        ("slashed", True, False),
        ("url", True, False),
        ("url", False, True),
        ("notebook", True, False),
    ],
    ids=lambda value: {True: "yes", False: "no"}.get(value, value),
)
def test_a_page_behind_a_proxy_answers(
    form: str, strip: bool, keep_host: bool, tmp_path: Path, context: BrowserContext, open_page: Open, watch: Watch
) -> None:
    outside, inside = free_port(), free_port()
    prefix = f"/dsw-123/proxy/{inside}"
    public = f"http://127.0.0.1:{outside}"
    root = {
        "path": prefix,
        "slashed": prefix + "/",
        "url": f"{public}{prefix}/?token=x",
        "notebook": f"{public}/dsw-123/lab/tree/a.ipynb",
    }[form]
    proxy = Proxy(f"http://127.0.0.1:{inside}", prefix, strip=strip, keep_host=keep_host)
    with serve(tmp_path, port=inside, root_path=root), running(proxy, outside):
        page = open_page(context, f"{public}{prefix}/")
        ask(page, "hello")
        settled(page)
        expect(answers(page).last).to_contain_text("You said: hello")
        page.reload()
        expect(answers(page).last).to_contain_text("You said: hello")
        expect(page.locator("#banner")).to_have_count(0)
        assert (watch.outside, watch.errors) == ([], [])
        cookies = context.cookies()
        assert [cookie["path"] for cookie in cookies if cookie["name"] == "nibble_visitor"] == [prefix]


@pytest.mark.parametrize("strip", [True, False], ids=["stripping", "passing"])
def test_a_data_set_is_dropped_and_seen_behind_a_proxy(
    strip: bool, tmp_path: Path, guide_model: Path, context: BrowserContext, open_page: Open, watch: Watch
) -> None:
    outside, inside = free_port(), free_port()
    proxy = Proxy(f"http://127.0.0.1:{inside}", PREFIX, strip=strip, keep_host=False)
    rows = tmp_path / "talk.jsonl"
    rows.write_text('{"prompt": "Who are you?", "completion": "Half a byte."}\n' * 2, encoding="utf-8")
    public = f"http://127.0.0.1:{outside}{PREFIX}"
    with serve(tmp_path, port=inside, root_path=public), running(proxy, outside):
        page = open_page(context, f"{public}/")
        page.get_by_role("tab").nth(2).click()
        page.locator("#tune-upload input[type=file]").set_input_files(rows)
        expect(page.locator("#data-said")).to_contain_text("Kept as talk")
        expect(page.locator(".sample .tokens").first).to_contain_text("Half a byte.", timeout=180_000)
        assert (watch.outside, watch.errors) == ([], [])


@pytest.mark.parametrize("strip", [True, False], ids=["stripping", "passing"])
def test_a_script_behind_a_proxy_is_answered(strip: bool, tmp_path: Path) -> None:
    outside, inside = free_port(), free_port()
    proxy = Proxy(f"http://127.0.0.1:{inside}", PREFIX, strip=strip, keep_host=False)
    public = f"http://127.0.0.1:{outside}{PREFIX}"
    with serve(tmp_path, port=inside, root_path=public), running(proxy, outside):
        parts = list(Client(public, verbose=False).submit("hello", api_name="/chat"))
        assert len(parts) >= 5
        direct = Client(f"http://127.0.0.1:{inside}", verbose=False)
        assert direct.predict("hello", api_name="/chat") == parts[-1]


def test_a_page_without_its_last_slash_finds_itself(tmp_path: Path, context: BrowserContext, open_page: Open) -> None:
    outside, inside = free_port(), free_port()
    proxy = Proxy(f"http://127.0.0.1:{inside}", PREFIX, strip=True, keep_host=True)
    with serve(tmp_path, port=inside, root_path=PREFIX), running(proxy, outside):
        page = open_page(context, f"http://127.0.0.1:{outside}{PREFIX}")
        assert page.url.endswith(PREFIX + "/")


def test_a_page_under_an_address_that_was_not_set_works_where_it_can(
    tmp_path: Path, context: BrowserContext, open_page: Open
) -> None:
    """No root path at all behind a proxy that strips, and a public root path opened directly."""
    outside, inside = free_port(), free_port()
    proxy = Proxy(f"http://127.0.0.1:{inside}", PREFIX, strip=True, keep_host=False)
    with serve(tmp_path, port=inside), running(proxy, outside):
        page = open_page(context, f"http://127.0.0.1:{outside}{PREFIX}/")
        ask(page, "hello")
        expect(answers(page).last).to_contain_text("You said: hello")
    with serve(tmp_path, port=inside, root_path="https://hub.example/dsw-1/proxy/7860"):
        page = open_page(context, f"http://127.0.0.1:{inside}/")
        ask(page, "directly")
        expect(answers(page).last).to_contain_text("You said: directly")


def test_a_page_whose_calls_are_refused_says_what_to_set(
    tmp_path: Path, context: BrowserContext, caplog: pytest.LogCaptureFixture
) -> None:
    """A browser that does not vouch for the page, behind a proxy that rewrites Host: only a setting helps."""
    outside, inside = free_port(), free_port()

    def proxy() -> Proxy:
        return Proxy(f"http://127.0.0.1:{inside}", "", strip=True, keep_host=False, forget=("sec-fetch-site",))

    with serve(tmp_path, port=inside, root_path="/dsw-1"), running(proxy(), outside):
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{outside}/")
        expect(page.locator("#banner")).to_contain_text(f"'http://127.0.0.1:{outside}' may not call this page")
        expect(page.locator("#banner")).to_contain_text("public_origins")
        assert "may not call this page" in caplog.text
    with serve(tmp_path, port=inside, public_origins=(f"http://127.0.0.1:{outside}",)), running(proxy(), outside):
        page.reload()
        expect(page.locator(".top summary")).to_be_visible()
        ask(page, "hello")
        expect(answers(page).last).to_contain_text("You said: hello")


def test_a_host_that_was_not_set_is_told_what_to_set(tmp_path: Path) -> None:
    with serve(tmp_path) as url:
        reply = httpx.get(url, headers={"host": "hub.example"})
        assert reply.status_code == 403
        assert "root_path" in reply.text
