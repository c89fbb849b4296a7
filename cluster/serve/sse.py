"""Server-sent events as bytes, and the ASGI response that sends them (https://html.spec.whatwg.org, "Server-sent events").

Libraries for this cost three to eight times as much a chunk as the few lines here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

encode_json = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
ABORT = "epslots.abort"
"""Name of the ASGI extension that ends a connection at once (``http_protocol.py``)."""
_LOOKS = 4  # at a client that takes nothing, before it is dropped
EVENTS_TYPE = b"text/event-stream; charset=utf-8"
HEADERS = [
    (b"content-type", EVENTS_TYPE),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


def event(value: object) -> bytes:
    """One event with a JSON value, which has no line ends."""
    return b"data: " + encode_json(value) + b"\n\n"


class EventFrame:
    """Makes events of which all but one field is the same each time: that is encoded once.

    Args:
        head: the fields before the one that varies, at least one.
        name: of the field that varies.
        tail: the fields after it.
    """

    def __init__(self, head: Mapping[str, object], name: str, tail: Mapping[str, object]) -> None:
        self._before = b"data: " + encode_json(head)[:-1] + b"," + encode_json(name) + b":"
        self._behind = (b"," + encode_json(tail)[1:] if tail else b"}") + b"\n\n"

    def event(self, value: object) -> bytes:
        """The event with this value."""
        return self._before + encode_json(value) + self._behind


class _StallWatch:
    """Ends an ``asyncio.timeout`` when a client has taken nothing for too long.

    A timer for each part would cost as much as the part. Here one looks now and then whether a part is the same as before.

    Args:
        patience: of the task that sends.
        stalled_s: seconds; up to a quarter more pass.
    """

    def __init__(self, patience: asyncio.Timeout, stalled_s: float) -> None:
        self._loop, self._patience, self._every_s = asyncio.get_running_loop(), patience, stalled_s / _LOOKS
        self._part = self._seen = self._looks = 0
        self._sending = False
        self._timer = self._loop.call_later(self._every_s, self._look)

    def begin(self) -> None:
        """A part is about to be sent."""
        self._part += 1
        self._sending = True

    def end(self) -> None:
        """Note that the part has been sent."""
        self._sending = False

    def _look(self) -> None:
        same = self._sending and self._part == self._seen
        self._looks, self._seen = self._looks + 1 if same else 0, self._part
        if self._looks >= _LOOKS:
            self._patience.reschedule(self._loop.time())
        else:
            self._timer = self._loop.call_later(self._every_s, self._look)

    def stop(self) -> None:
        """Look no more."""
        self._timer.cancel()


class EventStream(Response):
    """Sends parts of a stream as they come.

    Args:
        parts: the bytes; one that ends with ``DONE`` is the last.
        on_left: called when the client has left, or takes nothing for too long. ``parts`` ends soon after it.
        on_end: called at the end, however that comes.
        stalled_s: seconds in which the client may take nothing, at least.
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
            async with asyncio.timeout(None) as patience:
                stall, more = _StallWatch(patience, self._stalled_s), True
                try:
                    async for part in self._parts:
                        more = not part.endswith(DONE)
                        # Waits while the client's socket is full: nothing more is made for it meanwhile.
                        stall.begin()
                        await send({"type": "http.response.body", "body": part, "more_body": more})
                        stall.end()
                finally:
                    stall.stop()
            if more:
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
