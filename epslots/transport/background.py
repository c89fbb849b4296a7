"""Threads that wait inside torch.distributed, and end with the process.

Such a thread may be waiting for a lost rank, so it mustn't keep the process alive: it is a daemon. But one that comes back
from C++ while the interpreter goes away ends the process with SIGABRT ("terminate called without an active exception").
``start`` therefore has the process wait at its exit, for a while, until the thread has ended.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

AT_EXIT_S = 5.0
"""The longest wait for all of them together; a process that must end sooner is killed."""

_threads: WeakKeyDictionary[threading.Thread, Callable[[], Any]] = WeakKeyDictionary()


def start(target: Callable[..., Any], *args: Any, name: str, stop: Callable[[], Any] = lambda: None) -> None:
    """Start a thread that calls ``target(*args)``.

    Args:
        stop: called when the process ends: tells the thread that no more work comes.
    """
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    _threads[thread] = stop
    thread.start()


@atexit.register
def _end_all() -> None:
    left = list(_threads.items())
    for _, stop in left:
        stop()
    for thread, _ in left:
        thread.join(AT_EXIT_S / len(left))
