"""What happens in the tab's last step: a comparison, a merge, a chat with what was made.

As `finetune_ui.wiring`, which stands for the steps before.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import gradio as gr

from finetune_ui.handling import PRIVATE, QUICK, Handling, say_from
from finetune_ui.scene import Changes
from nibble.errors import NibbleError
from nibble.wishes import Compare, Merge
from parts.console import command
from parts.scripts import SAVE_FILE
from parts.view import told


class Aftermath(Handling):
    """The handlers of what comes after a training."""

    def wire(self) -> None:
        """Attach every handler."""
        w, after, here, work = self.w, self.w.after, self.here, self.scene.working
        file = w.settings.file
        comparing: list[Any] = [after.adapter, after.prompts, after.checkpoints, after.tokens]
        merging: list[Any] = [after.adapter, after.out, after.formats]
        after.compare.click(self.compare, [*comparing, *here], [after.said, *work], **PRIVATE)
        after.merge.click(self.merge, [*merging, *here], [after.merge_said, *work], **PRIVATE)
        gr.on([each.change for each in comparing], self.compare_line, comparing, after.compare_line, **QUICK)
        gr.on([each.change for each in merging], self.merge_line, merging, after.merge_line, **QUICK)
        after.chat.click(
            self.chat, after.adapter, [after.chat, after.merge_said, self.frame.status, self.frame.tabs], **PRIVATE
        )
        after.save.click(self.save_report, None, [file, after.said], **PRIVATE).then(
            None, file, None, js=SAVE_FILE, **PRIVATE
        )

    async def compare(
        self, request: gr.Request, adapter: str, prompts: str, steps: Sequence[Any], tokens: str, *here: Any
    ) -> Changes:
        """The button that compares."""
        if not adapter:
            return self._none(request, self.w.after.said)
        start = lambda: self.operator.compare(_compare(adapter, prompts, steps, tokens))  # noqa: E731
        return await self.begin(request, self.w.after.said, start, here)

    def _none(self, request: gr.Request, said: gr.HTML) -> Changes:
        return {said: told(say_from(request).plain("no_adapter"), wrong=True)}

    async def compare_line(self, adapter: str, prompts: str, steps: Sequence[Any], tokens: str) -> str:
        """The same in the console; nothing while the fields make no wish."""
        return self._line("compare", lambda: _compare(adapter, prompts, steps, tokens).spec())

    async def merge(self, request: gr.Request, adapter: str, out: str, low_bit: Sequence[str], *here: Any) -> Changes:
        """The button Merge."""
        if not adapter:
            return self._none(request, self.w.after.merge_said)
        wish = Merge(adapter, out or "", low_bit or ())
        return await self.begin(request, self.w.after.merge_said, lambda: self.operator.merge(wish), here)

    async def merge_line(self, adapter: str, out: str, low_bit: Sequence[str]) -> str:
        """The same in the console."""
        return self._line("merge", lambda: Merge(adapter or "", out or "", low_bit or ()).spec())

    def _line(self, task: str, spec: Callable[[], dict[str, Any]]) -> str:
        try:
            made = spec()
        except NibbleError:
            return ""
        return command(task, made | self.operator.surroundings) if made.get("adapter") else ""

    async def chat(self, request: gr.Request, name: str) -> AsyncIterator[Changes]:
        """The button that loads an adapter's base, puts it on, and leads to the chat."""
        say, w = say_from(request), self.w.after
        if not name:
            yield self._none(request, w.merge_said)
            return
        yield {w.merge_said: told(say.plain("loading_now", model=name)), w.chat: gr.update(interactive=False)}
        changes = await self.load(request, name, w.merge_said, say, worn=name)
        yield changes | {w.chat: gr.update(interactive=True)}

    async def save_report(self, request: gr.Request) -> Changes:
        """The button that gives the latest comparison as a page."""
        w, say = self.w, say_from(request)
        try:
            report = await asyncio.to_thread(self.operator.compare_report)
        except Exception as error:  # noqa: BLE001 - the border of the page
            return {w.settings.file: None, w.after.said: self.refused(error, say)}
        file = {"name": "compare.html", "type": "text/html", "text": report["html"]}
        return {w.settings.file: file, w.after.said: ""}


def _compare(adapter: str, prompts: str, steps: Sequence[Any], tokens: str) -> Compare:
    longest: Any = (tokens or "").strip() or None
    longest = int(longest) if isinstance(longest, str) and longest.isdecimal() else longest
    return Compare(adapter or "", checkpoints=list(steps or ()), prompts=prompts or "", max_new_tokens=longest)
