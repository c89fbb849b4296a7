"""How ranks find and connect to each other: ``ContactStore`` goes through the driver, ``form_transport`` uses gloo or NCCL."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.distributed_c10d import Store

from cluster.messages.rank import Contact, Form
from epslots.transport.forming import form_group
from epslots.transport.rendezvous import BACKENDS
from epslots.transport.torch_transport import TorchTransport


class ContactStore(Store):
    """torch's rendezvous store for one epoch: a rank's own entries go to the driver, the other ranks' come from there.

    It opens no socket, so only ranks of this cluster write to it, in the sizes that torch writes.

    Args:
        publish: sends an entry to the other ranks.
        wait_s: seconds to wait for an entry.

    Attributes:
        stop: done, with the reason, when the epoch is no longer needed.
    """

    def __init__(self, epoch: int, publish: Callable[[Contact], None], wait_s: float) -> None:
        super().__init__()
        self.epoch = epoch
        self.stop: Future[str] = Future()
        self._publish, self._wait_s = publish, wait_s
        self._entries: dict[str, bytes] = {}
        self._news = threading.Condition()

    def take(self, entries: Mapping[str, bytes]) -> None:
        """Add entries of other ranks; from any thread."""
        with self._news:
            self._entries.update(entries)
            self._news.notify_all()

    def end(self, reason: str) -> None:
        """End all waits with this reason; from any thread. A second call does nothing."""
        with self._news:
            if not self.stop.done():
                self.stop.set_result(reason)
            self._news.notify_all()

    # torch's interface.

    def set(self, key: str, value: Any) -> None:
        """Publish an entry of this rank."""
        value = value.encode() if isinstance(value, str) else bytes(value)
        self.take({key: value})
        self._publish(Contact(self.epoch, key, value))

    def get(self, key: str) -> bytes:
        """Wait for an entry, and return it."""
        self.wait([key])
        return self._entries[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all entries are there.

        Raises:
            RuntimeError: they didn't come in time, or the epoch is no longer needed.
        """
        wait_s = self._wait_s if timeout is None else timeout.total_seconds()
        with self._news:
            self._news.wait_for(lambda: self.stop.done() or self.check(keys), wait_s)
        if self.stop.done():
            raise RuntimeError(self.stop.result())
        if not self.check(keys):
            raise RuntimeError(f"other ranks didn't publish their addresses within {wait_s:g} s")

    def check(self, keys: list[str]) -> bool:
        """Whether all entries are there."""
        return all(key in self._entries for key in keys)


def form_transport(form: Form, device: torch.device, contacts: ContactStore) -> TorchTransport:
    """Connect this rank with all other ranks that got the same ``Form``.

    Args:
        contacts: of this epoch; the caller keeps it for as long as the transport.

    Raises:
        PeerLost: some ranks didn't come in time, or one of them isn't a rank of this epoch.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread's setting, and this thread has none yet
    group = form_group(
        contacts,
        epoch=form.epoch,
        rank=form.rank,
        size=form.size,
        backend=BACKENDS[device.type],
        deadline_s=form.form_s,
        secret=form.secret,
        stop=contacts.stop,
    )
    return TorchTransport(group, device=device, epoch=form.epoch, deadline_s=form.deadline_s)
