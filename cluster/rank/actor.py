"""A rank's process: the Ray actor around a ``RankLoop``."""

from __future__ import annotations

import fcntl
import gc
import importlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec
import ray

from cluster.actor_process import ActorProcess, die_with_parent
from cluster.lasting import ray_registry
from cluster.lasting.descriptions import SUPERSEDED, Lasting, split_term
from cluster.messages.rank import GiveUp, encode
from cluster.rank.network_interface import use_interface
from cluster.rank.orphan_guard import OrphanGuard
from epslots.importing import without_collections

if TYPE_CHECKING:  # torch is the loop's to import: it reads the settings below when it is
    import torch

    from cluster.messages.rank import Form
    from cluster.rank.contact_store import ContactStore
    from epslots.transport.torch_transport import TorchTransport

RANK_LOOP = "cluster.rank.rank_loop:RankLoop"


class WorkerActor:
    """The actor. Ray calls ``events`` in a thread for each driver, other methods in another; the rank's loop has its own.

    Args:
        host: this node's address for the ranks' connections; None for the one by which Ray knows it.
        threads: CPU threads for torch; 0 leaves Ray's choice.
        loop: class that runs the rank, as "module:name"; called with the function that forms its transport.
        lasting: a ``Lasting``, as msgpack, if the rank is to outlive its driver.
    """

    def __init__(self, host: str | None, threads: int, loop: str, lasting: bytes = b"") -> None:
        die_with_parent()
        if threads:
            os.environ["OMP_NUM_THREADS"] = str(threads)
        self._node = ray.util.get_node_ip_address()
        module, _, name = loop.partition(":")
        use_interface(host or self._node)
        with without_collections():
            make_loop = getattr(importlib.import_module(module), name)
            gc.freeze()  # no later collection looks through it either: transformers makes one whenever a cache goes
        self._loop = make_loop(_form_transport)
        self._loop.start()
        self._term = 0
        self._users = -1
        if lasting:
            self._outlive_driver(msgspec.msgpack.decode(lasting, type=Lasting))

    def _outlive_driver(self, lasting: Lasting) -> None:
        if lasting.users:
            self._users = os.open(lasting.users, os.O_RDWR | os.O_CLOEXEC)
            fcntl.lockf(self._users, fcntl.LOCK_SH)
        OrphanGuard(
            lasting,
            ray_registry,
            where=str(ActorProcess.of_this(self._node)),
            worker=ray_registry.own_id(),
            on_orphan=lambda: self._loop.command(encode(GiveUp())),
        ).start()

    def process(self) -> bytes:
        """The ``ActorProcess``, as msgpack; the first call."""
        return msgspec.msgpack.encode(ActorProcess.of_this(self._node))

    def describe(self) -> bytes:
        """The ``RankDescription``, as msgpack, for a driver that may adopt this rank."""
        return msgspec.msgpack.encode(self._loop.describe())

    def command(self, message: bytes) -> bytes:
        """Take a command; returns its answer at once, or ``SUPERSEDED`` to a driver whose term is over."""
        term, command = split_term(message)
        if term < self._term:
            return SUPERSEDED
        if term > self._term:
            self._term = term
            self._loop.begin_term(term)
        return self._loop.command(command)

    def events(self, message: bytes) -> Iterator[bytes]:
        """All events, in batches, until the process ends; or until a newer term begins, and then ``SUPERSEDED``."""
        term, _ = split_term(message)
        while (events := self._loop.events(term)) is not None:
            yield events
        yield SUPERSEDED


def _form_transport(form: Form, device: torch.device, contacts: ContactStore) -> TorchTransport:
    from cluster.rank.contact_store import form_transport

    return form_transport(form, device, contacts)
