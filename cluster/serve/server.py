"""The HTTP server: uvicorn on sockets that were bound before anything was loaded, in a thread of its own.

The main thread starts the cluster meanwhile, and gets the signals.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Self, TypeVar

import uvicorn

from cluster.serve.config import ServeConfig
from cluster.serve.http_protocol import ConnectionLimits, limited_protocol
from epslots.errors import ConfigError

_BACKLOG = 2048
_KEEP_ALIVE_S = 75  # longer than the minute in which load balancers reuse connections
_OTHER_FILES = 512  # that the process has open beside the connections of clients: Ray's, most of all
Value = TypeVar("Value")


def bind(host: str, port: int) -> socket.socket:
    """A socket that will listen at an address.

    Raises:
        ConfigError: the address isn't this machine's, or its port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        known = error.errno is not None and error.errno > 0  # else it is about the host's name
        reason = os.strerror(error.errno) if known else error.strerror  # type: ignore[arg-type]
        raise ConfigError(
            f"host={host!r}, port={port}: {reason}; give another --port, or the --host of this machine"
        ) from error


def url_of(bound: socket.socket) -> str:
    """The URL of a bound socket, as this machine reaches it."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def allow_connections(wanted: int) -> int:
    """Raise this process's limit of open files so that connections fit, as far as it may; returns how many do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    needed = wanted + _OTHER_FILES
    if unlimited != soft < needed:
        soft = needed if hard == unlimited else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == unlimited else max(1, min(wanted, soft - _OTHER_FILES))


class HttpServer:
    """Serves an application from its start to ``stop``. As a context manager, it is stopped at the end of the block.

    Args:
        app: the ASGI application.
        bound: the socket.
        config: has the limits.
    """

    def __init__(self, app: Any, bound: socket.socket, config: ServeConfig) -> None:
        self.url = url_of(bound)
        protocol = limited_protocol(
            ConnectionLimits(
                header_bytes=config.max_header_bytes,
                request_s=config.header_s,
                stalled_s=config.stalled_s,
                connections=allow_connections(config.max_connections),
            )
        )
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                loop="uvloop",
                lifespan="on",
                access_log=False,
                log_config=None,
                log_level=logging.ERROR,  # strangers' garbage is worth no line
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=2,  # requests were drained before
            )
        )
        self._bound = bound
        self._loop: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._run, name="epslots-http", daemon=True)
        self._thread.start()
        self._loop.result()

    def _run(self) -> None:
        async def serve() -> None:
            self._loop.set_result(asyncio.get_running_loop())
            await self._server.serve([self._bound])

        try:
            with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
                runner.run(serve())
        except BaseException as error:
            if not self._loop.done():
                self._loop.set_exception(error)
            raise

    def call(self, work: Coroutine[Any, Any, Value]) -> Value:
        """From another thread: the result of a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop.result()).result()

    def stop(self) -> None:
        """Close all connections, and end the thread."""
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
