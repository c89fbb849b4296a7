"""``HttpConnection``: a client of the service that costs little, and notes when each part of an answer came.

Parsing waits until an answer is whole, so that it isn't a part of what is measured.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any, Self

import msgspec

_HEAD = "POST /v1/completions HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"
_PART_BYTES = 65536


class HttpAnswer(msgspec.Struct):
    """The answer to a request for one completion. Times are seconds since the request was sent.

    Attributes:
        status: of HTTP; 0 if the connection ended before the answer did.
        text: of the completion, as far as it came.
        tokens: that the service counted.
        parts_s: when each part of the body came; the first one has the first text.
        error: the error's message.
    """

    status: int
    text: str = ""
    tokens: int = 0
    parts_s: list[float] = []
    error: str = ""

    @property
    def whole(self) -> bool:
        """Whether nothing is missing."""
        return self.status == 200 and not self.error

    @property
    def longest_gap_s(self) -> float:
        """Between parts that follow each other."""
        return max((b - a for a, b in zip(self.parts_s, self.parts_s[1:], strict=False)), default=0.0)


class HttpConnection:
    """One connection to a service, for one request after the other.

    Args:
        address: host and port.
        buffer_bytes: that may wait to be read at this end; few let the service feel a slow reader.
    """

    def __init__(self, address: tuple[str, int], buffer_bytes: int = 2**16) -> None:
        self._address, self._buffer_bytes = address, buffer_bytes

    async def __aenter__(self) -> Self:
        connected = socket.socket(socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer_bytes)
        connected.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connected, self._address)
        self._reader, self._writer = await asyncio.open_connection(sock=connected, limit=self._buffer_bytes)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.abort()

    @property
    def closed(self) -> bool:
        """Whether the service has closed it, as it does when nothing is asked for a while."""
        return self._reader.at_eof()

    def abort(self) -> None:
        """Leave at once."""
        self._writer.transport.abort()

    async def ask(self, body: bytes, on_part: Callable[[], Any] | None = None, wait_s: float = 0.0) -> HttpAnswer:
        """Send a request, and read its answer.

        Args:
            body: the request's, as JSON.
            on_part: called with each part of a stream.
            wait_s: seconds to wait before each part is read.
        """
        began_s, parts_s, data = time.perf_counter(), list[float](), bytearray()
        status = 0
        try:
            self._writer.write(_HEAD.format(self._address[0], len(body)).encode() + body)
            head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
            status = int(head[9:12])
            if b"transfer-encoding: chunked" not in head:
                length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
                data += await self._reader.readexactly(length)
                return _of_json(status, bytes(data), time.perf_counter() - began_s)
            while not data.endswith(_LAST_CHUNK):
                if wait_s:
                    await asyncio.sleep(wait_s)
                if not (part := await self._reader.read(_PART_BYTES)):
                    raise ConnectionError("the stream was cut off")
                data += part
                parts_s.append(time.perf_counter() - began_s)
                if on_part is not None:
                    on_part()
        except (OSError, EOFError) as error:
            return _of_events(0, bytes(data), parts_s, str(error) or type(error).__name__)
        return _of_events(status, bytes(data), parts_s, "")


def _of_json(status: int, data: bytes, took_s: float) -> HttpAnswer:
    found = msgspec.json.decode(data)
    if "choices" not in found:
        return HttpAnswer(status, parts_s=[took_s], error=str(found.get("error", {}).get("message", found)))
    return HttpAnswer(status, found["choices"][0]["text"], found["usage"]["completion_tokens"], [took_s])


def _of_events(status: int, data: bytes, parts_s: list[float], error: str) -> HttpAnswer:
    """A stream, also one that was cut off. Events are lines of JSON, and no event is split over chunks."""
    answer, done = HttpAnswer(status, parts_s=parts_s, error=error), b"data: [DONE]" in data
    texts = []
    for line in data.split(b"\n"):
        if not line.startswith(b"data: {") or not line.endswith(b"}"):
            continue
        event = msgspec.json.decode(line[6:])
        if "error" in event:
            answer.error = event["error"]["message"]
            continue
        texts += [choice["text"] for choice in event["choices"]]
        answer.tokens = (event.get("usage") or {}).get("completion_tokens", answer.tokens)
    answer.text = "".join(texts)
    if not done and not answer.error:
        answer.error = "the stream has no end"
    return answer
