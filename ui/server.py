"""How the page is served: launch settings, the door before all routes, health, login and downloads.

Gradio serves files of its working folder: so the page runs in an empty one, and the data folder is blocked. What
else it serves and the page does not need is closed by `ui.guard`.
"""

from __future__ import annotations

import errno
import gc
import inspect
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import gradio as gr
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from engine.errors import MaquetteError
from engine.modes import Mode
from engine.sources import stay_in
from engine.store import scratch_of
from engine.users import UserFile
from ui.desk import Desk
from ui.downloads import Downloads
from ui.guard import Guard, house
from ui.kept import Kept
from ui.login import Door
from ui.theme import ASSETS, head, theme
from ui.translated import InLanguage
from ui.visitors import Anyone, Members, Signed, Visitors, secret
from ui.wording import say


def address() -> tuple[str, int]:
    """Where to listen: GRADIO_SERVER_NAME or HOST, GRADIO_SERVER_PORT or PORT; 127.0.0.1:7860 without.

    A Space is reached through its proxy, from elsewhere.
    """
    usual = "0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1"
    host = os.environ.get("GRADIO_SERVER_NAME") or os.environ.get("HOST") or usual
    port = os.environ.get("GRADIO_SERVER_PORT") or os.environ.get("PORT") or "7860"
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise SystemExit(f"PORT must be a number from 1 to 65535, got {port!r}.")
    return host, int(port)


def visitors(desk: Desk) -> Visitors:
    """How this server tells its visitors apart."""
    if desk.mode is Mode.TEAM:
        return Members(UserFile(desk.store.home))
    return Signed(secret(desk.store.home)) if desk.mode is Mode.PUBLIC else Anyone()


def check_free(host: str, port: int) -> None:
    """Refuse an address on which nobody can listen, before anything is started.

    Raises:
        MaquetteError: another program has it, or this machine does not.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server itself does
            probe.bind(place)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise MaquetteError(say("error.port_taken" if taken else "error.no_address", host=host, port=port)) from None


def serve(page: gr.Blocks, desk: Desk, host: str, port: int, *, block: bool = True) -> None:
    """Launch the page and, with `block`, stay until the server is stopped."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(1 << 30)  # else each event makes a table for a page we close
    remember_signatures(page)
    home = desk.store.home
    empty = scratch_of(home) / "page"
    empty.mkdir(parents=True, exist_ok=True)
    stay_in(Path.cwd())
    os.chdir(empty)
    page.queue(max_size=2048, default_concurrency_limit=8).launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
        footer_links=[], max_file_size="200kb", state_session_capacity=1000, blocked_paths=[str(home)],
        allowed_paths=[], favicon_path=str(ASSETS / "logo.svg"), theme=theme(),
        head=head(), show_error=False, mcp_server=False, run_history=False, enable_monitoring=False,
        app_kwargs={
            "docs_url": None, "redoc_url": None, "openapi_url": None, "lifespan": furnish(page, desk),
            "middleware": [Middleware(InLanguage)],
        },
    )  # fmt: skip
    gc.collect()
    gc.freeze()  # half a million objects that stay: to look through them again would hold everybody up for 0.3 s
    if block:
        page.block_thread()


def furnish(page: gr.Blocks, desk: Desk) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    """Our routes and the door, in their place before the first request is heard."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        known = visitors(desk)
        app.router.routes[0:0] = [
            Route("/healthz", health),
            *Downloads(desk).routes(),
            *(Door(known).routes() if isinstance(known, Members) else ()),
        ]
        # Around everything, what answers after errors too: as `middleware` it would stand behind Gradio's own.
        assert app.middleware_stack is not None
        kept = Kept(app.middleware_stack)
        app.middleware_stack = Guard(kept, house(desk.mode, desk.limits, known, uploads=takes_files(page)))
        yield

    return lifespan


def remember_signatures(page: gr.Blocks) -> None:
    """Spare Gradio to work out anew what each component's `__init__` takes: for all of them at every visitor's arrival.

    `inspect.signature` takes what it finds as `__signature__` (PEP 362); it is half of the time of an arrival.
    """
    for kind in {type(block) for block in page.blocks.values()}:
        setattr(kind.__init__, "__signature__", inspect.signature(kind.__init__))  # noqa: B010  (mypy knows no such one)


def takes_files(page: gr.Blocks) -> bool:
    """Whether a visitor can upload something anywhere on the page."""
    return any(isinstance(block, gr.File | gr.UploadButton) for block in page.blocks.values())


async def health(request: Request) -> Response:
    """Alive."""
    return JSONResponse({"status": "ok"})
