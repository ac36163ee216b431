"""What happens when a visitor does something in the Chat tab.

A handler reads the values, calls one method of the desk, and says what changes on the page. Every event here is
private; the endpoints for scripts stand in `chat.endpoints`. Knows nothing of how answers are made.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from html import escape
from typing import Any

import gradio as gr

from chat.desk import Desk
from chat.form import form_from
from chat.talk import Progress, Visitor
from chat.view import Standing, greeting, rows, status_line
from chat.widgets import Widgets
from chat.words import EXAMPLES
from nibble.chats import Conversation, to_json, to_markdown
from nibble.doorstep import visitor_of
from nibble.errors import NibbleError
from nibble.words import language_of
from parts.scripts import SAVE_FILE

PAUSE_S = 0.05
"""Between two pictures of a growing answer: more a person does not see."""

STATUS_S = 3.0

REMEMBER = """(chat) => { sessionStorage.setItem("nibble-chat", chat ?? ""); }"""
RECALL = """() => sessionStorage.getItem("nibble-chat") ?? "" """
"""Each tab knows which chat it had open when it is reloaded."""

Changes = dict[Any, Any]
"""Widget -> what becomes of it."""

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def visitor_from(request: gr.Request) -> Visitor:
    """Who calls."""
    language = language_of(request.headers.get("accept-language"))
    return Visitor(request.session_hash or "", visitor_of(request.cookies), language)


class Wiring:
    """The handlers of one page, and the widgets that they change."""

    def __init__(self, widgets: Widgets, desk: Desk, status: gr.HTML) -> None:
        self.w = widgets
        self.desk = desk
        self.status = status
        self.fields = [widgets.system, *widgets.sampling]
        self.outputs = [widgets.conversation, widgets.message, widgets.chats, widgets.system, status]
        self.adapters: Callable[[], list[tuple[str, str]]] = list
        """Labels and names of the adapters to choose from; an operator's page knows them."""
        if widgets.model:
            self.outputs.append(widgets.model.adapter)

    def wire(self) -> None:
        """Attach every handler."""
        w = self.w
        once: dict[str, Any] = {"outputs": self.outputs, **PRIVATE}
        # A new message may be sent in another chat while this one's answer is still being written.
        many = once | {"trigger_mode": "multiple"}
        w.message.submit(self.send, [w.message, *self.fields], **many)
        w.conversation.example_select(self.example, self.fields, **many)
        w.conversation.edit(self.edit, self.fields, **many)
        w.conversation.retry(self.again, self.fields, **many)
        w.conversation.undo(self.undo, None, **once)
        w.message.stop(self.stop, None, None, queue=False, **PRIVATE)
        w.new_chat.click(self.new_chat, None, **once)
        w.chats.input(self.open, w.chats, **once)
        w.delete.click(lambda: gr.Row(visible=True), None, w.really, queue=False, **PRIVATE)
        w.keep.click(lambda: gr.Row(visible=False), None, w.really, queue=False, **PRIVATE)
        w.delete_really.click(self.delete, None, [*self.outputs, w.really], **PRIVATE)
        for button, export in ((w.markdown, self.markdown), (w.json, self.json)):
            button.click(export, None, w.file, **PRIVATE).then(None, w.file, None, js=SAVE_FILE, **PRIVATE)
        w.chats.change(None, w.chats, None, js=REMEMBER, **PRIVATE)
        gr.Timer(STATUS_S).tick(self.tick, None, self.status, queue=False, **PRIVATE)

    # What the page shows.

    def picture(self, visitor: Visitor, progress: Progress) -> Changes:
        """The conversation as it stands."""
        return {self.w.conversation: gr.update(value=rows(progress.conversation, visitor.language, progress.live)[0])}

    def standing(self, visitor: Visitor) -> str:
        """The line over the tabs."""
        host = self.desk.host
        adapter = self.desk.adapter(visitor)
        standing = Standing(host.state, host.info, host.loading, host.sentence, host.waiting, adapter)
        return status_line(standing, visitor.language)

    def button(self, writing: bool, **more: Any) -> Changes:
        """The one button: Stop while an answer is being written, else Send."""
        return {self.w.message: gr.update(submit_btn=not writing, stop_btn=writing, **more)}

    async def shelf(self, visitor: Visitor, conversation: Conversation) -> Changes:
        """The list of conversations, with the open one marked."""
        entries = await self.desk.entries(visitor)
        choices = [(entry.name or visitor.say("untitled"), entry.id) for entry in entries]
        here = conversation.id if any(entry.id == conversation.id for entry in entries) else None
        return {self.w.chats: gr.update(choices=choices, value=here), self.status: self.standing(visitor)}

    def greeted(self, visitor: Visitor) -> Changes:
        """What an empty chat shows, and the line over the tabs: they change with the model."""
        host = self.desk.host
        name, form = (host.info.model, host.info.format) if host.info else (host.loading, "")
        said = greeting(name, form, visitor.language)
        return {self.w.conversation: gr.update(placeholder=said), self.status: self.standing(visitor)}

    async def scene(self, visitor: Visitor, conversation: Conversation) -> Changes:
        """Everything, for a conversation that has just been opened."""
        writing = self.desk.writes(conversation)
        changes = self.picture(visitor, Progress(conversation, "…" if writing else ""))
        changes[self.w.conversation] |= self.greeted(visitor)[self.w.conversation]
        changes[self.w.conversation] |= {"examples": [{"text": text} for text in EXAMPLES[visitor.language]]}
        changes |= self.button(writing) | await self.shelf(visitor, conversation)
        return changes | {self.w.system: conversation.system} | await self.worn(visitor)

    async def worn(self, visitor: Visitor) -> Changes:
        """Which adapters there are for the loaded model, and which of them it wears in the open conversation."""
        if not self.w.model:
            return {}
        names, here = await asyncio.to_thread(self.adapters), self.desk.adapter(visitor)
        # One that belongs to another model stays chosen, so that a person sees why the answer is a refusal.
        kept = [(here, here)] if here and here not in dict(names).values() else []
        shown = [(visitor.say("adapter_none"), ""), *names, *kept]
        return {self.w.model.adapter: gr.update(choices=shown, value=here)}

    # What a visitor does.

    async def enter(self, request: gr.Request, remembered: str) -> Changes:
        """The page was opened, or opened again by a tab that remembers its chat."""
        visitor = visitor_from(request)
        return await self.scene(visitor, await self.desk.enter(visitor, str(remembered or "")))

    async def send(self, request: gr.Request, text: str, system: str, *numbers: str) -> AsyncIterator[Changes]:
        """A message was sent."""
        visitor = visitor_from(request)
        if not text.strip():
            yield self.button(False)
            return
        async for changes in self.follow(visitor, lambda form: self.desk.say(visitor, text, form), system, numbers):
            yield changes

    async def example(
        self, request: gr.Request, event: gr.SelectData, system: str, *numbers: str
    ) -> AsyncIterator[Changes]:
        """One of the first questions was chosen."""
        async for changes in self.send(request, str(event.value["text"]), system, *numbers):
            yield changes

    async def edit(self, request: gr.Request, event: gr.EditData, system: str, *numbers: str) -> AsyncIterator[Changes]:
        """An earlier message was written anew: the conversation goes on from there."""
        visitor = visitor_from(request)
        places = rows(await self.desk.current(visitor), visitor.language)[1]
        index = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
        place = places[index] if isinstance(index, int) and 0 <= index < len(places) else len(places)
        text = str(event.value)
        async for changes in self.follow(
            visitor, lambda form: self.desk.say(visitor, text, form, place), system, numbers
        ):
            yield changes

    async def again(self, request: gr.Request, system: str, *numbers: str) -> AsyncIterator[Changes]:
        """The last message is to be answered anew."""
        visitor = visitor_from(request)
        async for changes in self.follow(visitor, lambda form: self.desk.again(visitor, form), system, numbers):
            yield changes

    async def follow(
        self, visitor: Visitor, ask: Callable[..., AsyncGenerator[Progress]], system: str, numbers: tuple[str, ...]
    ) -> AsyncIterator[Changes]:
        """Show an answer while it is written; in the background where the visitor opened another chat meanwhile."""
        shown, conversation = 0.0, None
        try:
            async with aclosing(ask(form_from(visitor, numbers, system))) as steps:
                async for progress in steps:
                    if conversation is None:
                        conversation = progress.conversation
                        yield self.picture(visitor, progress) | self.button(True, value="")
                        yield await self.shelf(visitor, conversation)
                    elif time.monotonic() - shown < PAUSE_S and progress.live:
                        continue
                    # Even an empty picture lets Gradio notice that the page was closed.
                    here = self.desk.shows(visitor, conversation)
                    yield self.picture(visitor, progress) if here else {self.status: gr.skip()}
                    shown = time.monotonic()
        except NibbleError as error:
            gr.Warning(escape(str(error)))
            yield await self.scene(visitor, await self.desk.current(visitor))
            return
        if conversation is not None and self.desk.shows(visitor, conversation):
            yield self.button(False) | await self.shelf(visitor, conversation)

    async def undo(self, request: gr.Request) -> Changes:
        """The last message and its answer are taken back; the message can be written anew."""
        visitor = visitor_from(request)
        try:
            conversation, text = await self.desk.undo(visitor)
        except NibbleError as error:
            gr.Warning(escape(str(error)))
            return await self.scene(visitor, await self.desk.current(visitor))
        changes = await self.scene(visitor, conversation)
        return changes | self.button(False, value=text)

    def stop(self, request: gr.Request) -> None:
        """The answer is to end."""
        self.desk.stop(visitor_from(request))

    async def new_chat(self, request: gr.Request) -> Changes:
        """A new conversation."""
        visitor = visitor_from(request)
        return await self.scene(visitor, self.desk.begin(visitor))

    async def open(self, request: gr.Request, chat_id: str) -> Changes:
        """Another conversation was chosen."""
        visitor = visitor_from(request)
        try:
            return await self.scene(visitor, await self.desk.open(visitor, str(chat_id)))
        except NibbleError as error:
            gr.Warning(escape(str(error)))
            return await self.scene(visitor, await self.desk.enter(visitor))

    async def delete(self, request: gr.Request) -> Changes:
        """The open conversation is to be deleted."""
        visitor = visitor_from(request)
        return await self.scene(visitor, await self.desk.delete(visitor)) | {self.w.really: gr.Row(visible=False)}

    async def markdown(self, request: gr.Request) -> dict[str, str]:
        """The open conversation as a file to read."""
        conversation = await self.desk.current(visitor_from(request))
        return {"name": f"nibble-{conversation.id}.md", "type": "text/markdown", "text": to_markdown(conversation)}

    async def json(self, request: gr.Request) -> dict[str, str]:
        """The open conversation with all that is known of it."""
        conversation = await self.desk.current(visitor_from(request))
        return {"name": f"nibble-{conversation.id}.json", "type": "application/json", "text": to_json(conversation)}

    async def tick(self, request: gr.Request) -> str:
        """The line over the tabs, now and then."""
        await asyncio.sleep(0)
        return self.standing(visitor_from(request))

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self.desk.leave(request.session_hash or "")
