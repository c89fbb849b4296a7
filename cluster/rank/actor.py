"""A rank's process: the Ray actor around a ``RankLoop``."""

from __future__ import annotations

import importlib
import ipaddress
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec
import psutil
import ray

from cluster.actor_process import ActorProcess, die_with_parent

if TYPE_CHECKING:  # torch is the loop's to import: it reads the settings below when it is
    import torch

    from cluster.messages.rank import Form
    from cluster.rank.contact_store import ContactStore
    from epslots.transport.torch_transport import TorchTransport

RANK_LOOP = "cluster.rank.rank_loop:RankLoop"


class WorkerActor:
    """The actor. Ray calls ``events`` in one thread and the other methods in a second; the rank's loop has a third.

    Args:
        host: this node's address for the ranks' connections; None for the one by which Ray knows it.
        threads: CPU threads for torch; 0 leaves Ray's choice.
        loop: class that runs the rank, as "module:name"; called with the function that forms its transport.
    """

    def __init__(self, host: str | None, threads: int, loop: str) -> None:
        die_with_parent()
        if threads:
            os.environ["OMP_NUM_THREADS"] = str(threads)
        self._node = ray.util.get_node_ip_address()
        module, _, name = loop.partition(":")
        _use_interface(host or self._node)
        self._loop = getattr(importlib.import_module(module), name)(_form_transport)
        self._loop.start()

    def process(self) -> bytes:
        """The ``ActorProcess``, as msgpack; the first call."""
        return msgspec.msgpack.encode(ActorProcess.of_this(self._node))

    def command(self, message: bytes) -> bytes:
        """Take a command; returns its answer at once."""
        return self._loop.command(message)

    def events(self) -> Iterator[bytes]:
        """All events until the process ends, in batches."""
        while True:
            yield self._loop.events()


def _form_transport(form: Form, device: torch.device, contacts: ContactStore) -> TorchTransport:
    from cluster.rank.contact_store import form_transport

    return form_transport(form, device, contacts)


def _use_interface(host: str) -> None:
    """Have gloo and NCCL bind to an address, as far as the user has not chosen.

    By default gloo takes the address of the host's name, on many systems a loopback, and NCCL an interface of its own choice,
    of several perhaps one that leads nowhere.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == host for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)  # both read it from the environment alone
            if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
                os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # exactly this one, and not all that begin so
