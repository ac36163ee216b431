"""The page: builds it, serves it behind the guard, and ends it cleanly. The only file that knows all tabs.

Promises that this process never imports torch, fetches nothing from another host, and answers nobody whom
`nibble.hosting` does not admit. Knows nothing of how a model answers: that is `nibble.engines.host`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import logging
import os
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
import uvicorn
from fastapi import FastAPI

import chat
import finetune_ui
import models_ui
from nibble import hosting, publish
from nibble.commands.border import guarded, quiet_logs
from nibble.config import Settings, add_flags, settings_from
from nibble.doorstep import Doorstep
from nibble.engines.bigdl import judge
from nibble.errors import NibbleError
from nibble.library import ADAPTERS, MODELS, find
from nibble.lowbit.formats import resolve
from nibble.operator import Operator
from nibble.throttle import LoginThrottle
from nibble.words import LANGUAGES
from parts.words import WORDS as SHARED_WORDS

LOOK = Path(__file__).parent / "look"
FLAGS = ["host", "port", "root_path", "home", "model", "low_bit", "device"]
TABS = (chat, models_ui, finetune_ui)
SANS = (
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Roboto",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans CJK SC",
    "sans-serif",
)
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")

SHUTDOWN_S = 1
"""How long open streams may take to end after Ctrl+C."""


def theme() -> gr.themes.Base:
    """One look for all tabs: system fonts, one accent, few lines."""
    accent = gr.themes.Color(
        "#f0faf8", "#d9f2ee", "#b3e4dc", "#80d0c5", "#48b3a6", "#1f9488", "#0f766e", "#0f5f59", "#114c48", "#123f3c",
        "#062523", name="accent",
    )  # fmt: skip
    return gr.themes.Base(
        primary_hue=accent, secondary_hue=accent, neutral_hue="zinc", radius_size="lg", font=SANS, font_mono=MONO
    ).set(
        color_accent="*primary_600",
        color_accent_soft="*primary_50",
        color_accent_soft_dark="#15302d",
        body_background_fill="#ffffff",
        body_background_fill_dark="#18181a",
        background_fill_secondary="#f7f7f6",
        background_fill_secondary_dark="#202023",
        block_background_fill_dark="#202023",
        border_color_primary="#e6e5e3",
        border_color_primary_dark="#343437",
        body_text_color="#1f2124",
        body_text_color_dark="#e8e8e6",
        body_text_color_subdued="#6d6f73",
        body_text_color_subdued_dark="#a0a1a5",
        input_background_fill="#ffffff",
        input_background_fill_dark="#1e1e21",
        input_border_color="#e0dfdc",
        input_border_color_dark="#3a3a3e",
        input_border_color_focus="*primary_500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_text_color="#ffffff",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_dark="#26262a",
        link_text_color="*primary_600",
        link_text_color_dark="*primary_400",
        block_border_width="1px",
        block_shadow="none",
    )


def words() -> gr.I18n:
    """The fixed labels of all tabs. Browsers send zh-CN and the like; Gradio asks for that name first."""
    tables: dict[str, dict[str, str]] = {language: {} for language in LANGUAGES}
    for words in (SHARED_WORDS, *(tab.WORDS for tab in TABS)):
        for language in LANGUAGES:
            tables[language].update(words.of(language))
    return gr.I18n(en=tables["en"], zh=tables["zh"], **{"zh-CN": tables["zh"], "zh-TW": tables["zh"]})


def build_app(settings: Settings, host: chat.Host | None = None, config: str = "") -> gr.Blocks:
    """The page, not yet served.

    Args:
        settings: what is set.
        host: whoever holds the model; None makes the real one, with nothing loaded yet.
        config: absolute path of the settings file that was named; empty where none was.
    """
    holder = host or _host(settings)
    return _build(settings, holder, Operator(holder, settings, config), words())


def _host(settings: Settings) -> chat.Host:
    from nibble.engines.host import ModelHost

    return ModelHost(settings)


def _build(settings: Settings, host: chat.Host, operator: Operator, i18n: gr.I18n) -> gr.Blocks:
    with gr.Blocks(title="Nibble", fill_height=True, fill_width=True, analytics_enabled=False) as page:
        status = gr.HTML(elem_id="top", container=False, padding=False)
        # First, so that they get their names: the page's own events are named after their functions.
        models_ui.build_endpoints(operator, public=settings.public)
        if not settings.public:
            finetune_ui.build_endpoints(operator)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab(i18n("chat"), elem_id="chat-tab", id="chat") as talking:
                talk = chat.build(chat.Frame(i18n, page, talking, status), host, operator, settings)
            if not settings.public:
                with gr.Tab(i18n("models"), elem_id="models-tab", id="models") as shelf:
                    frame = models_ui.Frame(i18n, shelf, status, talk.standing)
                    bench = models_ui.build(frame, operator)
            with gr.Tab(i18n("finetune"), elem_id="finetune-tab", id="finetune") as teaching:
                if settings.public:
                    finetune_ui.build_public(i18n)
                else:
                    around = finetune_ui.Frame(i18n, teaching, tabs, status, talk.standing, talk.wear)
                    school = finetune_ui.build(around, operator)
        if not settings.public:
            bench.rest_behind(talking, teaching)
            school.rest_behind(talking, shelf)
    # The engine's own queue decides whose turn it is; Gradio's only keeps a flood of calls out.
    page.queue(max_size=settings.queue_size, default_concurrency_limit=None, api_open=False)
    return page


def build_server(settings: Settings, host: chat.Host | None = None, config: str = "") -> hosting.Guard:
    """The whole server as an ASGI application: guard, doorstep, /health, the page. Loads the model once it runs.

    Arguments are as `build_app`'s.

    Raises:
        NibbleError: settings that must not be served.
    """
    hosting.check_binding(settings)
    address = hosting.parse_root_path(settings.root_path, settings.port)
    holder, i18n = host or _host(settings), words()
    page = _build(settings, holder, Operator(holder, settings, config), i18n)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(chat.load_first(holder, settings))
        try:
            yield
        finally:
            loading.cancel()
            await asyncio.to_thread(holder.close)

    server = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)

    # POST too: it carries the browser's Origin, so that the page learns whether its calls are let in.
    @server.api_route("/health", methods=["GET", "POST"])
    def health() -> dict[str, str]:
        return {"status": "ok", "model": holder.state}

    gr.mount_gradio_app(
        server, page, path="", server_name=settings.host, server_port=settings.port,
        footer_links=[], run_history=False, app_kwargs={"openapi_url": None, "docs_url": None, "redoc_url": None},
        auth=_login(settings.auth) if settings.auth else None, root_path=address.root_path, allowed_paths=[],
        blocked_paths=[str(settings.home_folder.resolve())], show_error=False,
        max_file_size=hosting.MOST_UPLOAD, ssr_mode=False, enable_monitoring=False, pwa=False, i18n=i18n,
        mcp_server=False, theme=theme(),
        css="\n".join(sheet.read_text(encoding="utf-8") for sheet in sorted(LOOK.glob("*.css"))),
        js=(LOOK / "page.js").read_text(encoding="utf-8"),
        head=(LOOK / "head.html").read_text(encoding="utf-8"),
    )  # fmt: skip
    return hosting.Guard(LoginThrottle(Doorstep(server)), settings)


def _login(auth: str) -> Callable[[str, str], bool]:
    """Whether a name and password are the ones set; takes the same time for every wrong one."""
    wanted = auth.encode()
    return lambda name, password: secrets.compare_digest(f"{name}:{password}".encode(), wanted)


class _Server(uvicorn.Server):
    """Says where the page is once it can be opened, and ends without a word about the streams that it cuts."""

    public = ""
    """Where a proxy serves the page, where that was set."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            place = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
            public = f", in public {self.public}/" if self.public else ""
            print(f"Nibble is ready at {place}{public}", flush=True)  # noqa: T201

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Every open page holds a stream; cutting it is no error."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def listen(settings: Settings) -> socket.socket:
    """A socket on the address set.

    Raises:
        NibbleError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    door = socket.socket(family, socket.SOCK_STREAM)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((settings.host.strip("[]"), settings.port))
        door.listen(128)
    except OSError as error:
        door.close()
        if error.errno == errno.EADDRINUSE:
            raise NibbleError(
                f"Port {settings.port} on {settings.host} is already in use.",
                f"Stop the other program, or choose another port: --port {settings.port % 65_535 + 1}.",
            ) from None
        raise NibbleError(
            f"Cannot listen on {settings.host}, port {settings.port}: {error.strerror}.", "Set host and port anew."
        ) from None
    return door


def check_model(settings: Settings) -> None:
    """Refuse a model that cannot be loaded before the page is opened, as far as its files and its format tell.

    Raises:
        NibbleError: what is wrong with it.
    """
    resolve(settings.low_bit)
    folder = find(settings.model, settings.home_folder, paths=True)
    judge(folder, folder.name, trusted=folder.name in settings.trust_remote_code, settings=settings)


def run(settings: Settings, config_file: str = "") -> None:
    """Serve the page until Ctrl+C or SIGTERM.

    Args:
        settings: what is set.
        config_file: absolute path of the settings file that was named, which jobs read too; empty where none was.

    Raises:
        NibbleError: settings that must not be served, a model that cannot be loaded, an address that is not free.
    """
    hosting.check_binding(settings)
    public = hosting.parse_root_path(settings.root_path, settings.port).root_path
    check_model(settings)
    door = listen(settings)
    for kind in (MODELS, ADAPTERS):
        publish.clean_all(settings.home_folder / kind)
    config = uvicorn.Config(
        build_server(settings, config=config_file), log_config=None, log_level="warning", access_log=False, ws="none",
        timeout_graceful_shutdown=SHUTDOWN_S, server_header=False,
    )  # fmt: skip
    server = _Server(config)
    server.public = public
    server.run(sockets=[door])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the page and return the exit code of the command line."""
    quiet_logs()
    parser = argparse.ArgumentParser(prog="python app.py", description="Nibble's page: chat with a model in low bit.")
    add_flags(parser, FLAGS)
    arguments = parser.parse_args(argv)
    config = str(Path(arguments.config).resolve()) if arguments.config else ""
    return guarded(lambda: run(settings_from(arguments), config))


if __name__ == "__main__":
    sys.exit(main())
