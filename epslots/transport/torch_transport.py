"""The transport over torch.distributed: gloo on the CPU, NCCL on CUDA.

On gloo an operation is waited for until it ends, a connection is closed, the deadline is over, or another thread breaks the
transport. A rank that fails cuts its own connections, so that those who wait for it learn at once, not at their deadlines.
Gloo itself tells an operation of a lost connection only while nothing of it is under way: one whose bytes have begun to move,
or that found the connection closed as it sent, it leaves waiting for its deadline. So a rank that waits looks at its
connections now and then, and leaves such an operation behind.

On NCCL an operation is queued on the device, and a lost peer stops the device rather than the host. The host waits in
``to_host`` alone, which obeys the deadline and ``abort``: a loss shows there, and not in the call that queued the operation.
"""

from __future__ import annotations

import re
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from epslots.device_copy import to_device
from epslots.errors import ConfigError, PeerLost
from epslots.transport.transport import (
    Transfers,
    all_to_all_header,
    check_all_to_all,
    check_exchange,
    exchange_header,
    transfers_are_sound,
)

GLOO = "epslots_gloo"  # torch's name for a gloo group that ``forming.py`` has made

# Transfers of one rank that are under way at once: unbounded batches have hung NCCL, whose kernels take eight together.
_TRANSFERS_PER_BATCH = 8

_POLL_S = 20e-6  # between looks at a CUDA event: a wait that blocks in the driver could not be aborted
_LOOK_S = 0.1  # between looks whether another thread broke the transport
_FIRST_LOOK_S, _MOST_LOOK_S = 0.5, 2.0  # and at gloo's connections: then again after twice the time, up to so much later
_CUT_TAG, _LOOK_TAG = 1, 2  # no message has them


