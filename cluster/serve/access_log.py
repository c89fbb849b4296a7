"""The access log: one JSON object a line for each request. It has no prompt and no text unless the user asks for them."""

from __future__ import annotations

import queue
import sys
import threading
import time
from typing import Any, BinaryIO

import msgspec

from cluster.serve.request_summary import RequestSummary

_MOST_WAITING = 10_000


def line_of(summary: RequestSummary, now: float) -> dict[str, Any]:
    """A request's line; facts that it hasn't are left out.

    Args:
        summary: the request's.
        now: seconds since 1970.
    """
    found: dict[str, Any] = {
        "time": round(now, 3),
        "id": summary.id,
        "client": summary.client,
        "method": summary.method,
        "path": summary.path[:500],
        "status": summary.status,
        "ms": round((summary.ended_s - summary.began_s) * 1e3, 1),
        "bytes": summary.bytes_out,
    }
    if summary.model is not None:
        found["model"] = summary.model
    if summary.choices:
        found |= {
            "stream": summary.stream,
            "choices": summary.choices,
            "prompt_tokens": summary.prompt_tokens,
            "new_tokens": summary.new_tokens,
            "finish": summary.finish_reasons,
        }
    if summary.ttft_s is not None:
        found["ttft_ms"] = round(summary.ttft_s * 1e3, 1)
    if summary.problem is not None:
        found["problem"] = summary.problem
    if summary.prompt is not None:
        found["prompt"] = summary.prompt
    if summary.text is not None:
        found["text"] = summary.text
    return found


class AccessLog:
    """Writes lines in a thread of its own. A slow disk, or a pipe without a reader, holds up no request.

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

    def log(self, summary: RequestSummary) -> None:
        """Write a request's line soon."""
        try:
            self._lines.put_nowait(line_of(summary, time.time()))
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
