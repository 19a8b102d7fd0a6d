"""How the page is served: launch settings, security headers, the visitor's cookie, health and downloads.

Gradio sends neither a content security policy nor `nosniff` by itself, and serves files of its working
folder: so the page runs in an empty one, and the data folder is blocked.
"""

from __future__ import annotations

import ipaddress
import os
import tempfile

import gradio as gr
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ui.desk import Desk
from ui.downloads import Downloads
from ui.edge import COOKIE, NAME, new_visitor
from ui.theme import ASSETS, head, theme

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)
YEAR = 365 * 86_400


def address() -> tuple[str, int]:
    """Where to listen: GRADIO_SERVER_NAME or HOST, GRADIO_SERVER_PORT or PORT; 127.0.0.1:7860 without."""
    host = os.environ.get("GRADIO_SERVER_NAME") or os.environ.get("HOST") or "127.0.0.1"
    port = os.environ.get("GRADIO_SERVER_PORT") or os.environ.get("PORT") or "7860"
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise SystemExit(f"PORT must be a number from 1 to 65535, got {port!r}.")
    return host, int(port)


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if os.environ.get("MAQUETTE_TRUST_VISITORS") == "1":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(page: gr.Blocks, desk: Desk, host: str, port: int, *, block: bool = True) -> None:
    """Launch the page and, with `block`, stay until the server is stopped."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    home = desk.store.home
    with tempfile.TemporaryDirectory(prefix="maquette-") as empty:
        os.chdir(empty)
        app, _, _ = page.queue(max_size=256, default_concurrency_limit=8).launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
            footer_links=[], max_file_size="1mb", state_session_capacity=200, blocked_paths=[str(home)],
            allowed_paths=[], favicon_path=str(ASSETS / "logo.svg"), theme=theme(),
            head=head(), show_error=False, mcp_server=False,
            app_kwargs={"docs_url": None, "redoc_url": None, "middleware": [Middleware(Guard)]},
        )  # fmt: skip
        app.router.routes[0:0] = [Route("/healthz", health), *Downloads(desk).routes()]
        if block:
            page.block_thread()


async def health(request: Request) -> Response:
    """Alive."""
    return JSONResponse({"status": "ok"})


class Guard:
    """Middleware: security headers on every answer, and a visitor's cookie with the page itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        known = bool(NAME.fullmatch(request.cookies.get(COOKIE, "")))
        page = request.method == "GET" and scope["path"] == "/"

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message.setdefault("headers", [])
                for name, value in _headers().items():
                    headers.append((name.encode(), value.encode()))
                if page and not known:
                    headers.append((b"set-cookie", _cookie(request).encode()))
            await send(message)

        await self._app(scope, receive, guarded)


def _headers() -> dict[str, str]:
    return {
        "content-security-policy": POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "same-origin",
        "permissions-policy": "camera=(), microphone=(), geolocation=()",
    }


def _cookie(request: Request) -> str:
    """Ours, hidden from scripts. Behind HTTPS it may be framed, as Spaces frame their pages."""
    secure = request.headers.get("x-forwarded-proto", request.url.scheme).split(",")[0] == "https"
    scope = "SameSite=None; Secure; Partitioned" if secure else "SameSite=Lax"
    return f"{COOKIE}={new_visitor()}; Path=/; Max-Age={YEAR}; HttpOnly; {scope}"
