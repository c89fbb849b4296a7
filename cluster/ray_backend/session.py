"""This process's connection to Ray: to one that runs, or to one of its own, which is started quietly and ends without a trace.

Ray has one connection per process, and so all fleets of the process share it; the last to leave ends it. A Ray that ends by
itself is started or joined again, until then:

    life -> a process of Ray has ended -> ``lost`` -> what is left is ended -> start or join, again and again -> the next life
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import psutil
import ray
import ray._private.state as ray_state
import ray._private.worker as ray_worker
from ray._raylet import Config  # type: ignore[attr-defined]  # compiled

from cluster.driver.retries import Pace, Retries
from cluster.errors import ClusterError
from cluster.ray_backend.address import START, HeadWatch, check_address, find_running
from cluster.ray_backend.processes import end, own_folder, protect_token, started_since, users_of, watch_joined, watch_own

logger = logging.getLogger("epslots.cluster")

SEAT = "epslots_seat"
"""A resource of a Ray of our own, of which there is plenty: its seats are limited by GPUs, or by nothing."""

_SEATS = 100_000
_STORE_BYTES = 80 * 2**20  # little more than Ray's least: messages are small
# Ray ends a process that hasn't reached the cluster's head for a minute, and raises nothing. We say what is wrong, and go on.
_PATIENCE_NAME, _PATIENCE_S = "gcs_rpc_server_reconnect_timeout_s", 10 * 365 * 86400
_SETTINGS = {
    "enable_metrics_collection": False,
    # Processes that were started beforehand and aren't needed end; Ray would keep as many as there are CPUs.
    "num_workers_soft_limit": 0,
    "idle_worker_killing_time_threshold_ms": 10_000,
    _PATIENCE_NAME: _PATIENCE_S,
}
_SHUTDOWN_S = 20.0
_LAST_END_S = 30.0
_LOOK_EVERY_S = 0.5  # at Ray's processes
_NOTICE_S = 0.5  # from saying that Ray is lost until it is shut down: who has just begun to use it is done by then
_PACE = Pace(first_s=1.0, most_s=30.0)

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
    between_lives = _connection is not None and not _connection.ended.done()  # or on its way to the end
    if not ray.is_initialized() and not _entering.locked() and not between_lives:
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


_Ended = Callable[[], str]
"""Says what has ended of a Ray, for people; empty if nothing has."""
_There = tuple[AbstractContextManager[_Ended], _Ended]
"""A Ray that was entered, and what watches it."""


@dataclass(eq=False)
class Life:
    """A Ray, from its start to its end.

    Attributes:
        lost: done with the reason, for people, when it has ended by itself.
        next: done with the life that follows.
    """

    lost: Future[str] = field(default_factory=Future)
    next: Future[Life] = field(default_factory=Future)

    def __post_init__(self) -> None:
        for future in (self.lost, self.next):
            future.set_running_or_notify_cancel()  # or who gives up waiting would cancel it for all


@dataclass(eq=False)
class Connection:
    """To Ray; ``users`` fleets use it.

    Attributes:
        address: what was asked for.
        own: it is a Ray of this process alone, on this machine.
        life: the newest.
        end: the last user has left.
        ended: done when nothing of it is left.
    """

    address: str | None
    own: bool
    life: Life = field(default_factory=Life)
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
    """A thread's life: connect, say so, see that Ray goes on, disconnect at the end."""

    def connect() -> AbstractContextManager[_Ended]:
        return _start(ranks) if address is None else _join(address)

    try:
        connection, there = _enter(address, connect)
    except BaseException as error:
        ready.set_exception(error)
        return
    ready.set_result(connection)
    if there is None:
        return
    try:
        while there is not None:
            reason = _watch(connection, there[1])
            if not reason:
                there[0].__exit__(None, None, None)
                break
            connection.life.lost.set_result(reason)
            time.sleep(_NOTICE_S)
            try:
                there[0].__exit__(None, None, None)
            except Exception:
                logger.exception("what is left of Ray did not end in peace")
            there = _again(connection, connect)
    except BaseException as error:
        connection.ended.set_exception(error)
    else:
        connection.ended.set_result(None)


