"""The Chat tab in Chromium: what a visitor does, and what they then see."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import Watch, answers, ask, settled, write_adapter
from tests.scripted import ScriptedHost
from tests.serving import free_port
from tests.serving import page as serve

Open = Callable[[BrowserContext, str], Page]
Visitor = Callable[..., BrowserContext]


def test_a_question_is_typed_and_its_answer_grows(
    site: str, context: BrowserContext, open_page: Open, watch: Watch
) -> None:
    page = open_page(context, site)
    ask(page, "show")
    seen = []
    while len(seen) < 5:
        text = answers(page).last.inner_text() if answers(page).count() else ""
        if text not in seen:
            seen.append(text)
        time.sleep(0.05)
    expect(page.get_by_test_id("stop-button")).to_be_visible()
    settled(page)
    last = answers(page).last
    expect(last.locator("pre code .token").first).to_be_visible()
    assert "    scale = max" in last.locator("pre code").inner_text()
    expect(last.locator("table th")).to_have_count(3)
    expect(last.locator(".katex-display")).to_have_count(1)
    expect(last.locator("small.stats")).to_contain_text("41.8 tokens/s · first token 0.12 s")
    assert (watch.outside, watch.dialogs, watch.errors) == ([], [], [])


def test_stop_keeps_the_text_and_the_button_is_send_again(site: str, context: BrowserContext, open_page: Open) -> None:
    page = open_page(context, site)
    ask(page, "endless")
    expect(answers(page).last).to_contain_text("0 1 2 3")
    page.get_by_role("button", name="Stop").click()
    settled(page)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(answers(page).last).to_contain_text("0 1 2 3")
    expect(answers(page).last.locator("small.stats")).to_contain_text("stopped")
    ask(page, "hello")
    settled(page)
    expect(answers(page)).to_have_count(2)


def test_regenerate_edit_and_undo(site: str, context: BrowserContext, open_page: Open, host: ScriptedHost) -> None:
    page = open_page(context, site)
    for text in ("first", "second"):
        ask(page, text)
        settled(page)
    page.get_by_label("Retry").last.click()
    while len(host.asked) < 3:
        page.wait_for_timeout(50)
    settled(page)
    assert [turn["content"] for turn in host.asked[2]] == [turn["content"] for turn in host.asked[1]]

    page.get_by_test_id("user").first.hover()
    page.get_by_label("Edit").first.click()
    page.locator("#chatbot .user-row textarea").fill("changed")
    page.get_by_label("Submit").first.click()
    expect(answers(page).last).to_contain_text("You said: changed")
    settled(page)
    expect(page.get_by_test_id("user")).to_have_count(1)
    assert [turn["content"] for turn in host.asked[-1]] == ["changed"]

    page.get_by_label("Undo").last.click()
    expect(page.locator("#message textarea")).to_have_value("changed")
    expect(page.get_by_test_id("user")).to_have_count(0)


def test_reload_and_restart_bring_conversations_back(open_page: Open, tmp_path: Path, context: BrowserContext) -> None:
    port = free_port()
    with serve(tmp_path, ScriptedHost(), port=port) as url:
        page = open_page(context, url)
        ask(page, "remember the blue door")
        settled(page)
        page.reload()
        expect(answers(page).last).to_contain_text("You said: remember the blue door")
        page.locator("#new-chat").click()
        expect(answers(page)).to_have_count(0)
        ask(page, "and the red one")
        settled(page)
        page.close()
    with serve(tmp_path, ScriptedHost(), port=port) as url:
        page = open_page(context, url)
        expect(answers(page).last).to_contain_text("You said: and the red one")
        expect(page.locator("#chats label")).to_have_count(2)
        page.locator("#chats label", has_text="blue door").click()
        expect(answers(page).last).to_contain_text("You said: remember the blue door")
        page.wait_for_timeout(300)
        page.reload()
        expect(answers(page).last).to_contain_text("You said: remember the blue door")

        page.locator("#delete").click()
        page.locator("#delete-really").click()
        expect(page.locator("#chats label")).to_have_count(1)
        expect(answers(page).last).to_contain_text("and the red one")


def test_two_visitors_never_mix(site: str, visitor: Visitor, open_page: Open) -> None:
    here, there = open_page(visitor(), site), open_page(visitor(), site)
    ask(here, "my secret is heron")
    ask(there, "my secret is otter")
    settled(here)
    settled(there)
    for page, own, other in ((here, "heron", "otter"), (there, "otter", "heron")):
        page.reload()
        expect(answers(page).last).to_contain_text(own)
        assert other not in page.content()
        expect(page.locator("#chats label")).to_have_count(1)


def test_an_answer_goes_on_while_another_chat_is_open(site: str, context: BrowserContext, open_page: Open) -> None:
    page = open_page(context, site)
    ask(page, "endless")
    expect(answers(page).last).to_contain_text("0 1 2 3")
    page.locator("#new-chat").click()
    expect(answers(page)).to_have_count(0)
    ask(page, "quick one")
    expect(answers(page).last).to_contain_text("You said: quick one")
    expect(page.get_by_test_id("user")).to_have_count(1)
    page.locator("#chats label", has_text="endless").click()
    expect(answers(page).last).to_contain_text("0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20")
    page.get_by_test_id("stop-button").click()
    settled(page)
    expect(answers(page).last.locator("small.stats")).to_contain_text("stopped")


def test_a_closed_tab_ends_its_answer_and_keeps_the_text(
    site: str, context: BrowserContext, open_page: Open, host: ScriptedHost
) -> None:
    page = open_page(context, site)
    ask(page, "endless")
    expect(answers(page).last).to_contain_text("0 1 2 3")
    page.close()
    deadline = time.monotonic() + 10
    while host.waiting and time.monotonic() < deadline:
        time.sleep(0.05)
    assert host.waiting == 0
    again = open_page(context, site)
    expect(answers(again).last).to_contain_text("0 1 2 3")
    expect(answers(again).last.locator("small.stats")).to_contain_text("stopped")


def test_thoughts_are_folded(site: str, context: BrowserContext, open_page: Open) -> None:
    page = open_page(context, site)
    ask(page, "think")
    settled(page)
    expect(answers(page).last).to_contain_text("then I speak")
    expect(page.locator(".thought-group")).to_contain_text("Thought")
    expect(page.get_by_text("first I think")).to_be_hidden()
    page.locator(".thought-group .title").click()
    expect(page.get_by_text("first I think")).to_be_visible()


@pytest.mark.parametrize(
    ("question", "said"), [("die", "starts it again"), ("fail", "Send it again"), ("crash", "id ")]
)
def test_a_failure_is_a_notice_in_the_chat_and_the_next_question_is_answered(
    site: str, context: BrowserContext, open_page: Open, question: str, said: str
) -> None:
    page = open_page(context, site)
    ask(page, question)
    settled(page)
    expect(answers(page).last.locator("small.error")).to_contain_text(said)
    assert "passwd" not in page.content()
    ask(page, "hello")
    settled(page)
    expect(answers(page).last).to_contain_text("You said: hello")


def test_a_chinese_browser_gets_chinese(site: str, visitor: Visitor, open_page: Open) -> None:
    page = open_page(visitor("zh-CN"), site)
    expect(page.locator("#new-chat")).to_have_text("新对话")
    expect(page.locator("#message textarea")).to_have_attribute("placeholder", "输入消息")
    expect(page.get_by_role("tab", name="微调")).to_be_visible()
    expect(page.locator(".placeholder h2")).to_have_text("想了解什么？")
    page.locator(".example", has_text="内存不够怎么办").click()
    settled(page)
    expect(answers(page).last).to_contain_text("内存不够怎么办")
    expect(answers(page).last.locator("small.stats")).to_contain_text("词元/秒")


def test_the_conversation_can_be_taken_along(site: str, context: BrowserContext, open_page: Open) -> None:
    page = open_page(context, site)
    ask(page, "show")
    settled(page)
    with page.expect_download() as markdown:
        page.locator("#get-markdown").click()
    text = markdown.value.path().read_text(encoding="utf-8")
    assert "## User\n\nshow" in text and "    scale = max" in text and "<small" not in text
    with page.expect_download() as data:
        page.locator("#get-json").click()
    assert [turn["role"] for turn in json.loads(data.value.path().read_text())["turns"]] == ["user", "assistant"]


def test_a_copied_answer_is_the_answer_alone(site: str, visitor: Visitor, open_page: Open) -> None:
    page = open_page(visitor(permissions=["clipboard-read", "clipboard-write"]), site)
    ask(page, "hello")
    settled(page)
    page.get_by_label("Copy message").last.click()
    page.wait_for_timeout(200)
    assert page.evaluate("navigator.clipboard.readText()") == "You said: hello . That is what I heard"


def test_sampling_system_prompt_and_model_are_set_in_the_sidebar(
    site: str, context: BrowserContext, open_page: Open, host: ScriptedHost
) -> None:
    page = open_page(context, site)
    page.locator("#sampling-drawer button.label-wrap").click()
    page.locator("#temperature textarea, #temperature input").fill("0.3")
    page.locator("#system-drawer button.label-wrap").click()
    page.locator("#system textarea").fill("Answer as a pirate.")
    ask(page, "hello")
    settled(page)
    assert host.samplings[-1].temperature == 0.3
    assert host.samplings[-1].top_p is None
    assert host.asked[-1][0]["content"] == "Answer as a pirate."
    page.locator("#temperature textarea, #temperature input").fill("hot")
    page.locator("#message textarea").fill("again")
    page.locator("#message textarea").press("Enter")
    expect(page.locator(".toast-body")).to_contain_text("not a number")
    page.locator("#temperature textarea, #temperature input").fill("")

    page.reload()
    page.locator("#model-drawer button.label-wrap").click()
    expect(page.locator("#model input")).to_have_value("guide")
    page.locator("#low-bit input").click()
    page.get_by_role("option", name="nf4").click()
    page.locator("#load").click()
    expect(page.locator("#model-report")).to_contain_text("guide is loaded in nf4")
    expect(page.locator(".top summary")).to_contain_text("nf4")
    ask(page, "which format?")
    settled(page)
    expect(answers(page).last.locator("small.notice")).to_contain_text("From here on guide (nf4) answers.")


EVIL = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "![x](https://evil.example/?q=1)",
    "[click](javascript:alert(1))", "<iframe src='https://evil.example'></iframe>", "<svg onload=alert(1)>",
    "<a href='jav&#x09;ascript:alert(1)'>x</a>", "$\\href{javascript:alert(1)}{x}$",
    "<style>@import '//evil.example'</style>",
    "<details open ontoggle=alert(1)>", "<math><mtext><img src=x onerror=alert(1)></mtext></math>",
    "<form action='https://evil.example'><button>x</button></form>",
    "<base href='https://evil.example/'>",
    "<link rel=stylesheet href='https://evil.example/x.css'>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
)  # fmt: skip


def test_hostile_text_does_nothing(site: str, context: BrowserContext, open_page: Open, watch: Watch) -> None:
    page = open_page(context, site)
    page.locator("#system-drawer button.label-wrap").click()
    page.locator("#system textarea").fill(EVIL[1])
    for text in ("\n\n".join(EVIL), *EVIL):
        ask(page, "say:" + text)
        settled(page)
    for link in page.locator("#chatbot a").all():
        assert not (link.get_attribute("href") or "").strip().lower().startswith("javascript")
    page.reload()
    settled(page)
    page.wait_for_timeout(500)
    assert page.url.startswith(site)
    assert (watch.dialogs, watch.outside) == ([], [])


def test_each_chat_has_its_own_adapter(
    context: BrowserContext, open_page: Open, tmp_path: Path, host: ScriptedHost, watch: Watch
) -> None:
    for name, base in (("quotes", "guide"), ("stories", "guide"), ("lost", "elsewhere")):
        write_adapter(tmp_path / "adapters" / name, base)
    port = free_port()
    with serve(tmp_path, host, port=port) as url:
        page = open_page(context, url)
        page.locator("#model-drawer button.label-wrap").click()
        wear(page, "quotes", offered=["none: the model as it is", "quotes", "stories"])
        expect(page.locator(".top summary")).to_contain_text("guide + quotes")
        ask(page, "one")
        settled(page)
        wear(page, "stories")
        ask(page, "two")
        settled(page)
        expect(answers(page).last.locator("small.notice")).to_contain_text("guide + stories (sym_int4) answers")
        page.locator("#new-chat").click()
        expect(page.locator("#adapter input")).to_have_value("none: the model as it is")
        expect(page.locator(".top summary")).not_to_contain_text("+")
        ask(page, "three")
        settled(page)
        expect(page.locator("#chats label")).to_have_text(["three", "one"])
        page.locator("#chats label", has_text="one").click()
        expect(page.locator("#adapter input")).to_have_value("stories")
        expect(page.locator(".top summary")).to_contain_text("guide + stories")
        page.close()
    assert host.worn == ["quotes", "stories", ""]
    shutil.rmtree(tmp_path / "adapters" / "stories")
    again = ScriptedHost()
    with serve(tmp_path, again, port=port) as url:
        page = open_page(context, url)
        expect(page.locator("#chats label")).to_have_text(["three", "one"])
        page.locator("#chats label", has_text="one").click()
        expect(page.locator(".top summary")).to_contain_text("guide + stories")
        ask(page, "four")
        settled(page)
        expect(answers(page).last.locator("small.notice").first).to_contain_text("stories is not here any more")
        expect(page.locator(".top summary")).not_to_contain_text("+")
    assert again.worn == [""]
    assert watch.errors == []


def test_an_adapter_of_another_model_loads_that_first(
    context: BrowserContext, open_page: Open, tmp_path: Path, host: ScriptedHost
) -> None:
    write_adapter(tmp_path / "adapters" / "quotes", "guide")
    with serve(tmp_path, host, model="llama") as url:
        page = open_page(context, url)
        expect(page.locator(".top summary")).to_contain_text("llama")
        page.locator("#model-drawer button.label-wrap").click()
        wear(page, "guide + quotes")
        expect(page.locator(".top summary")).to_contain_text("guide + quotes")
        expect(page.locator("#model input")).to_have_value("guide")
        ask(page, "one")
        settled(page)
    assert host.worn == ["quotes"]


def wear(page: Page, label: str, offered: list[str] | None = None) -> None:
    """Choose an adapter for the open chat."""
    page.locator("#adapter input").click()
    if offered:
        expect(page.get_by_role("option")).to_have_text([re.compile(f"{re.escape(name)}$") for name in offered])
    page.get_by_role("option").filter(has_text=re.compile(rf"{re.escape(label)}$")).click()
    expect(page.locator("#adapter input")).to_have_value(label.rpartition(" + ")[2])
