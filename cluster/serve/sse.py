"""Server-sent events as bytes, and the ASGI response that sends them (https://html.spec.whatwg.org, "Server-sent events").

Libraries for this cost three to eight times as much a chunk as the few lines here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

encode_json = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
ABORT = "epslots.abort"
"""Name of the ASGI extension that ends a connection at once (``http_protocol.py``)."""
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


def event(value: object) -> bytes:
    """One event with a JSON value, which has no line ends."""
    return b"data: " + encode_json(value) + b"\n\n"


class EventStream(Response):
    """Sends parts of a stream as they come.

    Args:
        parts: the bytes.
        on_left: called when the client has left, or takes nothing for too long. ``parts`` ends soon after it.
        on_end: called at the end, however that comes.
        stalled_s: seconds in which the client may take nothing.
    """

    def __init__(
        self,
        parts: AsyncIterator[bytes],
        *,
        on_left: Callable[[], None],
        on_end: Callable[[], None],
        stalled_s: float,
    ) -> None:
        self._parts, self._on_left, self._on_end, self._stalled_s = parts, on_left, on_end, stalled_s
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = asyncio.create_task(until_left(receive, self._on_left))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            clock = asyncio.get_running_loop().time
            async with asyncio.timeout(None) as patience:  # one for all parts: it costs as much as making one
                async for part in self._parts:
                    # Waits while the client's socket is full: nothing more is made for it meanwhile.
                    patience.reschedule(clock() + self._stalled_s)
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                    patience.reschedule(None)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            self._on_left()
            scope.get("extensions", {}).get(ABORT, lambda: None)()  # closing would wait for the client to take the rest
            await asyncio.sleep(0)  # until the server knows
        finally:
            watching.cancel()
            self._on_end()


async def until_left(receive: Receive, on_left: Callable[[], None]) -> None:
    """Wait until a request's client has left, and say so."""
    while (await receive())["type"] != "http.disconnect":
        pass
    on_left()
