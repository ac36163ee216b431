"""Chromium for the browser tests, and pages served to it."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scripted import ScriptedHost
from tests.serving import page as serve

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test installs it")

from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
NAMES = ("chromium", "chromium-browser", "google-chrome")

expect.set_options(timeout=20_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder drives a browser."""
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium, else the one that playwright brought.

    Not for the whole run: while it is there an event loop runs in this thread, and other tests start their own.
    """
    system = next((path for name in NAMES if (path := shutil.which(name))), None)
    with sync_playwright() as playwright:
        path = system or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium here: install it, or run `playwright install chromium`")
        started = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield started
        started.close()


class Watch:
    """What a page did that it should not: calls to other hosts, dialogs, errors of its scripts."""

    def __init__(self) -> None:
        self.outside: list[str] = []
        self.dialogs: list[str] = []
        self.errors: list[str] = []


@pytest.fixture
def visitor(browser: Browser) -> Iterator[Callable[..., BrowserContext]]:
    """Makes visitors, each with a browser of their own; all of them leave when the test ends, however it ends."""
    made: list[BrowserContext] = []

    def make(locale: str = "en-US", **options: Any) -> BrowserContext:
        made.append(browser.new_context(locale=locale, **options))
        return made[-1]

    yield make
    for context in made:
        context.close()


@pytest.fixture
def context(visitor: Callable[..., BrowserContext]) -> BrowserContext:
    """A visitor with an English browser."""
    return visitor()


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def open_page(watch: Watch) -> Callable[..., Page]:
    """Open an address in a context; waits until the page answers."""

    def open_(context: BrowserContext, url: str) -> Page:
        opened = context.new_page()
        opened.on("dialog", lambda dialog: (watch.dialogs.append(dialog.message), dialog.dismiss()))
        opened.on("pageerror", lambda error: watch.errors.append(str(error)))
        opened.on("requestfinished", lambda request: _note(watch, request))
        opened.on("requestfailed", lambda request: _note(watch, request))
        opened.goto(url)
        expect(opened.locator(".top summary")).to_be_visible()
        return opened

    return open_


def _note(watch: Watch, request: Request) -> None:
    """What the content policy stopped never left the browser, though the browser reports it as a failed request."""
    if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:")) and request.failure != "csp":
        watch.outside.append(f"{request.url} {request.failure}")


@pytest.fixture
def host() -> ScriptedHost:
    """Slow enough to be watched."""
    return ScriptedHost(pause=0.05)


@pytest.fixture
def site(host: ScriptedHost, tmp_path: Path) -> Iterator[str]:
    """The page's address."""
    with serve(tmp_path, host) as url:
        yield url


def ask(page: Page, text: str) -> None:
    """Type a message and send it; waits until it was taken."""
    page.locator("#message textarea").fill(text)
    page.locator("#message textarea").press("Enter")
    expect(page.locator("#message textarea")).to_have_value("")


def answers(page: Page) -> Any:
    """The answers in the open chat."""
    return page.get_by_test_id("bot")


def settled(page: Page) -> None:
    """Wait until no answer is being written."""
    expect(page.get_by_test_id("submit-button")).to_be_visible()
    expect(page.locator("small.waiting")).to_have_count(0)


def write_adapter(folder: Path, base: str) -> None:
    """An adapter that is one by its files."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    packed = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(packed)) + packed + b"\0")
