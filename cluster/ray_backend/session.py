"""This process's connection to Ray: shared by all backends of the process, because Ray allows only one.

The last backend to leave ends it. A Ray that ends by itself is started or joined again, until then:

    life -> a process of Ray has ended -> ``lost`` -> the rest is ended -> start or join, until it succeeds -> the next life
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import ray

from cluster.driver.retries import Pace, Retries
from cluster.errors import ClusterError
from cluster.ray_backend.address import check_address
from cluster.ray_backend.connect import FindEnded, join_ray, start_ray
from cluster.ray_backend.fork import guard_forks, is_forked
from cluster.ray_backend.lasting_ray import lasting_ray

logger = logging.getLogger("epslots.cluster")

_LAST_END_S = 30.0  # wait for the end of the last connection before there can be another
_LOOK_EVERY_S = 0.5  # at Ray's processes
_NOTICE_S = 0.5  # between saying that Ray is lost and its shutdown: calls that have just begun end by then
_PACE = Pace(first_s=1.0, most_s=30.0)

_entering, _counting = threading.Lock(), threading.Lock()
_connection: Connection | None = None


def _ray_in_use() -> bool:
    """Whether a fork now would copy a part of Ray: also while it is entered, ended, or between two lives."""
    unfinished = _connection is not None and not _connection.ended.done()
    return ray.is_initialized() or _entering.locked() or unfinished


guard_forks(_ray_in_use)


@dataclass(eq=False)
class Life:
    """A Ray, from its start to its end.

    Attributes:
        lost: done, with the reason for people, when Ray has ended by itself.
        next: done with the life that follows.
    """

    lost: Future[str] = field(default_factory=Future)
    next: Future[Life] = field(default_factory=Future)

    def __post_init__(self) -> None:
        for future in (self.lost, self.next):
            future.set_running_or_notify_cancel()  # or one waiter's cancellation would cancel it for all


@dataclass(eq=False)
class Connection:
    """The process's connection to Ray.

    Attributes:
        address: as given by the first user.
        own: it is a Ray that epslots has started, on this machine.
        name: of the cluster whose Ray it is, and which it may outlive this process with; None for another Ray.
        life: the newest.
        users: backends that use it.
        end: set when the last user has left.
        ranks_stay: set before that if ranks are left to the next driver.
        ended: done when nothing of it is left.
    """

    address: str | None
    own: bool
    name: str | None = None
    life: Life = field(default_factory=Life)
    users: int = 1
    end: threading.Event = field(default_factory=threading.Event)
    ranks_stay: threading.Event = field(default_factory=threading.Event)
    ended: Future[None] = field(default_factory=Future)


class RayUse:
    """One backend's use of the connection. A thread of its own makes it, unless this process is connected already.

    Leaving needs no loop and no pool of threads: at a process's end its pools are gone, and a loop may be closed before Ray
    has started.

    Args:
        address: None for the present connection, or else a Ray of only this process; "auto" or "host:port" for a running one.
        ranks: expected ranks; a Ray of our own starts that many processes beforehand.
        name: of a cluster whose ranks outlive this process; a Ray of our own then does so, too. None for another.

    Raises:
        ConfigError: the address has another form.
        ClusterError: this process was forked from one that uses Ray.
    """

    def __init__(self, address: str | None, ranks: int, name: str | None = None) -> None:
        check_address(address)
        if is_forked():
            raise ClusterError(
                "this process was forked from one that uses Ray, which works only in the parent; start it with the method "
                '"spawn", or fork before the parent makes a cluster'
            )
        self._ready: Future[Connection] = Future()
        self._left: Future[None] = Future()
        for future in (self._ready, self._left):
            future.set_running_or_notify_cancel()  # or one waiter's cancellation would cancel it for all
        self._leaving = False
        # Not a thread of a pool: the system ends Ray's processes together with the thread that started them.
        wanted = _Wanted(address, ranks, name if address is None else None)
        threading.Thread(target=_keep, args=(wanted, self._ready), name="epslots-ray", daemon=True).start()

    async def joined(self) -> Connection:
        """Wait for the connection. If the wait is cancelled, the connection is left as soon as it is made.

        Raises:
            ClusterError: no such Ray, or it refuses this process; the message says what to do.
        """
        try:
            return await asyncio.wrap_future(self._ready)
        except asyncio.CancelledError:
            self.leave()
            raise

    def leave(self) -> Future[None]:
        """Leave the connection, as soon as it is made. A second call changes nothing.

        Returns:
            Done when it is left; for the last user of a Ray of our own, when all of Ray's processes have ended.
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
            connection.ended.add_done_callback(self._finish)
        else:
            self._left.set_result(None)

    def _finish(self, ended: Future[None]) -> None:
        if (error := ended.exception()) is not None:
            self._left.set_exception(error)
        else:
            self._left.set_result(None)


