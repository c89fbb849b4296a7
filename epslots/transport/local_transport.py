"""A transport between threads of one process: the fake behind the seam, for tests.

Each thread is a rank, with a ``LocalTransport`` of the common ``LocalHub``.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from epslots.arrays import IntArray
from epslots.errors import ExchangeError, PeerLost
from epslots.transport.host_wait import wait_until
from epslots.transport.transport import (
    PeerTensors,
    all_to_all_header,
    check_all_to_all,
    check_exchange,
    exchange_header,
)


class _LocalOperation:
    """One operation of all ranks: their inputs, and their results once the last rank has called."""

    def __init__(self) -> None:
        self.inputs: dict[int, tuple[str, Any]] = {}
        self.results: list[Any] | None = None
        self.refusal: str | None = None

    @property
    def over(self) -> bool:
        return self.results is not None or self.refusal is not None


class LocalHub:
    """Joins ``size`` threads of this process as ranks.

    The last rank to call does an operation's work for all, in the order of ranks: results don't depend on timing. Sizes,
    shapes and types are checked even where they are said to be agreed, and so is that all ranks make the same call. A break
    of one rank's transport breaks all of them.

    Args:
        deadline_s: seconds that a rank waits for the others in one operation.
    """

    def __init__(self, size: int, *, epoch: int = 0, deadline_s: float = 60.0) -> None:
        self.size = size
        self.epoch = epoch
        self.deadline_s = deadline_s
        self._changed = threading.Condition(threading.Lock())
        self._operation = _LocalOperation()
        self._cause: str | None = None

    def transport(self, rank: int) -> LocalTransport:
        """The rank's end, for one thread."""
        return LocalTransport(self, rank)

    def lose(self, rank: int) -> None:
        """Take a rank away, as if its process had died: all ranks' current and later operations raise ``PeerLost``."""
        self.break_off(f"rank {rank} is lost")

    def break_off(self, cause: str) -> None:
        """Break all transports; the first cause stays."""
        with self._changed:
            self._break(cause)

    def check(self) -> None:
        """Raise PeerLost if the hub is broken."""
        if self._cause is not None:
            raise PeerLost(self._cause)

    def run(self, rank: int, name: str, given: Any, merge: Callable[[list[Any]], list[Any]]) -> Any:
        """Take part in one operation; returns this rank's result.

        Args:
            name: of the operation; the same on all ranks.
            given: this rank's input.
            merge: makes all ranks' results of all their inputs, both in the order of ranks. The last rank's is called.
        """
        with self._changed:
            self.check()
            operation = self._operation
            assert rank not in operation.inputs, f"rank {rank} is used by two threads"
            operation.inputs[rank] = name, given
            if len(operation.inputs) == self.size:
                self._operation = _LocalOperation()
                self._conclude(operation, merge)
                self._changed.notify_all()
            elif not self._changed.wait_for(lambda: operation.over or self._cause is not None, self.deadline_s):
                absent = sorted(set(range(self.size)) - set(operation.inputs))
                self._break(f"{name}: ranks {absent} didn't take part within {self.deadline_s:g} s")
            if not operation.over:  # an operation that was concluded counts, even if the hub has broken since
                self.check()
        if operation.refusal is not None:
            raise ExchangeError(operation.refusal)
        assert operation.results is not None
        return operation.results[rank]

    def _conclude(self, operation: _LocalOperation, merge: Callable[[list[Any]], list[Any]]) -> None:
        names, inputs = zip(*(operation.inputs[rank] for rank in range(self.size)), strict=True)
        try:
            if len(set(names)) > 1:
                raise ExchangeError(f"ranks are in different operations: {', '.join(names)}")
            operation.results = merge(list(inputs))
        except ExchangeError as error:
            operation.refusal = str(error)
        except BaseException as error:
            self._break(f"{names[0]}: {error!r}")  # a bug, raised in this thread; the others stop waiting
            raise

    def _break(self, cause: str) -> None:
        if self._cause is None:
            self._cause = cause
            self._changed.notify_all()


