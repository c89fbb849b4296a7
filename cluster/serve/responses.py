"""Whole answers as ASGI messages: JSON bodies and errors."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.serve.errors import ApiError
from cluster.serve.sse import encode_json

JSON = "application/json"


def json_response(body: Any, status: int = 200) -> Response:
    """An answer with a JSON body."""
    return Response(encode_json(body), status, media_type=JSON)


def error_response(error: ApiError) -> Response:
    """The answer for an error."""
    return Response(encode_json(error.body), error.status, headers=error.headers, media_type=JSON)


async def send_error(error: ApiError, send: Send) -> None:
    """Send the answer for an error, from a middleware."""
    response = error_response(error)
    await send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": False})


class NoAnswer(Response):
    """Sends nothing: the client has left."""

    def __init__(self) -> None:
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...
