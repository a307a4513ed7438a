"""Serves a page to whoever has its address, on this machine alone.

A port on loopback is open to every user of the machine, and to every web page that a browser on it
shows: by a name that resolves to 127.0.0.1 (DNS rebinding) such a page even counts as of the same
origin. So a request needs the token, and must be for the address and, if a page sends it, from it.
"""

import hmac
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = "127.0.0.1"
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; media-src 'self' data: blob:; connect-src 'self' data: blob:; "
        "font-src 'self' data:; worker-src 'self' blob:; "
        "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-dns-prefetch-control": "off",
}
"""Of every answer. Gradio's page begins with scripts of its own in the HTML."""


class Guard:
    """Lets requests with the token through to an application.

    The first visit, `/?token=...`, leaves a cookie and is sent on to the address without the token,
    which so stays out of the browser's history and of what other sites are told.

    Args:
        app: the application.
        token: what a request needs.
        port: of the server.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app, self._token = app, token
        self._hosts = [f"{LOOPBACK}:{port}", f"localhost:{port}"]
        self._cookie = f"cavmae-{port}"  # a browser has one set of cookies for all ports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        answer = self._refusal(scope)
        await (answer or self._app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        """Return what is answered instead of the application; None: it may answer."""
        if scope["type"] != "http":
            return PlainTextResponse("HTTP alone", 403)
        request = Request(scope)
        host = request.headers.get("host")
        origin = request.headers.get("origin", f"http://{host}")
        if host not in self._hosts or origin != f"http://{host}":
            return PlainTextResponse("this page is for its own address alone", 403)
        if self._is_token(request.query_params.get("token", "")):
            onward = RedirectResponse(request.url.path, 303)
            onward.set_cookie(self._cookie, self._token, httponly=True, samesite="strict")
            return onward
        if self._is_token(request.cookies.get(self._cookie, "")):
            return None
        return PlainTextResponse("open the address that `cavmae explore` printed", 401)

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self._token.encode())


def listening_socket(port: int) -> socket.socket:
    """Listen on a port of loopback; 0: a free one.

    Raises:
        OSError: it is taken.
    """
    try:
        return socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise OSError(
            f"port {port} can't be used ({error.strerror}); give another --port"
        ) from error


@contextmanager
def serving(app: ASGIApp, listening: socket.socket, token: str) -> Iterator[None]:
    """Serve an application in a thread, to requests that `Guard` lets through."""
    guard = Guard(app, token, listening.getsockname()[1])
    server = uvicorn.Server(uvicorn.Config(guard, log_level="warning", timeout_graceful_shutdown=1))
    # The server closes what it is given.
    thread = threading.Thread(target=server.run, args=([listening.dup()],), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
