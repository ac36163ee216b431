"""The Fine-tune tab in Chromium: a person drops a file, sees what is trained, trains, comes back, compares, merges."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, expect

from tests.browser.conftest import Watch, answers, ask, settled
from tests.scripted import ScriptedHost
from tests.serving import free_port

ROOT = Path(__file__).parents[2]
Open = Callable[[BrowserContext, str], Page]
Visitor = Callable[..., BrowserContext]

LONG_MS = 180_000
"""For a short job on a busy machine."""

WHOLE_MS = 3_600_000


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


def enter(page: Page) -> None:
    """Open the tab; waits until the form is there."""
    page.get_by_role("tab").nth(2).click()
    expect(page.locator("#set-max_steps")).to_be_visible()


def drop(page: Page, path: Path) -> None:
    """Drop a file; waits until it was taken."""
    page.locator("#tune-upload input[type=file]").set_input_files(path)
    expect(page.locator("#data-said")).to_contain_text(f"Kept as {path.stem}")


def write(page: Page, **values: str) -> None:
    """Fill fields of the form, and leave the last one."""
    if not page.locator("#form .more").evaluate("fold => fold.open"):
        page.locator("#form .more summary").click()
    for name, value in values.items():
        page.locator(f"#set-{name}").fill(value)
    page.locator(f"#set-{name}").blur()


def curve(page: Page) -> Locator:
    """The line of the losses."""
    return page.locator("#plot-loss svg .mark-line path").first


def test_a_file_is_dropped_seen_refused_mended_trained_and_found_again(
    site: str,
    host: ScriptedHost,
    tmp_path: Path,
    guide_model: Path,
    context: BrowserContext,
    open_page: Open,
    watch: Watch,
) -> None:
    page = open_page(context, site)
    enter(page)
    rows = [{"prompt": "Who are you?", "completion": f"Half a byte, number {n}."} for n in range(24)]
    good, broken = tmp_path / "talk.jsonl", tmp_path / "broken.jsonl"
    good.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    broken.write_text('{"text": "fine"}\n{"text": \n', encoding="utf-8")

    # A broken file is told by its line, and trains nothing.
    drop(page, broken)
    expect(page.locator("#found")).to_contain_text("Line 2 of broken.jsonl")
    page.locator("#start-train").click()
    expect(page.locator("#train-said .wrong")).to_contain_text("Line 2 of broken.jsonl")
    expect(page.locator("#runs .run")).to_have_count(0)

    # A good one is seen as the model learns it.
    drop(page, good)
    expect(page.locator("#found .why")).to_contain_text("prompt (columns prompt, completion)")
    first = page.locator(".sample").first
    expect(first.locator(".tokens")).to_contain_text("Half a byte, number 0.", timeout=LONG_MS)
    expect(first).to_contain_text("learns to stop")
    learnt = "".join(first.locator(".tokens span.t").all_inner_texts())
    assert learnt.startswith("Half a byte, number 0.") and "Who" not in learnt

    # What cannot be is said beside its field, and is gone once it is mended.
    write(page, max_steps="many")
    expect(page.locator("[data-problem=max_steps]")).to_contain_text("whole number")
    write(page, max_steps="500", batch_size="1", logging_steps="1", save_steps="2", warmup_steps="0", max_length="32")
    expect(page.locator("[data-problem=max_steps]")).to_be_empty()

    # The curve is there while it runs; a stop keeps what was learnt.
    page.locator("#start-train").click()
    expect(page.locator("#train-said")).to_contain_text("Begun")
    expect(page.locator("#train-job .job")).to_have_class("job running", timeout=LONG_MS)
    expect(curve(page)).to_be_visible(timeout=LONG_MS)
    drawn = curve(page).get_attribute("d")
    expect(curve(page)).not_to_have_attribute("d", str(drawn), timeout=LONG_MS)
    page.locator("#train-job [data-act=stop]").click()
    expect(page.locator("#train-job .job")).to_have_class("job stopped", timeout=LONG_MS)

    # The page is opened anew: the run is there with its curve, and goes on when it is asked to.
    page.reload()
    enter(page)
    expect(page.locator("#runs .run")).to_have_count(1)
    expect(page.locator("#runs .run b")).to_have_text("guide-talk")
    expect(curve(page)).to_be_visible()
    page.locator("#train-job [data-act=resume]").click()
    expect(page.locator("#train-job .job")).to_have_class("job running", timeout=LONG_MS)
    page.locator("#train-job [data-act=stop]").click()
    expect(page.locator("#train-job .job")).to_have_class("job stopped", timeout=LONG_MS)

    # What was learnt so far is tried in the chat, where the model wears it at once.
    expect(page.locator("#tune-adapter input")).to_have_value("guide-talk")
    page.locator("#chat-adapter").click()
    expect(page.locator(".top summary")).to_contain_text("+ guide-talk")
    ask(page, "Who are you?")
    settled(page)
    assert host.worn == ["guide-talk"]
    assert (watch.outside, watch.dialogs, watch.errors) == ([], [], [])


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_a_phone_needs_no_scrolling_to_the_side(
    site: str, guide_model: Path, visitor: Visitor, open_page: Open, locale: str
) -> None:
    page = open_page(visitor(locale, viewport={"width": 360, "height": 740}, has_touch=True), site)
    enter(page)
    expect(page.locator(".tokens").first).to_be_visible(timeout=LONG_MS)
    for fold in page.locator("#finetune-page .fold > button").all():
        fold.click()
    for fold in page.locator("#finetune-page summary").all():
        fold.click()
    page.locator("#columns [data-form]").select_option("alpaca")
    expect(page.locator("#columns [data-column=instruction]")).to_be_visible()
    wide = page.evaluate(
        """() => [...document.querySelectorAll("#finetune-tab, #finetune-tab .card, #form, #runs, #trained, .fields")]
                 .filter((part) => part.scrollWidth > part.clientWidth + 1).map((part) => part.id || part.className)"""
    )
    assert wide == []


@pytest.mark.full
@pytest.mark.timeout(7_200)
def test_the_whole_way_from_quotes_to_a_chat_with_the_merged_model(
    start: Callable[[], str], context: BrowserContext, open_page: Open, watch: Watch
) -> None:
    """The tutorial's settings on the shipped quotes. The server is restarted while it trains."""
    page = open_page(context, start())
    expect(page.locator(".top summary")).to_contain_text("guide · sym_int4", timeout=LONG_MS)
    enter(page)
    page.locator("#start-dry").click()
    expect(page.locator("#dry-result .check.good")).to_be_visible(timeout=LONG_MS)
    page.locator("#start-train").click()
    expect(curve(page)).to_be_visible(timeout=WHOLE_MS)
    start()
    page.reload()
    enter(page)
    expect(page.locator("#train-job .job")).to_have_class("job done", timeout=WHOLE_MS)
    fell = page.locator("#train-result dd").first.inner_text()
    print(f"the loss fell {fell}; {page.locator('#train-result').inner_text()}")
    before, after = (float(part.split()[0]) for part in fell.split("→"))
    assert after <= 0.7 * before

    expect(page.locator("#tune-adapter input")).to_have_value("guide-quotes")
    page.locator("#tune-checkpoints label").first.click()
    page.locator("#start-compare").click()
    expect(page.locator("#comparison .prompt")).to_have_count(3, timeout=WHOLE_MS)
    expect(page.locator("#comparison .prompt").first.locator(".answers > div")).to_have_count(3)
    shown = page.locator("#comparison .prompt").first.locator(".answers p").all_inner_texts()
    assert shown[0] != shown[-1]

    page.locator("#chat-adapter").click()
    expect(page.locator("#message textarea")).to_be_visible(timeout=LONG_MS)
    expect(page.locator(".top summary")).to_contain_text("guide + guide-quotes · sym_int4", timeout=LONG_MS)
    ask(page, "What is a nibble?")
    settled(page)
    worn = answers(page).last.inner_text().strip()
    enter(page)

    page.locator("#merge-formats label", has_text="sym_int4").first.click()
    page.locator("#start-merge").click()
    expect(page.locator("#proof .check.good").first).to_be_visible(timeout=WHOLE_MS)
    page.locator("#after-jobs [data-act=load]", has_text="sym_int4").first.click()
    expect(page.locator("#message textarea")).to_be_visible(timeout=LONG_MS)
    expect(page.locator(".top summary")).to_contain_text("guide-quotes-merged-sym_int4 · sym_int4")
    ask(page, "What is a nibble?")
    settled(page)
    assert worn and answers(page).last.inner_text().strip()
    assert (watch.outside, watch.dialogs, watch.errors) == ([], [], [])
