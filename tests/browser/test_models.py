"""The Models tab in Chromium: a newcomer shrinks the guide, reads what was lost, loads the new model, chats with it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from nibble import probe
from nibble.probe.machine import keep
from tests.browser.conftest import Watch, answers, ask, settled
from tests.serving import free_port
from tests.serving import page as serve

ROOT = Path(__file__).parents[2]
Open = Callable[[BrowserContext, str], Page]
Visitor = Callable[..., BrowserContext]

LONG_MS = 240_000


@pytest.fixture
def start(tmp_path: Path, guide_model: Path) -> Iterator[Callable[[], str]]:
    """Starts app.py with the guide, in place of one that was started before; its address. No hub can be reached."""
    port = free_port()
    command = [sys.executable, "app.py", "--port", str(port), "--home", str(tmp_path / "home")]
    running: list[subprocess.Popen[str]] = []

    def end() -> None:
        while running:
            process = running.pop()
            process.send_signal(signal.SIGINT)
            process.wait(15)
            assert process.stdout is not None
            process.stdout.close()

    def begin() -> str:
        end()
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        running.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment))
        assert running[0].stdout is not None and "ready" in running[0].stdout.readline()
        return f"http://127.0.0.1:{port}"

    yield begin
    end()


@pytest.fixture
def still(tmp_path: Path) -> Path:
    """A home in which the machine counts as measured: what it measures is not what the test looks at."""
    keep(probe.unmeasured(), tmp_path)
    return tmp_path


def enter(page: Page) -> None:
    """Open the tab; waits until the library is there."""
    page.get_by_role("tab").nth(1).click()
    expect(page.locator("#library [data-name=guide]")).to_be_visible()


def choose(page: Page, *formats: str) -> None:
    """Tick these formats and no other."""
    boxes = page.locator("#formats input")
    for place in range(boxes.count()):
        boxes.nth(place).set_checked(boxes.nth(place).get_attribute("value") in formats)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_newcomer_shrinks_the_guide_reads_the_report_and_chats(
    start: Callable[[], str], context: BrowserContext, open_page: Open, watch: Watch
) -> None:
    url = start()
    page = open_page(context, url)
    expect(page.locator(".top summary")).to_contain_text("guide · sym_int4", timeout=LONG_MS)
    enter(page)
    choose(page, "asym_int5")
    page.locator("#start-shrink").click()
    expect(page.locator("#shrink-said")).to_contain_text("Begun")
    expect(page.locator(".job .bar")).to_be_visible()
    page.locator("#start-shrink").click()
    expect(page.locator("#shrink-said .wrong")).to_contain_text("already")

    # In mid-job the page is opened anew, and then the server: the job is shown again.
    page.reload()
    enter(page)
    expect(page.locator(".job")).to_have_count(1)
    start()
    page.reload()
    enter(page)
    expect(page.locator(".job.done")).to_have_count(1, timeout=LONG_MS)

    # What it made is there, chosen, with its report; one click loads it.
    row = page.locator("#library tr", has_text="guide-asym_int5")
    expect(row).to_have_class("chosen")
    known = page.locator("#known")
    for word in ("asym_int5", "Perplexity", "KL mean", "Same top token", "reference", "4,096 tokens"):
        expect(known).to_contain_text(word)
    assert 0 < float(row.locator("td").nth(1).inner_text()) < 0.1
    page.locator(".job button", has_text="Load guide-asym_int5").click()
    expect(page.locator("#keep-said")).to_contain_text("guide-asym_int5 is loaded in asym_int5", timeout=LONG_MS)
    expect(page.locator(".top summary")).to_contain_text("guide-asym_int5 · asym_int5")
    expect(page.locator("#shelf-delete")).to_be_disabled()
    page.get_by_role("tab").nth(0).click()
    ask(page, "What is Nibble?")
    settled(page)
    expect(answers(page).last).to_contain_text("Nibble")
    page.locator("#model-drawer button.label-wrap").click()
    expect(page.locator("#model input")).to_have_value("guide-asym_int5")

    # Another is loaded; then this one goes, once asked.
    page.get_by_role("tab").nth(1).click()
    page.locator("#library [data-name=guide]").click()
    page.locator("#shelf-load").click()
    expect(page.locator("#keep-said")).to_contain_text("guide is loaded", timeout=LONG_MS)
    page.locator("#library [data-name=guide-asym_int5]").click()
    page.locator("#shelf-delete").click()
    expect(page.locator("#asks")).to_contain_text("Delete guide-asym_int5")
    page.locator("#shelf-delete-really").click()
    expect(page.locator("#keep-said")).to_contain_text("guide-asym_int5 is deleted")
    expect(page.locator("#library [data-name]")).to_have_count(1)
    assert (watch.outside, watch.dialogs, watch.errors) == ([], [], [])


def test_a_refusal_stands_under_its_card_in_one_sentence(
    still: Path, site: str, context: BrowserContext, open_page: Open
) -> None:
    page = open_page(context, site)
    enter(page)
    page.locator("#repo textarea, #repo input").first.fill("../etc/passwd")
    page.locator("#start-get").click()
    expect(page.locator("#get-said .wrong")).to_contain_text("is not a model on a hub")
    choose(page)
    page.locator("#start-shrink").click()
    expect(page.locator("#shrink-said .wrong")).to_contain_text("at least one format")
    expect(page.locator(".job")).to_have_count(0)
    expect(page.locator(".toast-wrap .toast-body")).to_have_count(0)


def test_what_the_page_does_not_send_is_refused_all_the_same(
    site: str, context: BrowserContext, open_page: Open
) -> None:
    """The library's value can be set by any script in the page."""
    page = open_page(context, site)
    enter(page)
    page.evaluate(
        """() => { const button = document.querySelector("#library [data-name]");
                   button.dataset.name = "../../etc"; button.click(); }"""
    )
    page.wait_for_timeout(500)
    expect(page.locator("#known")).to_contain_text("Choose a model")
    expect(page.locator("#shelf-load")).to_be_disabled()


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_a_phone_needs_no_scrolling_to_the_side(
    still: Path, site: str, visitor: Visitor, open_page: Open, locale: str
) -> None:
    report = json.loads((Path(__file__).parent / "report.json").read_text(encoding="utf-8"))
    folder = still / "reports"
    folder.mkdir(exist_ok=True)
    (folder / "guide.json").write_text(json.dumps(report), encoding="utf-8")
    page = open_page(visitor(locale, viewport={"width": 360, "height": 740}, has_touch=True), site)
    enter(page)
    for fold in page.locator("#models-page .fold > button").all():
        fold.click()
    page.locator("#library [data-name=guide]").click()
    expect(page.locator("#known svg circle")).to_have_count(9)
    wide = page.evaluate(
        """() => [...document.querySelectorAll("#models-tab, #models-tab .card, #library, #formats")]
                 .filter((part) => part.scrollWidth > part.clientWidth + 1).map((part) => part.id || part.className)"""
    )
    assert wide == []


def test_a_public_page_has_no_models_tab(tmp_path: Path, context: BrowserContext, open_page: Open) -> None:
    with serve(tmp_path, public=True) as url:
        page = open_page(context, url)
        expect(page.get_by_role("tab")).to_have_count(2)
        expect(page.locator("#models-page")).to_have_count(0)
