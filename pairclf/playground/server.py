"""The server of `pairclf try`: one page on 127.0.0.1, behind a random token, that keeps and sends nothing."""

from __future__ import annotations

import secrets
import socket
import webbrowser
from asyncio import CancelledError
from collections.abc import Callable
from importlib.util import find_spec
from threading import Thread
from typing import TYPE_CHECKING, Any

from pairclf.console import console, stdout
from pairclf.errors import ConfigError, PairclfError
from pairclf.files import parsed
from pairclf.playground.page import page
from pairclf.playground.verdict import Json, Playground
from pairclf.signals import signals

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOST = "127.0.0.1"
"""The only address that is listened on: no other machine reaches it."""

MAX_BODY = 1 << 22
"""Bytes of a request, at most: about 500,000 tokens."""

TICK = 0.2
"""Seconds between two looks for a signal."""

PACKAGES = ("anyio", "starlette", "uvicorn")

HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",  # the rest stands in the page itself
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def require_extra() -> None:
    """Refuse to start without the packages of `pairclf[try]`.

    Raises:
        ConfigError: a package is not installed.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ConfigError(f"pairclf try needs {', '.join(missing)}", remedy="pip install 'pairclf[try]'")


class Guard:
    """Answers the requests of its own page alone, and adds `HEADERS` to each answer.

    Pages of other sites can send requests to 127.0.0.1 too. Their header `Origin` names the other site. If such a site
    resolves its own name to 127.0.0.1 (DNS rebinding), the header `Host` has that name.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import Headers
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        is_own = host.partition(":")[0] in (HOST, "localhost")
        has_own_origin = origin == f"http://{host}" if origin is not None else scope["method"] != "POST"
        if not (is_own and has_own_origin):
            await PlainTextResponse("this page answers its own address alone", 403)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        await self._app(scope, receive, send_with_headers)


def create_app(playground: Playground, token: str) -> Starlette:
    """The application: the page at `/TOKEN/`, and what it asks for below; everything else is not found.

    Requests wait for each other, as a judge is not thread-safe.
    """
    from anyio import CapacityLimiter, to_thread
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.body_limit import RequestBodyLimitMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Mount, Route

    html = page(playground.form)
    one_at_a_time = CapacityLimiter(1)

    async def show(request: Request) -> HTMLResponse:
        return HTMLResponse(html)

    def answered_by(work: Callable[[Any], Json]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> JSONResponse:
            try:
                asked = parsed(await request.body())
            except (ValueError, ClientDisconnect):  # of who has gone away, nobody reads the answer
                return JSONResponse({"error": "the request is no JSON"}, 400)
            try:
                # Abandoned when the server ends, which may be long before a large model is done.
                result = await to_thread.run_sync(work, asked, limiter=one_at_a_time, abandon_on_cancel=True)
                return JSONResponse(result)
            except PairclfError as error:
                return JSONResponse({"error": str(error)}, 422)
            except CancelledError:
                return JSONResponse({"error": "the server has ended"}, 503)

        return answer

    routes = [
        Route("/", show),
        Route("/verdict", answered_by(playground.verdict), methods=["POST"]),
        Route("/row", answered_by(playground.row), methods=["POST"]),
    ]
    limits = [Middleware(Guard), Middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY)]
    return Starlette(routes=[Mount(f"/{token}", routes=routes)], middleware=limits)


def serve(playground: Playground, *, port: int = 0, browser: bool = False) -> None:
    """Load the models, and serve the page until Ctrl-C, SIGTERM or the end of the terminal.

    Args:
        playground: what the page shows.
        port: to listen on; 0: any that is free.
        browser: open the page in a browser.

    Raises:
        ConfigError: the port is taken.
        DataError, BundleError, ModelError: the file or a model can't be loaded.
    """
    import uvicorn

    with _bound(port) as listener:
        with console.status("loading"):
            playground.warm_up()
        token = secrets.token_urlsafe()
        config = uvicorn.Config(
            create_app(playground, token),
            lifespan="off",
            ws="none",
            access_log=False,
            log_config=None,
            log_level="error",
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        # Not in this thread, where it would answer signals itself. It and the threads that it starts are daemons, as an
        # abandoned verdict must not keep the process.
        thread = Thread(target=server.run, args=([listener],), daemon=True)
        with signals() as caught:
            listener.listen()  # whoever is faster than the server waits for it
            thread.start()
            address = f"http://{HOST}:{listener.getsockname()[1]}/{token}/"
            stdout.print(address)
            console.print("for this machine alone; nothing that is typed is kept or sent on. Ctrl-C ends it")
            if browser:
                webbrowser.open(address)
            while thread.is_alive() and not caught.asked():
                thread.join(TICK)
            server.should_exit = True
            thread.join()


def _bound(port: int) -> socket.socket:
    """A socket with this port of `HOST`."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except (OSError, OverflowError) as error:
        listener.close()
        what = f"--port {port} of {HOST} can't be had: {error}"
        raise ConfigError(what, remedy="give another port, or 0 for any that is free") from error
    return listener
