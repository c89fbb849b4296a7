"""The access log: one JSON object a line for each request. It has no prompt and no text unless the user asks for them."""

from __future__ import annotations

import queue
import sys
import threading
import time
from typing import Any, BinaryIO

import msgspec

from cluster.serve.record import RequestRecord

_MOST_WAITING = 10_000


def line_of(record: RequestRecord, now: float) -> dict[str, Any]:
    """A request's line; facts that it hasn't are left out.

    Args:
        record: the request's.
        now: seconds since 1970.
    """
    found: dict[str, Any] = {
        "time": round(now, 3),
        "id": record.id,
        "client": record.client,
        "method": record.method,
        "path": record.path[:500],
        "status": record.status,
        "ms": round((record.ended_s - record.began_s) * 1e3, 1),
        "bytes": record.bytes_out,
    }
    if record.model is not None:
        found["model"] = record.model
    if record.choices:
        found |= {
            "stream": record.stream,
            "choices": record.choices,
            "prompt_tokens": record.prompt_tokens,
            "new_tokens": record.new_tokens,
            "finish": record.finish_reasons,
        }
    if record.ttft_s is not None:
        found["ttft_ms"] = round(record.ttft_s * 1e3, 1)
    if record.problem is not None:
        found["problem"] = record.problem
    if record.prompt is not None:
        found["prompt"] = record.prompt
    if record.text is not None:
        found["text"] = record.text
    return found


class AccessLog:
    """Writes lines in a thread of its own: a slow disk, or a pipe without a reader, holds up no request.

    Args:
        output: where to; standard error by default.
    """

    def __init__(self, output: BinaryIO | None = None) -> None:
        self._output = output
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(_MOST_WAITING)
        self.lost = 0
        """Lines that found no room."""
        self._thread = threading.Thread(target=self._write, name="epslots-access-log", daemon=True)
        self._thread.start()

    def log(self, record: RequestRecord) -> None:
        """Write a request's line soon."""
        try:
            self._lines.put_nowait(line_of(record, time.time()))
        except queue.Full:
            self.lost += 1

    def close(self) -> None:
        """Write what waits, and end."""
        self._lines.put(None)
        self._thread.join(5.0)

    def _write(self) -> None:
        encode = msgspec.json.Encoder().encode
        while (line := self._lines.get()) is not None:
            try:
                data = encode(line) + b"\n"
                if self._output is None:
                    sys.stderr.write(data.decode())
                    sys.stderr.flush()
                else:
                    self._output.write(data)
                    self._output.flush()
            except (OSError, ValueError):
                self.lost += 1
