"""uvicorn's HTTP protocol with limits for strangers: the size of headers, the time until a request is whole, connections.

Without them, a peer without a key could fill the memory with a header that never ends, or hold connections for ever. A reader
that takes nothing of a whole answer is dropped, too, and requests that don't wait for the last one's answer (pipelining) are
left unread: uvicorn would stop looking whether their client has left.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cluster.serve.errors import refused
from cluster.serve.sse import ABORT, encode_json


@dataclass(frozen=True)
class ConnectionLimits:
    """Of each connection, and of their number.

    Attributes:
        header_bytes: of a request's line and headers.
        request_s: seconds from a connection's first byte of a request to its last one.
        stalled_s: seconds in which the client may take nothing of an answer that is done.
        connections: at a time. A further one takes the place of the one that has been without a whole request for longest: a
            peer that holds connections keeps no other out. It is closed at once if all have one.
    """

    header_bytes: int
    request_s: float
    stalled_s: float
    connections: int


class LimitedProtocol(HttpToolsProtocol):
    """One connection. uvicorn makes it, so its limits are its class's: see ``limited_protocol``."""

    limits: ClassVar[ConnectionLimits]
    waiting: ClassVar[dict[LimitedProtocol, None]]
    """Connections without a whole request, in the order of their waiting."""

    _head_bytes = 0
    """Since the last request, or the last piece of this one's body."""
    _in_head = True
    _pipelined = False
    _timer: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            if (longest := next(iter(self.waiting), None)) is None:
                transport.abort()
                return
            del self.waiting[longest]
            longest.transport.abort()
        self.waiting[self] = None
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.waiting.pop(self, None)
        if self._reading is not None:
            self._reading.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._pipelined:
            return
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > self.limits.header_bytes and not self.transport.is_closing():
            if self._in_head:
                self._refuse_head()
            else:  # fields behind the body, without an end
                self.transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # no application reads fields behind the body
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._pipelined = True
            self.cycle.keep_alive = False
            raise BlockingIOError("a request before the last one's answer")  # ends the reading of this data
        super().on_message_begin()
        if self._timer is None:
            self._await_request()
        extensions: dict[str, Any] = {ABORT: self.transport.abort}
        self.scope["extensions"] = extensions

    def on_headers_complete(self) -> None:
        self._in_head = False
        sizes = sum(len(name) + len(value) + 4 for name, value in self.headers) + len(self.url)
        if sizes > self.limits.header_bytes:
            self._refuse_head()
            return
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_timer()
        self.waiting.pop(self, None)
        self._in_head, self._head_bytes = True, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self.waiting[self] = None
        self._watch_reader()

    def send_400_response(self, msg: str) -> None:
        if self._pipelined:
            return
        body = encode_json(refused("the connection's bytes are no HTTP request").body)
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: "
        self.transport.write(head + b"%d\r\n\r\n" % len(body) + body)
        self.transport.close()

    def _watch_reader(self, before: int | None = None) -> None:
        """Drop the client if it takes nothing of what it has asked for."""
        waiting = self.transport.get_write_buffer_size()
        if waiting and waiting == before:
            self.transport.abort()
        elif waiting:
            self._reading = self.loop.call_later(self.limits.stalled_s, self._watch_reader, waiting)

    def _await_request(self) -> None:
        self._timer = self.loop.call_later(self.limits.request_s, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse_head(self) -> None:
        self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()


def limited_protocol(limits: ConnectionLimits) -> type[LimitedProtocol]:
    """The protocol's class, with its limits."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits, "waiting": {}})