class TorchTransport:
    """A ``Transport`` on a process group, which is its own from now on.

    Args:
        group: of gloo for a CPU device, of NCCL for a CUDA device.
        epoch: the group's number.
        deadline_s: how long one operation (of an exchange: one batch), or one wait in ``to_host``, may take.

    Raises:
        ConfigError: the group's backend isn't the device's.
    """

    def __init__(self, group: dist.ProcessGroup, *, device: torch.device, epoch: int = 0, deadline_s: float = 60.0) -> None:
        backend = dist.get_backend(group)
        if (backend, device.type) not in {("gloo", "cpu"), (GLOO, "cpu"), ("nccl", "cuda")}:
            raise ConfigError(
                f"a {backend.removeprefix('epslots_')} group can't serve {device}: gloo serves cpu, nccl serves cuda"
            )
        self.rank = group.rank()
        self.size = group.size()
        self.device = device
        self.epoch = epoch
        self._group = group
        self.deadline_s = deadline_s
        self._cause: str | None = None
        self._breaking = threading.Lock()
        self._nothing = torch.empty(1, dtype=torch.uint8)
        self._waiter: _Waiter | None = None

    @property
    def deadline_s(self) -> float:
        """How long one operation may take."""
        return self._deadline_s

    @deadline_s.setter
    def deadline_s(self, seconds: float) -> None:
        self._deadline_s = seconds
        self._group.set_timeout(timedelta(seconds=seconds))  # gloo's own, which may be shorter

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        result = mine.new_empty((self.size, *mine.shape))
        flat = mine.contiguous().view(-1)
        self._run("all_gather", lambda: [self._group.all_gather_single(result.view(-1), flat)])
        return result

    def all_to_all(
        self, rows: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], *, agreed: bool = False
    ) -> torch.Tensor:
        sends, receives = list(send_sizes), list(receive_sizes)
        if agreed:
            assert len(sends) == len(receives) == self.size and sum(sends) == rows.shape[0]
        else:
            header = all_to_all_header(rows, sends, receives, self.size)
            check_all_to_all(self.to_host(self.all_gather(to_device(header, self.device))))
        rows = rows.contiguous()
        result = rows.new_empty((sum(receives), *rows.shape[1:]))
        self._run("all_to_all", lambda: [self._group.all_to_all_single(result, rows, receives, sends)])
        return result

    def reduce_scatter(self, blocks: torch.Tensor) -> torch.Tensor:
        assert blocks.shape[0] == self.size
        flat = blocks.contiguous().view(-1)
        if self.device.type == "cpu":
            # Gloo's own is an all-reduce, which moves twice the bytes, and whose wait obeys no timeout but the group's.
            parts, even = torch.empty_like(flat), [len(flat) // self.size] * self.size
            self._run("reduce_scatter", lambda: [self._group.all_to_all_single(parts, flat, even, even)])
            return parts.view(blocks.shape).sum(dim=0, dtype=blocks.dtype)
        result = blocks.new_empty(blocks.shape[1:])
        options = dist.ReduceScatterOptions()
        self._run("reduce_scatter", lambda: [self._group.reduce_scatter_single(result.view(-1), flat, options)])
        return result

    def exchange(self, sends: Transfers, receives: Transfers, *, agreed: bool = False) -> None:
        if agreed:
            assert transfers_are_sound(self.rank, self.size, [*sends, *receives])
        else:
            check_exchange(self.gather_bytes(exchange_header(self.rank, self.size, sends, receives)))
        for batch in batches(self.rank, self.size, sends, receives):
            self._run("exchange", partial(self._start, batch), transfers=True)

    def gather_bytes(self, message: bytes) -> list[bytes]:
        mine = np.array([len(message)])
        lengths = self.to_host(self.all_gather(to_device(mine, self.device)))[:, 0].tolist()
        padded = np.zeros(max(lengths), np.uint8)
        padded[: len(message)] = np.frombuffer(message, np.uint8)
        gathered = self.to_host(self.all_gather(to_device(padded, self.device)))
        return [row[:length].tobytes() for row, length in zip(gathered, lengths, strict=True)]

    def to_host(self, tensor: torch.Tensor) -> NDArray[Any]:
        self._check()
        if self.device.type == "cpu":
            return tensor.numpy()
        began = time.monotonic()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))
        while not done.query():
            self._check()
            if time.monotonic() - began > self.deadline_s:
                raise self._break(f"the device didn't finish what was queued within {self.deadline_s:g} s")
            time.sleep(_POLL_S)
        self._check()  # aborted kernels end too, and leave anything behind
        return host.numpy()

    def abort(self, reason: str) -> None:
        self._break(f"aborted: {reason}")

    def close(self) -> None:
        with self._breaking:
            if self._cause is None:
                self._cause = "the transport was closed"
                self._end_waiter()
                if self.device.type == "cpu":
                    cut(self._group)  # gloo would stay connected for as long as anything refers to the group
            with suppress(ValueError):  # it has been destroyed
                dist.destroy_process_group(self._group)

    def _start(self, batch: Sequence[tuple[bool, int, torch.Tensor]]) -> list[dist.Work]:
        return dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend if outgoing else dist.irecv, tensor.view(-1), group=self._group, group_peer=peer)
                for outgoing, peer, tensor in batch
            ]
        )

    def _run(self, name: str, start: Callable[[], Sequence[dist.Work]], *, transfers: bool = False) -> None:
        """Start works and wait for them: on gloo until they are done, on NCCL as the current stream does.

        Args:
            transfers: they are sends and receives.
        """
        self._check()
        began = time.monotonic()
        try:
            works = start()
            if self.device.type == "cuda":
                for work in works:
                    work.wait()  # with a timeout it would block the host
            elif transfers:
                if self._waiter is None:
                    self._waiter = _Waiter(self._group)
                self._await(self._waiter.start(works, began + self.deadline_s), began)
            else:
                for work in works:
                    self._await(_Collective(work, self._group), began)
        except RuntimeError as error:
            took_s = time.monotonic() - began
            # The first line without the place in the source that gloo and NCCL begin with.
            text = re.sub(r"^\[[^]]*\] ", "", str(error).partition("\n")[0]).partition(". This is typically")[0]
            raise self._break(
                f"a peer is gone or silent: {name} failed after {took_s:.1f} s (deadline {self.deadline_s:g} s): {text}. "
                f"If no process ended, ranks made different numbers of forward passes, or one was busy with something else "
                f"for longer than the deadline: see epslots.keep_in_step"
            ) from error
        except BaseException as error:  # an interrupt, or a bug: works may be in progress, and this rank is out of step
            self._break(f"{name}: {error!r}")
            raise

    def _await(self, operation: _Operation, began: float) -> None:
        """Wait for an operation of gloo, and leave it behind if the transport breaks.

        Raises:
            RuntimeError: it failed, a connection is closed, or the deadline is over.
            PeerLost: the transport was broken by another thread.
        """
        look_s = _FIRST_LOOK_S
        try:
            while not operation.ends_within(min(_LOOK_S, began + self.deadline_s - time.monotonic())):
                self._check()
                waited_s = time.monotonic() - began
                if waited_s >= self.deadline_s:
                    raise RuntimeError("it did not end in time")
                if waited_s < look_s:
                    continue
                look_s = waited_s + min(waited_s, _MOST_LOOK_S)
                for peer in range(self.size):
                    if peer != self.rank:
                        # Raises if the connection is closed. Else it waits for a receive that never comes: some 70 bytes.
                        self._group.send([self._nothing], peer, _LOOK_TAG)
        except BaseException:
            operation.leave()
            raise

    def _check(self) -> None:
        if self._cause is not None:
            raise PeerLost(self._cause)

    def _break(self, what: str) -> PeerLost:
        """Break the transport unless it is broken already; returns the error to raise, of the first cause.

        A thread that finds it being broken waits for the end of that: afterwards nothing writes to what was being received.
        """
        with self._breaking:
            if self._cause is None:
                self._cause = f"{what} (noticed by rank {self.rank} of {self.size}, epoch {self.epoch})"
                self._end_waiter()
                cut(self._group)
            return PeerLost(self._cause)

    def _end_waiter(self) -> None:
        if self._waiter is not None:
            self._waiter.end()