class _Entered(NamedTuple):
    """A Ray that this process has started or joined.

    Attributes:
        manager: ends or leaves it.
        find_ended: names the part of it that has ended.
    """

    manager: AbstractContextManager[FindEnded]
    find_ended: FindEnded

    @classmethod
    def by(cls, manager: AbstractContextManager[FindEnded]) -> _Entered:
        return cls(manager, manager.__enter__())

    def exit(self) -> None:
        self.manager.__exit__(None, None, None)


_Connect = Callable[[], AbstractContextManager[FindEnded]]


class _Wanted(NamedTuple):
    """The Ray that a backend wants: as the arguments of ``RayUse``."""

    address: str | None
    ranks: int
    name: str | None


def _keep(wanted: _Wanted, ready: Future[Connection]) -> None:
    """The connection's thread: connect, restart Ray whenever it ends, disconnect after the last user."""
    ranks_stay = threading.Event()

    def connect() -> AbstractContextManager[FindEnded]:
        if wanted.address is not None:
            return join_ray(wanted.address)
        if wanted.name is not None:
            return lasting_ray(wanted.name, wanted.ranks, ranks_stay.is_set)
        return start_ray(wanted.ranks)

    try:
        connection, entered = _enter(wanted, connect)
        if entered is not None:
            connection.ranks_stay = ranks_stay
    except BaseException as error:
        ready.set_exception(error)
        return
    ready.set_result(connection)
    if entered is None:
        return
    try:
        while entered is not None:
            reason = _watch(connection, entered.find_ended)
            if not reason:
                entered.exit()
                break
            connection.life.lost.set_result(reason)
            time.sleep(_NOTICE_S)  # calls that have just begun end meanwhile
            try:
                entered.exit()
            except Exception:
                logger.exception("the rest of a lost Ray did not end without an error")
            entered = _enter_again(connection, connect)
    except BaseException as error:
        connection.ended.set_exception(error)
    else:
        connection.ended.set_result(None)


def _watch(connection: Connection, find_ended: FindEnded) -> str:
    """Wait until a part of Ray ends, and return it; "" when the last user has left."""
    while not connection.end.wait(_LOOK_EVERY_S):
        if reason := find_ended():
            return reason
    return ""


def _enter_again(connection: Connection, connect: _Connect) -> _Entered | None:
    """Start or join Ray again, until it succeeds; None if the last user has left meanwhile."""
    retries = Retries(_PACE)
    while not connection.end.is_set():
        try:
            with _entering:
                entered = _Entered.by(connect())
        except Exception as error:
            verdict = retries.failed(time.monotonic())
            if verdict.tell:
                logger.warning("%s. It is tried again until Ray is there", error)
            connection.end.wait(verdict.wait_s)
        else:
            before, connection.life = connection.life, Life()
            before.next.set_result(connection.life)
            return entered
    return None


def _enter(wanted: _Wanted, connect: _Connect) -> tuple[Connection, _Entered | None]:
    """The connection, and the Ray that it has entered; None if another thread or the user's code will end that Ray."""
    global _connection
    address, name = wanted.address, wanted.name
    with _entering:
        there = ray.get_runtime_context().gcs_address if ray.is_initialized() else None
        with _counting:
            shared = _connection if _connection is not None and _connection.users else None
            if shared is not None and there is not None and address in (None, shared.address, there):
                if name is not None and shared.own and shared.name != name:
                    raise ClusterError(
                        f"name={name!r}: ranks that outlive this process need a Ray that does, and this process has another "
                        f"of its own already; make this cluster first, or in a process of its own, or give both an address"
                    )
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
        entered = _Entered.by(connect())
        _connection = Connection(address, own=address is None, name=name)
        return _connection, entered
