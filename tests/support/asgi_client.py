"""Asks an ASGI application without a server and sockets, so that ten thousand requests take seconds."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.support.http_service import Reply


async def ask_app(app: Any, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Reply:
    """An application's answer to a request, whose client stays until its end."""
    sent: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]
    messages: list[Any] = []

    async def receive() -> Any:
        if sent:
            return sent.pop()
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        messages.append(message)

    given = {"host": "localhost", "content-type": "application/json"} | (headers or {})
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }  # fmt: skip
    await app(scope, receive, send)
    start, *parts = messages
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    return Reply(start["status"], found, b"".join(part.get("body", b"") for part in parts))
