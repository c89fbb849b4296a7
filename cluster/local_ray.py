"""This process's connection to Ray: to one that runs, or to one of its own, which is started quietly and ends without a trace.

Ray has one connection per process, and so all fleets of the process share it; the last to leave ends it.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import fcntl
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.state as ray_state
import ray._private.worker as ray_worker

from cluster.errors import ClusterError
from cluster.ray_address import START, check_address, find_running

SEAT = "epslots_seat"
"""A resource of a Ray of our own, of which there is plenty: its seats are limited by GPUs, or by nothing."""

_SEATS = 100_000
_STORE_BYTES = 80 * 2**20  # little more than Ray's least: messages are small
_SETTINGS = {
    "enable_metrics_collection": False,
    # Processes that were started beforehand and aren't needed end; Ray would keep as many as there are CPUs.
    "num_workers_soft_limit": 0,
    "idle_worker_killing_time_threshold_ms": 10_000,
}
_END_S = 3.0
_LAST_END_S = 30.0
_PREFIX = "epslots-ray-"
_LONGEST_ROOT = 16  # with what Ray appends, the paths of its sockets stay below the system's limit of 107

_entering, _counting = threading.Lock(), threading.Lock()
_connection: Connection | None = None
_forked = False


class _NoCoreWorker:
    """Stands for Ray's core worker in a forked child, where every method does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_arguments, **_settings: None


def _after_fork() -> None:
    """Have a forked child end without Ray, none of whose threads it has.

    Its exit handler and its destructors would hang or crash; and a handle that the child drops would end the parent's actor.
    """
    global _forked
    if not ray.is_initialized() and not _entering.locked():
        return
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


if sys.platform == "linux":
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(eq=False)
class Connection:
    """To Ray; ``users`` fleets use it.

    Attributes:
        address: what was asked for.
        own: it is a Ray of this process alone, on this machine.
        end: the last user has left.
        ended: done when nothing of it is left.
    """

    address: str | None
    own: bool
    users: int = 1
    end: threading.Event = field(default_factory=threading.Event)
    ended: Future[None] = field(default_factory=Future)


class RayUse:
    """One fleet's use of the connection, which is made in a thread of its own, unless this process is connected already.

    No loop and no pool of threads is needed to leave: a process that ends has none of its pools left, and a loop may be closed
    before Ray has started.

    Args:
        address: None: the connection that there is, or else a Ray of this process alone; "auto" or "host:port": a running one.
        ranks: how many to expect: a Ray of our own starts that many processes beforehand.

    Raises:
        ConfigError: such an address isn't allowed.
        ClusterError: this is a forked child of a process that uses Ray.
    """

    def __init__(self, address: str | None, ranks: int) -> None:
        check_address(address)
        if _forked:
            raise ClusterError(
                "this process was forked from one that uses Ray, which works in the parent alone; start it with the method "
                '"spawn", or fork before the parent makes a cluster'
            )
        self._ready: Future[Connection] = Future()
        self._left: Future[None] = Future()
        for future in (self._ready, self._left):
            future.set_running_or_notify_cancel()  # or who gives up waiting would cancel it for all
        self._leaving = False
        # Not a thread of a pool: what Ray starts is ended by the system when the thread ends that started it.
        threading.Thread(target=_keep, args=(address, ranks, self._ready), name="epslots-ray", daemon=True).start()

    async def joined(self) -> Connection:
        """The connection, once it is there. If the waiting is cancelled, it is left as soon as it is.

        Raises:
            ClusterError: there is no such Ray, or it doesn't let us in; with what to do.
        """
        try:
            return await asyncio.wrap_future(self._ready)
        except asyncio.CancelledError:
            self.leave()
            raise

    def leave(self) -> Future[None]:
        """Leave, now or as soon as the connection is there. Twice is once.

        The last to leave ends a Ray of our own, with all of its processes; what is returned is done when it has ended.
        """
        if not self._leaving:
            self._leaving = True
            self._ready.add_done_callback(self._leave)
        return self._left

    def _leave(self, ready: Future[Connection]) -> None:
        if ready.exception() is not None:
            self._left.set_result(None)
            return
        connection = ready.result()
        with _counting:
            connection.users -= 1
            last = connection.users == 0
        if last:
            connection.end.set()
            connection.ended.add_done_callback(self._tell)
        else:
            self._left.set_result(None)

    def _tell(self, ended: Future[None]) -> None:
        if (error := ended.exception()) is not None:
            self._left.set_exception(error)
        else:
            self._left.set_result(None)


