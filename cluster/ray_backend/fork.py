"""Lets a process that was forked from one with Ray end without it: Ray's threads exist only in the parent."""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
from collections.abc import Callable

import ray._private.state as ray_state
import ray._private.worker as ray_worker

_forked = False


def is_forked() -> bool:
    """Whether this process was forked from one that used Ray then."""
    return _forked


def guard_forks(ray_in_use: Callable[[], bool]) -> None:
    """In every child that is forked while Ray is in use, take Ray apart."""

    def after_fork() -> None:
        if ray_in_use():
            _leave_ray_to_parent()

    if sys.platform == "linux":
        os.register_at_fork(after_in_child=after_fork)


class _NoCoreWorker:
    """Replaces Ray's core worker in a forked child; every method does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_arguments, **_settings: None


def _leave_ray_to_parent() -> None:
    """Keep this child's exit from touching Ray.

    Ray's exit handler and destructors would hang or crash; and a handle that the child drops would end the parent's actor.
    """
    global _forked
    _forked = True
    atexit.unregister(ray_worker.shutdown)
    worker = ray_worker.global_worker
    for holder in (worker, getattr(worker, "core_worker", None), ray_worker._global_node, ray_state.state):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(holder))  # never destroyed, nor is any object of C++ that it holds
    worker.core_worker = _NoCoreWorker()
    worker.set_is_connected(False)
    worker.set_mode(None)  # or its exception hook would still write to the parent's tables
    libc = ctypes.CDLL(None)
    libc.on_exit(libc._exit, None)  # called with the exit status, after all of Python's and before any static destructor
