"""Pictures of the page, to be looked at: python -m tests.browser.shots FOLDER [URL].

Phone and desk, light and dark, English and Chinese: the empty chat, an answer in the making, a long conversation, the
sidebar. Without URL the page is served with the scripted host of the tests. Where FOLDER ends in .png, one picture for
the README: a real question put to the page at URL.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.browser.conftest import FLAGS, NAMES, ask, settled, write_adapter
from tests.scripted import ScriptedHost
from tests.serving import page as serve

SIZES = {"desk": (1280, 800), "phone": (360, 740)}
SCHEMES = ("light", "dark")
LOCALES = ("en-US", "zh-CN")
QUESTIONS = ("How large is the error of one block?", "show", "think", "那么 nf4 呢？")

FOR_README = ("How do I load a model of my own?", "What is nf4?", "内存不够怎么办？")


def main() -> None:
    """Make all pictures."""
    folder = Path(sys.argv[1])
    if folder.suffix == ".png":
        readme(folder, sys.argv[2])
        return
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory())
        for name in ("quotes", "formal-english"):
            write_adapter(Path(home) / "adapters" / name, "guide")
        url = sys.argv[2] if len(sys.argv) > 2 else stack.enter_context(serve(home, ScriptedHost(pause=0.02)))
        playwright = stack.enter_context(sync_playwright())
        system = next((path for name in NAMES if (path := shutil.which(name))), None)
        browser = playwright.chromium.launch(executable_path=system, args=FLAGS)
        for size, scheme, locale in itertools.product(SIZES, SCHEMES, LOCALES):
            context = visitor(browser, size, scheme, locale)
            shoot(context.new_page(), url, folder / f"{size}-{scheme}-{locale[:2]}")
            context.close()


def readme(picture: Path, url: str) -> None:
    """A visitor at a desk asks the page two questions; the picture shows the answers."""
    with sync_playwright() as playwright:
        system = next((path for name in NAMES if (path := shutil.which(name))), None)
        browser = playwright.chromium.launch(executable_path=system, args=FLAGS)
        page = visitor(browser, "desk", "light", "en-US").new_page()
        page.goto(url)
        page.wait_for_selector(".top details.ready", timeout=120_000)
        for question in FOR_README:
            ask(page, question)
            settled(page)
        page.mouse.move(0, 0)
        page.wait_for_timeout(800)
        page.screenshot(path=picture)
        browser.close()


def visitor(browser: Browser, size: str, scheme: str, locale: str) -> BrowserContext:
    """Someone with that screen, those colours and that language."""
    width, height = SIZES[size]
    return browser.new_context(
        viewport={"width": width, "height": height}, locale=locale, color_scheme=scheme, device_scale_factor=1,
        has_touch=size == "phone",
    )  # fmt: skip


def shoot(page: Page, url: str, name: Path) -> None:
    """A visit, in pictures."""

    def picture(what: str) -> None:
        page.wait_for_timeout(400)
        page.screenshot(path=f"{name}-{what}.png")

    page.goto(url)
    page.wait_for_selector(".placeholder h2")
    page.wait_for_timeout(800)
    picture("1-empty")
    ask(page, QUESTIONS[0])
    settled(page)
    ask(page, QUESTIONS[1])
    page.wait_for_timeout(700)
    picture("2-writing")
    settled(page)
    for question in QUESTIONS[2:]:
        ask(page, question)
        settled(page)
    picture("3-end")
    page.locator("#chatbot .panel-wrap").evaluate("element => element.scrollTo(0, 0)")
    picture("4-top")
    if "phone" in name.name:
        page.locator(".toggle-button").click()
    for drawer in ("model", "sampling"):
        page.locator(f"#{drawer}-drawer button.label-wrap").click()
    if len(sys.argv) == 2:
        page.locator("#adapter input").click()
        page.get_by_role("option").last.click()
    picture("5-sidebar")
    if "phone" in name.name:
        page.locator(".toggle-button").click()
    page.get_by_role("tab").nth(1).click()
    picture("6-models")


if __name__ == "__main__":
    main()
