"""The transport over torch.distributed: gloo on the CPU, NCCL on CUDA.

On gloo the host waits for an operation until it ends, a connection is closed, the deadline is over, or another thread breaks
the transport. A rank that fails cuts its own connections, so that waiting peers learn of it at once. Gloo reports a lost
connection only to operations that are idle at that moment: one whose bytes have begun to move, or that found the connection
closed as it sent, waits for its deadline. So a waiting rank probes its connections now and then, and leaves such an operation
behind (``gloo_operations.py``).

On NCCL an operation is queued on the device, and a lost peer stops the device instead of the host. The host waits in
``wait_until`` alone, which obeys the deadline and ``abort``: a loss is raised there, not by the call that queued the
operation. It asks NCCL now and then: a connection over the network that breaks is known long before the deadline. Ranks of one
node connect by shared memory, which doesn't break; there the launcher, or the cluster's driver, ends the wait.
"""

from __future__ import annotations

import atexit
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from epslots.device_copy import to_device, to_host
from epslots.errors import ConfigError, PeerLost, RankUnusable
from epslots.transport.gloo_operations import CollectiveOperation, GlooOperation, WaitingThread
from epslots.transport.host_wait import wait_until
from epslots.transport.nccl import error_of
from epslots.transport.transport import (
    PeerTensors,
    all_to_all_header,
    check_all_to_all,
    check_exchange,
    exchange_header,
    peer_tensors_are_sound,
)

GLOO = "epslots_gloo"  # torch's name for a gloo group that ``forming.py`` has made

# Sends and receives of one rank in progress at once: unbounded batches have hung NCCL, whose kernels take eight together.
_EXCHANGE_BATCH = 8

_BROKEN_POLL_S = 0.1  # between looks whether another thread broke the transport
_NCCL_LOOK_S = 0.1  # between looks whether NCCL knows of a loss
_FIRST_PROBE_S, _MOST_PROBE_GAP_S = 0.5, 2.0  # probes of gloo's connections: each wait twice as long as before, up to the gap
_CUT_TAG, _PROBE_TAG = 1, 2  # tags that no message has


# Methods of process groups that torch 2.13 has renamed.
_OLD_NAMES = {
    "all_gather_single": "_allgather_base",
    "all_to_all_single": "alltoall_base",
    "reduce_scatter_single": "_reduce_scatter_base",
}

_open: WeakSet[TorchTransport] = WeakSet()


