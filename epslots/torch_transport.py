"""The transport over torch.distributed: gloo on the CPU, NCCL on CUDA; and the forming of its process groups.

On gloo an operation is waited for. It ends when a peer closes its connection, at the deadline, or when a second thread cuts
this rank's connections. A rank that fails cuts its own, so that those who wait for it learn at once, not at their deadlines.

On NCCL an operation is queued on the device, and a lost peer stops the device rather than the host. The host waits in
``to_host`` alone, which obeys the deadline and ``abort``: a loss shows there, and not in the call that queued the operation.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.distributed_c10d import PrefixStore, Store

from epslots.device_copy import to_device
from epslots.errors import ConfigError, PeerLost
from epslots.transport import (
    Transfers,
    all_to_all_header,
    check_all_to_all,
    check_exchange,
    exchange_header,
    transfers_are_sound,
)

# Transfers of one rank that are under way at once: unbounded batches have hung NCCL, whose kernels take eight together.
_TRANSFERS_PER_BATCH = 8

_POLL_S = 20e-6  # between looks at a CUDA event: a wait that blocks in the driver could not be aborted
_CUT_TAG = 1  # no message has it


class TorchTransport:
    """A ``Transport`` on a process group, which is its own from now on.

    Args:
        group: of gloo for a CPU device, of NCCL for a CUDA device.
        generation: the group's number.
        deadline_s: how long one operation (of an exchange: one batch), or one wait in ``to_host``, may take.

    Raises:
        ConfigError: the group's backend isn't the device's.
    """

    def __init__(
        self, group: dist.ProcessGroup, *, device: torch.device, generation: int = 0, deadline_s: float = 60.0
    ) -> None:
        backend = dist.get_backend(group)
        if (backend, device.type) not in {("gloo", "cpu"), ("nccl", "cuda")}:
            raise ConfigError(f"a {backend} group can't serve {device}: gloo serves cpu, nccl serves cuda")
        self.rank = group.rank()
        self.size = group.size()
        self.device = device
        self.generation = generation
        self._group = group
        self.deadline_s = deadline_s
        self._cause: str | None = None
        self._breaking = threading.Lock()

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
        result = blocks.new_empty(blocks.shape[1:])
        flat = blocks.contiguous().view(-1)
        options = dist.ReduceScatterOptions()
        self._run("reduce_scatter", lambda: [self._group.reduce_scatter_single(result.view(-1), flat, options)])
        return result

    def exchange(self, sends: Transfers, receives: Transfers, *, agreed: bool = False) -> None:
        if agreed:
            assert transfers_are_sound(self.rank, self.size, [*sends, *receives])
        else:
            check_exchange(self.gather_bytes(exchange_header(self.rank, self.size, sends, receives)))
        for batch in batches(self.rank, self.size, sends, receives):
            self._run("exchange", partial(self._start, batch))

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
                if self.device.type == "cpu":
                    _cut(self._group)  # gloo would stay connected for as long as anything refers to the group
            with suppress(ValueError):  # it has been destroyed
                dist.destroy_process_group(self._group)

    def _start(self, batch: Sequence[tuple[bool, int, torch.Tensor]]) -> list[dist.Work]:
        return dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend if outgoing else dist.irecv, tensor.view(-1), group=self._group, group_peer=peer)
                for outgoing, peer, tensor in batch
            ]
        )

    def _run(self, name: str, start: Callable[[], Sequence[dist.Work]]) -> None:
        """Start works and wait for them: on gloo until they are done, on NCCL as the current stream does."""
        self._check()
        began = time.monotonic()
        try:
            for work in start():
                if self.device.type == "cuda":
                    work.wait()  # with a timeout it would block the host
                else:
                    left_s = began + self.deadline_s - time.monotonic()
                    work.wait(timedelta(seconds=max(left_s, 1e-3)))  # 0 would mean the default
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

    def _check(self) -> None:
        if self._cause is not None:
            raise PeerLost(self._cause)

    def _break(self, what: str) -> PeerLost:
        """Break the transport unless it is broken already; returns the error to raise, of the first cause.

        A thread that finds it being broken waits for the end of that: afterwards nothing writes to what was being received.
        """
        with self._breaking:
            if self._cause is None:
                self._cause = f"{what} (noticed by rank {self.rank} of {self.size}, generation {self.generation})"
                _cut(self._group)
            return PeerLost(self._cause)


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


def form_group(store: Store, *, generation: int, rank: int, size: int, backend: str, deadline_s: float) -> dist.ProcessGroup:
    """Leave this process's group, whatever its state, and form the next with all who call this with the same generation.

    Args:
        store: where ranks find each other; shared by all generations, each under its own prefix.
        generation: a new one for each attempt, since what an attempt leaves in the store would mislead the next.
        backend: "gloo", or "nccl" for the current CUDA device.
        deadline_s: how long to wait for the others.

    Raises:
        PeerLost: not all ranks came in time. This may be called again, with a later generation.
    """
    group = dist.group.WORLD
    if group is not None:
        _cut(group)  # destroying alone would wait for what is still in progress
    if dist.is_initialized():
        dist.destroy_process_group()
    # Part of the rendezvous keys: a rank whose last attempt failed would otherwise look for the others under another number.
    dist.distributed_c10d._world.group_count = 0
    device = None
    if backend == "nccl":
        # Torch's watchdog would end the process when a peer is lost. This is read from the environment alone.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        # One communicator, made now by all ranks: the first exchange may be one of some ranks only.
        device = torch.device("cuda", torch.cuda.current_device())
    hook = sys.excepthook
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore(f"epslots/{generation}", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=deadline_s),
            device_id=device,
        )
    except RuntimeError as error:
        raise PeerLost(f"generation {generation} of {size} ranks didn't form within {deadline_s:g} s: {error}") from error
    finally:
        sys.excepthook = hook  # each group would wrap it once more
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _cut(group: dist.ProcessGroup) -> None:
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