class _Operation(Protocol):
    """Something under way on gloo."""

    def ends_within(self, seconds: float) -> bool:
        """Wait for its end. Raises RuntimeError if it failed."""

    def leave(self) -> None:
        """Nobody will wait for it any more; it may still be under way."""


class _Collective:
    def __init__(self, work: dist.Work, group: dist.ProcessGroup) -> None:
        self._work, self._group = work, group

    def ends_within(self, seconds: float) -> bool:
        try:
            self._work.wait(timedelta(seconds=max(seconds, 1e-3)))  # 0 would mean the default
        except RuntimeError:
            if not self._work.is_completed():
                return False
            self._work.wait()  # raises what it failed with, and nothing if it ended just now
        return True

    def leave(self) -> None:
        if not self._work.is_completed():
            # Where the last reference to the group goes away, all waits for its works: be that a thread of no other use.
            threading.Thread(target=_outlive, args=(self._work, self._group), name="epslots-left", daemon=True).start()


def _outlive(work: dist.Work, group: dist.ProcessGroup) -> None:
    with suppress(RuntimeError):
        work.wait()


class _Transfers:
    """Sends and receives. A thread waits for them: a wait that gives up early would have gloo close all connections."""

    def __init__(self, works: Sequence[dist.Work], ends_s: float) -> None:
        self._works = works
        self._ends_s = ends_s
        self._ended = threading.Event()
        self._error: RuntimeError | None = None

    def wait(self) -> None:
        """What the thread does."""
        try:
            for work in self._works:
                work.wait(timedelta(seconds=max(self._ends_s - time.monotonic(), 1e-3)))  # 0 would mean the default
        except RuntimeError as error:
            self._error = error
        self._ended.set()

    def ends_within(self, seconds: float) -> bool:
        ended = self._ended.wait(seconds)
        if self._error is not None:
            raise self._error
        return ended

    def leave(self) -> None:
        """The thread keeps what it needs."""


class _Waiter:
    """A thread that waits for ``_Transfers``, one after another, for as long as anybody has this object, or until ``end``."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._transfers: SimpleQueue[_Transfers | None] = SimpleQueue()
        threading.Thread(target=_wait_for_each, args=(self._transfers, group), name="epslots-transfers", daemon=True).start()
        self.end = weakref.finalize(self, self._transfers.put, None)

    def start(self, works: Sequence[dist.Work], ends_s: float) -> _Transfers:
        """Have works waited for, until that time of the monotonic clock."""
        transfers = _Transfers(works, ends_s)
        self._transfers.put(transfers)
        return transfers


def _wait_for_each(queue: SimpleQueue[_Transfers | None], group: dist.ProcessGroup) -> None:
    while (transfers := queue.get()) is not None:
        transfers.wait()
        del transfers  # what was sent and received belongs to others


def batches(rank: int, size: int, sends: Transfers, receives: Transfers) -> list[list[tuple[bool, int, torch.Tensor]]]:
    """A rank's transfers, (outgoing, peer, tensor), in the batches in which they are started and waited for.

    A transfer moves when both ends have started it, and an end starts it when all of its earlier batches are done. No ring of
    waiting ranks can form, however many transfers each of them has: both ends order theirs by the same key, in which all
    transfers of all ranks differ. Take the first in that order that isn't done. Whatever either end has before it is done, so
    both ends have reached its batch and started it; therefore it moves, and then the next is first.
    """
    keyed = []
    for outgoing, transfers in ((True, sends), (False, receives)):
        number: Counter[int] = Counter()
        for peer, tensor in transfers:
            source, target = (rank, peer) if outgoing else (peer, rank)
            # By their number within the pair of ranks, which keeps a pair's order; among equals, near peers first.
            keyed.append(((number[peer], (target - source) % size, source), (outgoing, peer, tensor)))
            number[peer] += 1
    keyed.sort(key=lambda item: item[0])
    ordered = [transfer for _, transfer in keyed]
    return [ordered[i : i + _TRANSFERS_PER_BATCH] for i in range(0, len(ordered), _TRANSFERS_PER_BATCH)]


def cut(group: dist.ProcessGroup) -> None:
    """End all that this rank has in progress, and its connections: waiting threads raise, and so do peers that wait for it."""
    if group.name() == "nccl":
        with suppress(ValueError):  # it has been destroyed
            dist.distributed_c10d._abort_process_group(group)
        return
    # gloo's own abort leaves waiting threads waiting. But when a receive times out, gloo closes all connections of the rank.
    nothing = torch.empty(1, dtype=torch.uint8)
    for peer in range(group.size()):
        if peer != group.rank():
            with suppress(RuntimeError):  # this one's connection is closed, or now all are
                group.recv([nothing], peer, _CUT_TAG).wait(timedelta(milliseconds=1))