class TorchTransport:
    """A ``Transport`` on a process group, which it owns from now on.

    Args:
        group: of gloo for a CPU device, of NCCL for a CUDA device.
        epoch: the group's number.
        deadline_s: seconds that one operation (of an exchange: one batch), or one wait in ``wait_until``, may take.

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
        self._break_lock = threading.Lock()
        self._probe_tensor = torch.empty(1, dtype=torch.uint8)
        self._waiting_thread: WaitingThread | None = None
        _open.add(self)

    @property
    def deadline_s(self) -> float:
        """Seconds that one operation may take."""
        return self._deadline_s

    @deadline_s.setter
    def deadline_s(self, seconds: float) -> None:
        self._deadline_s = seconds
        if self.device.type == "cpu":
            self._group.set_timeout(timedelta(seconds=seconds))  # gloo's own, which may be shorter

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        """[R, *S] of all ranks' ``mine`` [*S]."""
        result = mine.new_empty((self.size, *mine.shape))
        flat = mine.contiguous().view(-1)
        self._run("all_gather", lambda: [group_method(self._group, "all_gather_single")(result.view(-1), flat)])
        return result

    def all_to_all(
        self, rows: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], *, agreed: bool = False
    ) -> torch.Tensor:
        """All ranks' rows for this one, [M, ...]; ``rows`` [N, ...] and R sizes each way."""
        sends, receives = list(send_sizes), list(receive_sizes)
        if agreed:
            assert len(sends) == len(receives) == self.size and sum(sends) == rows.shape[0]
        else:
            header = all_to_all_header(rows, sends, receives, self.size)
            check_all_to_all(self.to_host(self.all_gather(to_device(header, self.device))))
        rows = rows.contiguous()
        result = rows.new_empty((sum(receives), *rows.shape[1:]))
        self._run("all_to_all", lambda: [group_method(self._group, "all_to_all_single")(result, rows, receives, sends)])
        return result

    def reduce_scatter(self, blocks: torch.Tensor) -> torch.Tensor:
        """[*S], the sum over ranks of ``blocks[rank]``; ``blocks`` [R, *S]."""
        assert blocks.shape[0] == self.size
        flat = blocks.contiguous().view(-1)
        if self.device.type == "cpu":
            # Gloo's own is an all-reduce, which moves twice the bytes, and whose wait obeys no timeout but the group's.
            parts, even = torch.empty_like(flat), [len(flat) // self.size] * self.size
            self._run("reduce_scatter", lambda: [group_method(self._group, "all_to_all_single")(parts, flat, even, even)])
            return parts.view(blocks.shape).sum(dim=0, dtype=blocks.dtype)
        result = blocks.new_empty(blocks.shape[1:])
        options = dist.ReduceScatterOptions()
        self._run(
            "reduce_scatter", lambda: [group_method(self._group, "reduce_scatter_single")(result.view(-1), flat, options)]
        )
        return result

    def exchange(self, sends: PeerTensors, receives: PeerTensors, *, agreed: bool = False) -> None:
        """Copy (peer, uint8 [bytes]) tensors from rank to rank in place."""
        if agreed:
            assert peer_tensors_are_sound(self.rank, self.size, [*sends, *receives])
        else:
            check_exchange(self.gather_bytes(exchange_header(self.rank, self.size, sends, receives)))
        for batch in exchange_batches(self.rank, self.size, sends, receives):
            self._run("exchange", partial(self._start, batch), point_to_point=True)

    def gather_bytes(self, message: bytes) -> list[bytes]:
        mine = np.array([len(message)])
        lengths = self.to_host(self.all_gather(to_device(mine, self.device)))[:, 0].tolist()
        padded = np.zeros(max(lengths), np.uint8)
        padded[: len(message)] = np.frombuffer(message, np.uint8)
        gathered = self.to_host(self.all_gather(to_device(padded, self.device)))
        return [row[:length].tobytes() for row, length in zip(gathered, lengths, strict=True)]

    def to_host(self, tensor: torch.Tensor) -> NDArray[Any]:
        """The values of a tensor of any shape, on the host."""
        self._check()
        if self.device.type == "cpu":
            return tensor.numpy()
        host, arrived = to_host(tensor)
        self.wait_until(arrived.query)
        return host.numpy()

    def wait_until(self, done: Callable[[], bool]) -> None:
        """Wait on the host until ``done()``: the one place where it waits for a CUDA device."""
        look_s = _NCCL_LOOK_S

        def check(waited_s: float) -> None:
            nonlocal look_s
            self._check()
            if waited_s > self.deadline_s:
                raise self._break(f"the device didn't finish what was queued within {self.deadline_s:g} s")
            if waited_s > look_s:
                look_s = waited_s + _NCCL_LOOK_S
                if found := error_of(self._group, self.device):
                    raise self._break(f"a peer is gone or silent: {found}, {waited_s:.1f} s into a wait")

        wait_until(done, check)
        self._check()  # aborted kernels end too, with undefined results

    def abort(self, reason: str) -> None:
        self._break(f"aborted: {reason}")

    def close(self) -> None:
        with self._break_lock:
            if self._cause is None:
                self._cause = "the transport was closed"
                self._end_waiting_thread()
                if self.device.type == "cpu":
                    cut(self._group)  # gloo would stay connected for as long as anything refers to the group
            with suppress(ValueError):  # it has been destroyed
                dist.destroy_process_group(self._group)

    def _start(self, batch: Sequence[tuple[bool, int, torch.Tensor]]) -> list[dist.Work]:
        operations = [
            dist.P2POp(dist.isend if outgoing else dist.irecv, tensor.view(-1), group=self._group, group_peer=peer)
            for outgoing, peer, tensor in batch
        ]
        try:
            return dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            if self.device.type == "cpu":
                raise
            # NCCL's group call stays open on this thread: later groups would never begin what is queued in it.
            why = str(error).partition("\n")[0]
            raise RankUnusable(f"NCCL was left in the middle of an exchange, so this process must end: {why}") from error

    def _run(self, name: str, start: Callable[[], Sequence[dist.Work]], *, point_to_point: bool = False) -> None:
        """Start works and wait for them: on gloo until they are done, on NCCL as the current stream does.

        Args:
            point_to_point: whether the works are sends and receives.
        """
        self._check()
        began = time.monotonic()
        try:
            works = start()
            if self.device.type == "cuda":
                for work in works:
                    work.wait()  # with a timeout it would block the host
            elif point_to_point:
                if self._waiting_thread is None:
                    self._waiting_thread = WaitingThread(self._group)
                self._await(self._waiting_thread.start(works, began + self.deadline_s), began)
            else:
                for work in works:
                    self._await(CollectiveOperation(work, self._group), began)
        except RuntimeError as error:
            took_s = time.monotonic() - began
            # The first line without the place in the source that gloo and NCCL begin with.
            text = re.sub(r"^\[[^]]*\] ", "", str(error).partition("\n")[0]).partition(". This is typically")[0]
            raise self._break(
                f"a peer is gone or silent: {name} failed after {took_s:.1f} s (deadline {self.deadline_s:g} s): {text}. "
                f"If no process ended, ranks made different numbers of forward passes, or one was busy with something else "
                f"for longer than the deadline: see epslots.sync_ranks"
            ) from error
        except BaseException as error:  # an interrupt, or a bug: works may be in progress, and this rank out of step
            self._break(f"{name}: {error!r}")
            raise

    def _await(self, operation: GlooOperation, began: float) -> None:
        """Wait for an operation of gloo, and leave it behind if the transport breaks.

        Raises:
            RuntimeError: it failed, a connection is closed, or the deadline is over.
            PeerLost: the transport was broken by another thread.
        """
        probe_s = _FIRST_PROBE_S
        try:
            while not operation.ends_within(min(_BROKEN_POLL_S, began + self.deadline_s - time.monotonic())):
                self._check()
                waited_s = time.monotonic() - began
                if waited_s >= self.deadline_s:
                    raise RuntimeError("it did not end in time")
                if waited_s < probe_s:
                    continue
                probe_s = waited_s + min(waited_s, _MOST_PROBE_GAP_S)
                for peer in range(self.size):
                    if peer != self.rank:
                        # Raises if the connection is closed. Else some 70 bytes wait at the peer, which never receives them.
                        self._group.send([self._probe_tensor], peer, _PROBE_TAG)
        except BaseException:
            operation.leave()
            raise

    def _check(self) -> None:
        if self._cause is not None:
            raise PeerLost(self._cause)

    def _break(self, what: str) -> PeerLost:
        """Break the transport unless it is broken already; returns the error to raise, of the first cause.

        A thread that calls this while another breaks the transport waits: on return nothing writes to receiving tensors.
        """
        with self._break_lock:
            if self._cause is None:
                self._cause = f"{what} (noticed by rank {self.rank} of {self.size}, epoch {self.epoch})"
                self._end_waiting_thread()
                cut(self._group)
            return PeerLost(self._cause)

    def _end_waiting_thread(self) -> None:
        if self._waiting_thread is not None:
            self._waiting_thread.end()


def group_method(group: dist.ProcessGroup, name: str) -> Callable[..., dist.Work]:
    """A method of a group, by its name in torch 2.13; of an older torch, under its old name."""
    found: Callable[..., dist.Work] | None = getattr(group, name, None)
    return getattr(group, _OLD_NAMES[name]) if found is None else found


@atexit.register
def _end_groups() -> None:
    """End the groups' own threads before the interpreter goes: a group ends with the last reference to it.

    Such a thread drops an operation's tensors a little after the operation has ended, and needs the interpreter for that.
    Without it, the process ends with SIGABRT ("terminate called without an active exception").
    """
    for transport in list(_open):
        transport.close()
        del transport._group


def exchange_batches(
    rank: int, size: int, sends: PeerTensors, receives: PeerTensors
) -> list[list[tuple[bool, int, torch.Tensor]]]:
    """A rank's sends and receives as batches of (outgoing, peer, tensor), waited for in turn.

    A tensor moves when both ends have started it, and an end starts it when all of its earlier batches are done. No ring of
    waiting ranks can form, however many tensors each of them has, for both ends order theirs by the same key, in which all
    tensors of all ranks differ. Proof: take the first tensor in that order that hasn't moved. All tensors before it have, at
    both ends; so both ends have reached its batch and started it. Therefore it moves, and then the next one is first.
    """
    keyed = []
    for outgoing, tensors in ((True, sends), (False, receives)):
        number: Counter[int] = Counter()
        for peer, tensor in tensors:
            source, target = (rank, peer) if outgoing else (peer, rank)
            # By their number within the pair of ranks, which keeps a pair's order; among equals, near peers first.
            keyed.append(((number[peer], (target - source) % size, source), (outgoing, peer, tensor)))
            number[peer] += 1
    keyed.sort(key=lambda item: item[0])
    ordered = [item for _, item in keyed]
    return [ordered[i : i + _EXCHANGE_BATCH] for i in range(0, len(ordered), _EXCHANGE_BATCH)]


def cut(group: dist.ProcessGroup) -> None:
    """End this rank's operations and connections: its waiting threads raise, and so do the peers that wait for it."""
    if group.name() == "nccl":
        with suppress(ValueError, RuntimeError):  # it has been destroyed, or NCCL tells of the loss once more
            dist.distributed_c10d._abort_process_group(group)
        return
    # Gloo's own abort leaves waiting threads waiting. But when a receive times out, gloo closes all connections of the rank.
    unused = torch.empty(1, dtype=torch.uint8)
    for peer in range(group.size()):
        if peer != group.rank():
            with suppress(RuntimeError):  # this one's connection is closed, or now all are
                group.recv([unused], peer, _CUT_TAG).wait(timedelta(milliseconds=1))