def _keep(address: str | None, ranks: int, ready: Future[Connection]) -> None:
    """A thread's life: connect, say so, wait for the end, disconnect."""
    try:
        connection, ray_there = _enter(address, ranks)
    except BaseException as error:
        ready.set_exception(error)
        return
    ready.set_result(connection)
    if ray_there is None:
        return
    connection.end.wait()
    try:
        ray_there.__exit__(None, None, None)
    except BaseException as error:
        connection.ended.set_exception(error)
    else:
        connection.ended.set_result(None)


def _enter(address: str | None, ranks: int) -> tuple[Connection, Any]:
    """The connection, and what ends it; None if that is somebody else's to do."""
    global _connection
    with _entering:
        there = ray.get_runtime_context().gcs_address if ray.is_initialized() else None
        with _counting:
            shared = _connection if _connection is not None and _connection.users else None
            if shared is not None and there is not None and address in (None, shared.address, there):
                shared.users += 1
                return shared, None
        if shared is None and _connection is not None:
            if not wait([_connection.ended], _LAST_END_S).done:
                raise ClusterError(
                    f"the last Ray of this process has not ended within {_LAST_END_S:g} s, and there can be only one: start "
                    f"another process"
                )
            there = ray.get_runtime_context().gcs_address if ray.is_initialized() else None
        if there is not None:
            if shared is not None or address not in (None, "auto", there):
                raise ClusterError(
                    f"address={address!r}, but this process is connected to the Ray at {there}: leave that first"
                )
            _connection = Connection(address, own=False)
            _connection.ended.set_result(None)
            return _connection, None
        ray_there = _start(ranks) if address is None else _join(address)
        ray_there.__enter__()
        _connection = Connection(address, own=address is None)
        return _connection, ray_there


@contextmanager
def _start(ranks: int) -> Iterator[None]:
    """A Ray of our own."""
    with _folder() as folder:
        before = set(psutil.Process().children())
        try:
            ray.init(
                address="local",
                num_cpus=ranks + 1,  # so many processes are started beforehand; one is for the controller
                resources={SEAT: _SEATS},
                object_store_memory=_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder),
                _system_config=_SETTINGS,
            )
        except BaseException as error:
            ray.shutdown()
            raise ClusterError(f"a local Ray could not be started: {error}") from error
        with _silence():
            try:
                yield
            finally:
                started = [child for child in psutil.Process().children() if child not in before and _is_of_ray(child)]
                started += [process for child in started for process in _descendants(child)]
                try:
                    ray.shutdown()
                finally:
                    _end(started)


@contextmanager
def _join(address: str) -> Iterator[None]:
    """A running Ray."""
    found = find_running(address)
    try:
        ray.init(address=found, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        ray.shutdown()
        raise ClusterError(
            f"the Ray at {found} can't be joined: {error}. The driver must run on a node of the cluster "
            f"(`ray start --address={found}`), for example through `ray job submit`; or {START}"
        ) from error
    with _silence():
        try:
            if SEAT in ray.cluster_resources():
                raise ClusterError(f"the Ray at {found} is another process's own, and will end with it; {START}")
            yield
        finally:
            ray.shutdown()


@contextmanager
def _silence() -> Iterator[None]:
    """No messages of Ray's between the user's output: who died, and where, is said by us."""
    before, ray_worker._worker_logs_enabled = ray_worker._worker_logs_enabled, False
    try:
        yield
    finally:
        ray_worker._worker_logs_enabled = before


def _is_of_ray(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return str(Path(ray.__file__).parent) in " ".join(process.cmdline())
    return False


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return list(process.children(recursive=True))
    return []


def _end(processes: list[psutil.Process]) -> None:
    """See that processes have ended. One that was stopped doesn't by itself."""
    _, alive = psutil.wait_procs(processes, _END_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, _END_S)


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for Ray's sockets and logs. What a process that was killed has left is removed by the next one."""
    root = Path(tempfile.gettempdir())
    if len(str(root)) > _LONGEST_ROOT:
        root = Path("/tmp")
    for old in root.glob(f"{_PREFIX}*"):
        with suppress(OSError), open(old / "lock", "rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
    try:
        with open(folder / "lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder / "r"  # Ray lets everybody write to its folder; the one around it is ours
    finally:
        shutil.rmtree(folder, ignore_errors=True)
