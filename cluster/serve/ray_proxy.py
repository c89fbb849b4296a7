"""A middleware for Ray Serve's proxy: it answers in place of a replica that dies amid a request.

Serve's own answer is a plain 500, or a stream that is cut off. Its proxies take middlewares from the environment that they are
started with (``ray start``, or the process that starts Ray):

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=cluster.serve.ray_proxy:middlewares
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.serve.errors import unavailable
from cluster.serve.responses import send_error
from cluster.serve.sse import DONE, EVENTS_TYPE, event

LOST = "the service's process has ended amid this request, and another one takes its place; try again"


def middlewares() -> list[Middleware]:
    """The middlewares; each of Serve's proxies calls it once."""
    return [Middleware(LostReplicas)]


class LostReplicas:
    """Ends the answers that the application behind it doesn't end: by status 503, or by a stream's last event.

    An answer that is neither a stream of events nor yet to begin stays cut off.

    Args:
        app: the application; Serve's proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = ended = events = False

        async def send_noting(message: Message) -> None:
            nonlocal began, ended, events
            if message["type"] == "http.response.start":
                began, events = True, EVENTS_TYPE in dict(message.get("headers", ())).values()
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        await self._app(scope, receive, send_noting)
        if scope["type"] != "http" or ended:
            return
        if not began:
            await send_error(unavailable(LOST), send)
        elif events:
            await send({"type": "http.response.body", "body": event(unavailable(LOST).body) + DONE, "more_body": False})