def _watch(connection: Connection, ended: _Ended) -> str:
    """Wait for the end; returns what has ended of Ray, or nothing if its last user has left."""
    while not connection.end.wait(_LOOK_EVERY_S):
        if reason := ended():
            return reason
    return ""


def _again(connection: Connection, connect: Callable[[], AbstractContextManager[_Ended]]) -> _There | None:
    """Start or join Ray again, however often that fails; None if its last user has left meanwhile."""
    retries = Retries(_PACE)
    while not connection.end.is_set():
        try:
            with _entering:
                entered = connect()
                there = entered, entered.__enter__()
        except Exception as error:
            verdict = retries.failed(time.monotonic())
            if verdict.tell:
                logger.warning("%s. It is tried again, until Ray is there", error)
            connection.end.wait(verdict.wait_s)
        else:
            before, connection.life = connection.life, Life()
            before.next.set_result(connection.life)
            return there
    return None


def _enter(address: str | None, connect: Callable[[], AbstractContextManager[_Ended]]) -> tuple[Connection, _There | None]:
    """The connection, and what ends it; None if that is somebody else's to do."""
    global _connection
    with _entering:
        there = ray.get_runtime_context().gcs_address if ray.is_initialized() else None
        with _counting:
            shared = _connection if _connection is not None and _connection.users else None
            if shared is not None and there is not None and address in (None, shared.address, there):
                shared.users += 1
                return shared, None
        if shared is not None and there is None:
            raise ClusterError(
                "the Ray of this process has ended, and is being started or joined again; try again in a minute"
            )
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
        entered = connect()
        ended = entered.__enter__()
        _connection = Connection(address, own=address is None)
        return _connection, (entered, ended)


@contextmanager
def _start(ranks: int) -> Iterator[_Ended]:
    """A Ray of our own; yields what says what has ended of it, if anything has."""
    with own_folder() as folder:
        protect_token()
        before = psutil.Process().children()
        # Before Ray does the same: it would read its settings again. Not by the environment, which its helpers would inherit:
        # those whose driver was killed would never end.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        Config.initialize(json.dumps({_PATIENCE_NAME: _PATIENCE_S}))
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
            watch = watch_own()

            def ended() -> str:
                reason = watch.ended()
                return f"this process's own Ray has ended: {reason}" if reason else ""

            try:
                yield ended
            finally:
                started = started_since(before)
                if watch.ended():
                    started += users_of(folder)  # its node is no longer the parent of its processes
                _shut_down(started)


@contextmanager
def _join(address: str) -> Iterator[_Ended]:
    """A running Ray; yields what says what has ended of it."""
    found = find_running(address)
    try:
        with _patience():
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
            watch, head = watch_joined(), HeadWatch(found)

            def ended() -> str:
                head.look(time.monotonic())
                reason = watch.ended()
                return f"the node of this process has left the Ray at {found}: {reason}" if reason else ""

            yield ended
        finally:
            _shut_down([])


@contextmanager
def _patience() -> Iterator[None]:
    """Have this process outlive the head of a Ray that it joins now. That setting is read from the environment alone."""
    name = f"RAY_{_PATIENCE_NAME}"
    before = os.environ.get(name)
    os.environ.setdefault(name, str(_PATIENCE_S))
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _shut_down(processes: list[psutil.Process]) -> None:
    """Disconnect, and see that processes have ended. Without a head, Ray takes some seconds for it."""
    stopped: Future[None] = Future()

    def stop() -> None:
        try:
            ray.shutdown()
        except BaseException as error:
            stopped.set_exception(error)
        else:
            stopped.set_result(None)

    threading.Thread(target=stop, name="epslots-ray-shutdown", daemon=True).start()
    wait([stopped], _SHUTDOWN_S)
    end(processes)
    stopped.result()  # nothing that it could wait for is left


@contextmanager
def _silence() -> Iterator[None]:
    """No messages of Ray's between the user's output: who died, and where, is said by us."""
    before, ray_worker._worker_logs_enabled = ray_worker._worker_logs_enabled, False
    try:
        yield
    finally:
        ray_worker._worker_logs_enabled = before
