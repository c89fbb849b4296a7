"""uvicorn's HTTP protocol with limits for strangers: the size of headers, the time until a request is whole, connections.

Without them, a peer without a key could fill the memory with a header that never ends, or hold connections for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cluster.serve.sse import ABORT


def limited_protocol(*, header_bytes: int, request_s: float, connections: int) -> type[HttpToolsProtocol]:
    """The protocol's class, with its limits.

    Args:
        header_bytes: of a request's line and headers.
        request_s: seconds from a connection's first byte of a request to its last one.
        connections: at a time; further ones are closed at once.
    """

    class LimitedProtocol(HttpToolsProtocol):
        """One connection."""

        _head_bytes = 0
        _in_head = True
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > connections:
                transport.abort()
                return
            self._await_request()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._in_head:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._in_head and self._head_bytes > header_bytes and not self.transport.is_closing():
                self._refuse_head()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if self._timer is None:
                self._await_request()
            extensions: dict[str, Any] = {ABORT: self.transport.abort}
            self.scope["extensions"] = extensions

        def on_headers_complete(self) -> None:
            self._in_head = False
            sizes = sum(len(name) + len(value) + 4 for name, value in self.headers) + len(self.url)
            if sizes > header_bytes:
                self._refuse_head()
                return
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._stop_timer()
            self._in_head, self._head_bytes = True, 0
            super().on_message_complete()

        def _await_request(self) -> None:
            self._timer = self.loop.call_later(request_s, self.transport.abort)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _refuse_head(self) -> None:
            self.transport.write(
                b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            )
            self.transport.close()

    return LimitedProtocol