class LocalTransport:
    """One rank's end of a ``LocalHub``. A ``Transport``."""

    def __init__(self, hub: LocalHub, rank: int) -> None:
        assert 0 <= rank < hub.size
        self.rank = rank
        self.size = hub.size
        self.device = torch.device("cpu")
        self.epoch = hub.epoch
        self.hub = hub

    @property
    def deadline_s(self) -> float:
        """The hub's, for all ranks."""
        return self.hub.deadline_s

    @deadline_s.setter
    def deadline_s(self, seconds: float) -> None:
        self.hub.deadline_s = seconds

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        """[R, *S] of all ranks' ``mine`` [*S]."""

        def merge(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            _check_alike("all_gather", inputs)
            return [torch.stack(inputs) for _ in inputs]

        return self.hub.run(self.rank, "all_gather", mine, merge)

    def all_to_all(
        self, rows: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], *, agreed: bool = False
    ) -> torch.Tensor:
        """All ranks' rows for this one, [M, ...]; ``rows`` [N, ...] and R sizes each way."""

        def merge(inputs: list[tuple[torch.Tensor, IntArray, list[int]]]) -> list[torch.Tensor]:
            check_all_to_all(np.stack([header for _, header, _ in inputs]))
            parts = [given.split(sizes) for given, _, sizes in inputs]
            return [torch.cat([part[target] for part in parts]) for target in range(self.size)]

        header = all_to_all_header(rows, send_sizes, receive_sizes, self.size)
        return self.hub.run(self.rank, "all_to_all", (rows, header, list(send_sizes)), merge)

    def reduce_scatter(self, blocks: torch.Tensor) -> torch.Tensor:
        """[*S], the sum over ranks of ``blocks[rank]``; ``blocks`` [R, *S]."""

        def merge(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            _check_alike("reduce_scatter", inputs)
            if inputs[0].ndim < 1 or inputs[0].shape[0] != self.size:
                raise ExchangeError(f"reduce_scatter: {self.size} blocks are needed, not shape {tuple(inputs[0].shape)}")
            return [reduce(torch.add, [blocks[target] for blocks in inputs]).clone() for target in range(self.size)]

        return self.hub.run(self.rank, "reduce_scatter", blocks, merge)

    def exchange(self, sends: PeerTensors, receives: PeerTensors, *, agreed: bool = False) -> None:
        """Copy (peer, uint8 [bytes]) tensors from rank to rank in place."""

        def merge(inputs: list[tuple[bytes, PeerTensors, PeerTensors]]) -> list[None]:
            check_exchange([header for header, _, _ in inputs])
            queues = defaultdict(list)
            for source, (_, outgoing, _) in enumerate(inputs):
                for target, tensor in outgoing:
                    queues[source, target].append(tensor)
            streams = {pair: iter(queue) for pair, queue in queues.items()}
            for target, (_, _, incoming) in enumerate(inputs):
                for source, tensor in incoming:
                    tensor.view(-1).copy_(next(streams[source, target]).view(-1))
            return [None] * self.size

        header = exchange_header(self.rank, self.size, sends, receives)
        self.hub.run(self.rank, "exchange", (header, sends, receives), merge)

    def gather_bytes(self, message: bytes) -> list[bytes]:
        return self.hub.run(self.rank, "gather_bytes", message, lambda inputs: [list(inputs) for _ in inputs])

    def to_host(self, tensor: torch.Tensor) -> NDArray[Any]:
        """The values of a tensor of any shape, on the host."""
        self.hub.check()
        return tensor.numpy()

    def wait_until(self, done: Callable[[], bool]) -> None:
        """Wait until ``done()``; the hub may be broken off meanwhile."""
        wait_until(done, lambda _: self.hub.check())

    def abort(self, reason: str) -> None:
        self.hub.break_off(f"rank {self.rank} aborted: {reason}")

    def close(self) -> None:
        self.hub.break_off(f"rank {self.rank} closed its transport")


def _check_alike(name: str, inputs: Sequence[torch.Tensor]) -> None:
    """Raise ExchangeError, naming the first rank whose tensor has not rank 0's type and shape."""
    for rank, tensor in enumerate(inputs):
        if (tensor.dtype, tensor.shape) != (inputs[0].dtype, inputs[0].shape):
            raise ExchangeError(
                f"{name}: rank 0 has {inputs[0].dtype} {tuple(inputs[0].shape)}, "
                f"rank {rank} has {tensor.dtype} {tuple(tensor.shape)}"
            )
