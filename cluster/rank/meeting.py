"""How ranks meet: each publishes where it listens, through the driver; over gloo on the CPU and NCCL on CUDA."""

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
    """What torch takes for the store of one epoch: a rank's own entries go to the driver, the others' come from there.

    No socket listens for it, so that only this cluster's ranks write to it, as many bytes as torch has them write.

    Args:
        publish: sends an entry to the other ranks.
        wait_s: how long an entry is waited for.

    Attributes:
        stop: done when the epoch is no longer wanted, with the reason.
    """

    def __init__(self, epoch: int, publish: Callable[[Contact], None], wait_s: float) -> None:
        super().__init__()
        self.epoch = epoch
        self.stop: Future[str] = Future()
        self._publish, self._wait_s = publish, wait_s
        self._entries: dict[str, bytes] = {}
        self._news = threading.Condition()

    def take(self, entries: Mapping[str, bytes]) -> None:
        """Entries of other ranks; from any thread."""
        with self._news:
            self._entries.update(entries)
            self._news.notify_all()

    def end(self, reason: str) -> None:
        """Wait no longer; from any thread. Twice is once."""
        with self._news:
            if not self.stop.done():
                self.stop.set_result(reason)
            self._news.notify_all()

    # What torch calls.

    def set(self, key: str, value: Any) -> None:
        """Write an entry of this rank's."""
        value = value.encode() if isinstance(value, str) else bytes(value)
        self.take({key: value})
        self._publish(Contact(self.epoch, key, value))

    def get(self, key: str) -> bytes:
        """An entry, once it is there."""
        self.wait([key])
        return self._entries[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all entries are there.

        Raises:
            RuntimeError: they didn't come in time, or nothing is waited for any more.
        """
        wait_s = self._wait_s if timeout is None else timeout.total_seconds()
        with self._news:
            self._news.wait_for(lambda: self.stop.done() or self.check(keys), wait_s)
        if self.stop.done():
            raise RuntimeError(self.stop.result())
        if not self.check(keys):
            raise RuntimeError(f"other ranks didn't say within {wait_s:g} s where they listen")

    def check(self, keys: list[str]) -> bool:
        """Whether all entries are there."""
        return all(key in self._entries for key in keys)


def meet(form: Form, device: torch.device, contacts: ContactStore) -> TorchTransport:
    """Form the group of a epoch with all ranks that are told to.

    Args:
        contacts: of this epoch; kept by the caller for as long as the transport.

    Raises:
        PeerLost: they didn't all come in time, or one of them isn't a rank of this epoch.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # it is the thread's, and this thread's is another than that of the imports
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
