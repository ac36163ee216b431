"""The whole of it: `python app.py`, its worker, a real model in low bit, and Chromium before it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import Watch, answers, ask, settled
from tests.serving import free_port

ROOT = Path(__file__).parents[2]
Open = Callable[[BrowserContext, str], Page]


@dataclass
class Server:
    """A running app.py."""

    url: str
    process: subprocess.Popen[str]

    def children(self) -> list[int]:
        """The processes that hold a model."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout
        return [int(number) for number in found.split()]


@pytest.fixture
def server(stories: Path, tmp_path: Path) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "app.py", "--port", str(port), "--home", str(tmp_path), "--model", str(stories)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "ready" in process.stdout.readline()
        yield Server(f"http://127.0.0.1:{port}", process)
        process.send_signal(signal.SIGINT)
        process.wait(15)


def test_a_model_in_low_bit_answers_and_survives_its_process_being_killed(
    server: Server, context: BrowserContext, open_page: Open, watch: Watch
) -> None:
    page = open_page(context, server.url)
    expect(page.locator(".top summary")).to_contain_text("stories260K-hf · sym_int4 · cpu", timeout=90_000)
    ask(page, "Once upon a time")
    expect(answers(page).last).to_contain_text(",")
    before = server.children()
    for child in before:
        os.kill(child, signal.SIGKILL)
    expect(answers(page).last.locator("small.error")).to_contain_text("killed by the system")
    settled(page)
    ask(page, "The little dog")
    expect(answers(page).last.locator("small.stats")).to_contain_text("first token", timeout=90_000)
    assert len(server.children()) == 1
    assert server.children() != before
    assert (watch.outside, watch.dialogs, watch.errors) == ([], [], [])
