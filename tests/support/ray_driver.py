"""A ``RayBackend`` that tests can use without a loop of their own; scripts that tests start import it in half a second."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import psutil

from cluster.driver import loop_thread
from cluster.driver.loop_thread import LoopThread
from cluster.ray_backend.backend import RayBackend
from cluster.ray_backend.handles import RayWorkerHandle

ECHO = "tests.support.echo_loop:EchoLoop"

Result = TypeVar("Result")


class Driver:
    """A backend, and the loop that drives it, as a supervisor would."""

    def __init__(self, **settings: Any) -> None:
        with patch.object(loop_thread, "new_event_loop", self.new_loop):
            self.thread = LoopThread("test-supervisor")
        settings = {"address": None, "strategy": "PACK", "device": "cpu", "path": "no/folder", "loop": ECHO} | settings
        self.backend = RayBackend(**settings)

    def new_loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.new_event_loop()

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.thread.call(work)

    def open(self, ranks: int | None) -> int:
        return self.call(self.backend.open(ranks))

    def start_worker(self, bundle: int) -> RayWorkerHandle:
        return self.call(self.backend.start_worker(bundle))

    def command(self, worker: RayWorkerHandle, message: bytes) -> bytes:
        return self.call(worker.command(message))

    def events(self, worker: RayWorkerHandle) -> bytes:
        return self.call(worker.events())

    def begin_events(self, worker: RayWorkerHandle) -> Callable[[], bytes]:
        """Begin to wait for events; call what is returned for the rest."""
        return self.thread.begin(worker.events()).result

    def close(self) -> None:
        self.call(self.backend.close())
        self.thread.end()


SomeDriver = TypeVar("SomeDriver", bound=Driver)


@contextmanager
def driving(kind: Callable[..., SomeDriver], ranks: int | None, **settings: Any) -> Iterator[SomeDriver]:
    """A driver of this kind; opened, if ``ranks`` says with how many."""
    driver = kind(**settings)
    try:
        if ranks is not None:
            driver.open(ranks)
        yield driver
    finally:
        driver.close()


def pids_below(pid: int = 0) -> set[psutil.Process]:
    """All processes that a process has started, itself or through others."""
    return set(psutil.Process(pid or os.getpid()).children(recursive=True))
