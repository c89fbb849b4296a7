"""A rank's process: the Ray actor around a ``RankLoop``."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator

import msgspec
import psutil
import ray
import torch

from cluster.orphans import die_with_parent
from cluster.rank.meeting import meet

RANK_LOOP = "cluster.rank.rank_loop:RankLoop"

_EVENTS_EVERY_S = 0.05
"""Between messages, which cost some milliseconds of processor time through Ray, at both ends: what is close goes together."""


class WorkerAddress(msgspec.Struct, frozen=True):
    """What a worker says of itself once it is up.

    Attributes:
        host: the address by which Ray knows its node.
        age_s: seconds since the process began; Ray has some waiting, so that it may be older than its task.
        built_s: of these, for building the worker.
    """

    host: str
    pid: int
    age_s: float
    built_s: float


class RankWorker:
    """The actor. Ray calls ``events`` in one thread and the other methods in a second; the rank's loop has a third.

    Args:
        host: this node's address for the ranks' connections; None for the one that Ray knows it by.
        threads: for torch on the CPU; 0 leaves Ray's choice.
        loop: what runs the rank, as "module:name": called with how ranks meet.
    """

    def __init__(self, host: str | None, threads: int, loop: str) -> None:
        began = time.time()
        die_with_parent()
        if threads:
            torch.set_num_threads(threads)
        self._node = ray.util.get_node_ip_address()
        module, _, name = loop.partition(":")
        _use_interface(host or self._node)
        self._loop = getattr(importlib.import_module(module), name)(meet)
        self._loop.start()
        self._built_s = time.time() - began

    def hello(self) -> bytes:
        """Who this is; the first call, which waits until the process is up."""
        process = psutil.Process()
        return msgspec.msgpack.encode(
            WorkerAddress(self._node, process.pid, time.time() - process.create_time(), self._built_s)
        )

    def command(self, message: bytes) -> bytes:
        """Take a command."""
        return self._loop.command(message)

    def events(self) -> Iterator[bytes]:
        """All events, for ever, in batches."""
        while True:
            yield self._loop.events()
            time.sleep(_EVENTS_EVERY_S)


def _use_interface(host: str) -> None:
    """Have gloo bind to an address. Left alone, it takes the one of the host's name, which on many systems is a loopback."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == host for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)  # read from the environment alone
