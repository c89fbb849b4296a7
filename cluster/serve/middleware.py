"""The ASGI middlewares around the application: ids, summaries, and the forms of requests.

Pure ASGI: frameworks' own middlewares cost five times as much as a chunk of a stream.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.serve.errors import ApiError
from cluster.serve.request_summary import STATE, RequestSummary
from cluster.serve.responses import send_error

_ID = re.compile(rb"[\x21-\x7e]{1,128}")
LEFT = 499
"""Status in logs and metrics of a request whose client left before its answer; nginx's."""


class Records:
    """Gives each request an id and a summary, and hands the summary on at its end.

    The id is the client's ``X-Request-Id``, if it has one of up to 128 visible characters. The answer has it, too.

    Args:
        app: the application behind it.
        done: gets each request's summary.
    """

    def __init__(self, app: ASGIApp, done: Callable[[RequestSummary], None]) -> None:
        self._app, self._done = app, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = scope.get("client")
        summary = RequestSummary(
            id=_request_id(scope),
            method=scope["method"],
            path=scope["path"],
            client=client[0] if client else "",
            began_s=time.perf_counter(),
        )
        scope.setdefault("state", {})[STATE] = summary

        async def send_noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                summary.status = message["status"]
                ms = int((time.perf_counter() - summary.began_s) * 1e3)
                own = [(b"x-request-id", summary.id.encode()), (b"openai-processing-ms", b"%d" % ms)]
                message["headers"] = [*message.get("headers", ()), *own, (b"x-content-type-options", b"nosniff")]
            else:
                summary.bytes_out += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        except BaseException:
            summary.status = summary.status or 500
            raise
        finally:
            summary.status = summary.status or LEFT
            summary.ended_s = time.perf_counter()
            self._done(summary)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _ID.fullmatch(value):
            return str(value.decode("ascii"))
    return secrets.token_hex(16)


class JsonBodies:
    """Refuses bodies that aren't JSON, or are too large, before they are read.

    Args:
        app: the application behind it.
        most_bytes: of a body.
    """

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app, self._most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if (error := self._refusal(dict(scope["headers"]))) is not None:
            await send_error(error, send)
            return
        left = self._most_bytes

        async def receive_some() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413)  # which FastAPI passes on as it is
            return message

        await self._app(scope, receive_some, send)

    def _refusal(self, headers: dict[bytes, bytes]) -> ApiError | None:
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            given = kind.decode("latin-1")[:100] or "nothing"
            return ApiError(415, f"Content-Type: {given}; allowed: application/json", code="content_type")
        if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
            return ApiError(415, "Content-Encoding: only identity is allowed", code="content_encoding")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most_bytes:
            return ApiError(413, f"a body of {int(length):,} bytes; allowed: up to {self._most_bytes:,}", code="too_large")
        return None
