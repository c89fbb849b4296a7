"""The seam between ranks: what they exchange, and a fake of it for tests and the simulator.

``Transport`` is what the rest of epslots knows of other ranks. ``torch_transport.py`` has the real one; ``LocalHub`` joins
threads of one process. Both check sizes with the functions below, so that they refuse the same calls in the same words.

    operation   one call of a method that all ranks make in the same order
    agreed      sizes were derived from integers that all ranks had already exchanged, so that they can't differ
    broken      an operation failed on the wire, or was aborted: nothing more is sent in this epoch
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from epslots.errors import ExchangeError, PeerLost

Transfers = Sequence[tuple[int, torch.Tensor]]
"""(peer, contiguous uint8 tensor): where to, or where from."""


class Transport(Protocol):
    """Moves tensors between the ranks of one process group.

    Every rank makes the same calls in the same order, from one thread. Tensors given and returned are on ``device``. On CUDA
    an operation is queued on the current stream, which orders it; elsewhere it is done on return. What is returned shares no
    memory with what a rank gave, and what was given may be changed afterwards.

    Raises:
        PeerLost: from every method but ``abort`` and ``close``, when a rank is gone or silent for longer than the deadline,
            and after ``abort``. The transport is broken then: each later call raises it at once, naming the first cause.
        ExchangeError: on every rank, and nothing was exchanged; the transport remains usable.

    Attributes:
        rank, size: this rank, and how many there are (R).
        device: where tensors are.
        epoch: number of the process group.
        deadline_s: how long one operation may take. It may be changed between operations, on all ranks alike.
    """

    rank: int
    size: int
    device: torch.device
    epoch: int
    deadline_s: float

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor, [R, *S]. By contract ``mine`` [*S] has the same shape and type on all ranks."""
        ...

    def all_to_all(
        self, rows: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], *, agreed: bool = False
    ) -> torch.Tensor:
        """Each rank's rows for this one, [M, ...], sorted by the rank that sent them.

        Args:
            rows: [N, ...], sorted by destination; of one type and width on all ranks.
            send_sizes, receive_sizes: rows to and from each rank (R numbers, this rank's own among them; 0 is allowed).
            agreed: the ranks need not compare their sizes first.

        Raises:
            ExchangeError: sizes, types or widths differ between ranks (where not ``agreed``).
        """
        ...

    def reduce_scatter(self, blocks: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of ``blocks[rank]``, [*S]. ``blocks`` is [R, *S], of the same shape and type on all ranks."""
        ...

    def exchange(self, sends: Transfers, receives: Transfers, *, agreed: bool = False) -> None:
        """Copy tensors from rank to rank in place, without staging. A rank may take part with nothing.

        Those of one pair of ranks are matched in the order given; so the sender and the receiver list them alike.

        Raises:
            ExchangeError: numbers or sizes differ between ranks, or a tensor or peer isn't allowed (where not ``agreed``).
        """
        ...

    def gather_bytes(self, message: bytes) -> list[bytes]:
        """Every rank's message; each may have any length."""
        ...

    def to_host(self, tensor: torch.Tensor) -> NDArray[Any]:
        """The tensor's values on the host, once they are there: on the CPU a view, elsewhere a copy."""
        ...

    def abort(self, reason: str) -> None:
        """Break the transport, from any thread: the operation in progress and later ones raise ``PeerLost``. Twice is once."""
        ...

    def close(self) -> None:
        """Leave the group in peace, after the last operation. Closing twice, or what is broken, is safe."""
        ...


# What ranks tell each other before an exchange whose sizes aren't agreed. Each checks all of it, and so to the same verdict.

_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)
_ROW_DIMS = 4
_KIND = slice(1, 3 + _ROW_DIMS)  # the header's part that is the same on all ranks


def all_to_all_header(
    rows: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], size: int
) -> NDArray[np.int64]:
    """What a rank announces of its ``all_to_all``: rows (-1: unusable), type, dims of a row, send sizes, receive sizes."""
    header = np.full(3 + _ROW_DIMS + 2 * size, -1, np.int64)
    sizes = [*send_sizes, *receive_sizes]
    if (
        len(send_sizes) == len(receive_sizes) == size
        and min(sizes) >= 0
        and 1 <= rows.ndim <= 1 + _ROW_DIMS
        and rows.dtype in _DTYPES
    ):
        header[: 2 + rows.ndim] = rows.shape[0], _DTYPES.index(rows.dtype), rows.ndim - 1, *rows.shape[1:]
        header[3 + _ROW_DIMS :] = sizes
    return header


def check_all_to_all(headers: NDArray[np.int64]) -> None:
    """Compare what all ranks announced, [R, numbers].

    Raises:
        ExchangeError: naming the first ranks that differ.
    """
    size = len(headers)
    sends, receives = headers[:, -2 * size : -size], headers[:, -size:]
    for rank, header in enumerate(headers):
        if header[0] < 0:
            raise ExchangeError(
                f"all_to_all: rank {rank} doesn't give {size} send and {size} receive sizes >= 0, and rows of a known type "
                f"with at most {_ROW_DIMS} dimensions each"
            )
        if header[0] != sends[rank].sum():
            raise ExchangeError(f"all_to_all: rank {rank} has {header[0]} rows and would send {sends[rank].sum()}")
        if (header[_KIND] != headers[0, _KIND]).any():
            raise ExchangeError(f"all_to_all: rank 0 has {_kind(headers[0])}, rank {rank} has {_kind(header)}")
    for source, target in np.argwhere(sends != receives.T):
        raise ExchangeError(
            f"all_to_all: rank {source} would send {sends[source, target]} rows to rank {target}, "
            f"which expects {receives[target, source]}"
        )


def _kind(header: NDArray[np.int64]) -> str:
    return f"{_DTYPES[header[1]]} rows of shape {tuple(header[3 : 3 + header[2]].tolist())}"


def transfers_are_sound(rank: int, size: int, transfers: Transfers) -> bool:
    """Whether each is a contiguous uint8 tensor, to or from another rank."""
    return all(
        peer != rank and 0 <= peer < size and tensor.dtype == torch.uint8 and tensor.is_contiguous()
        for peer, tensor in transfers
    )


def exchange_header(rank: int, size: int, sends: Transfers, receives: Transfers) -> bytes:
    """What a rank announces of its ``exchange``: how many it sends (-1: unusable), then peer and bytes of each transfer."""
    transfers = [*sends, *receives]
    sound = transfers_are_sound(rank, size, transfers)
    numbers = [len(sends) if sound else -1]
    for peer, tensor in transfers:
        numbers += [peer, tensor.nbytes]
    return np.array(numbers, np.int64).tobytes()


def check_exchange(headers: Sequence[bytes]) -> None:
    """Compare what all ranks announced.

    Raises:
        ExchangeError: naming the first ranks that differ.
    """
    sent, expected = defaultdict(list), defaultdict(list)
    for rank, header in enumerate(headers):
        count, *numbers = np.frombuffer(header, np.int64).tolist()
        if count < 0:
            raise ExchangeError(f"exchange: rank {rank} gives what isn't a contiguous uint8 tensor, to or from another rank")
        for number, (peer, nbytes) in enumerate(zip(numbers[::2], numbers[1::2], strict=True)):
            if number < count:
                sent[rank, peer].append(nbytes)
            else:
                expected[peer, rank].append(nbytes)
    for source, target in sorted({*sent, *expected}):
        ours, theirs = sent[source, target], expected[source, target]
        if len(ours) != len(theirs):
            raise ExchangeError(
                f"exchange: rank {source} would send {len(ours)} tensors to rank {target}, which expects {len(theirs)}"
            )
        for number, (given, wanted) in enumerate(zip(ours, theirs, strict=True)):
            if given != wanted:
                raise ExchangeError(
                    f"exchange: tensor {number} from rank {source} to rank {target} has {given} bytes, "
                    f"and {wanted} are expected"
                )


class _Meeting:
    """One operation of all ranks: what each gave, and what each gets once the last has come."""

    def __init__(self) -> None:
        self.given: dict[int, tuple[str, Any]] = {}
        self.results: list[Any] | None = None
        self.refusal: str | None = None

    @property
    def over(self) -> bool:
        return self.results is not None or self.refusal is not None


class LocalHub:
    """Joins ``size`` threads of this process as ranks: the fake behind the seam, for tests and the simulator.

    The last rank to come does an operation's work for all, in the order of ranks: results don't depend on who is faster.
    Sizes, shapes and types are always checked, whatever is said to be agreed, and so is that all ranks make the same call.
    What breaks one rank's transport breaks all of them.

    Args:
        deadline_s: how long a rank waits for the others in one operation.
    """

    def __init__(self, size: int, *, epoch: int = 0, deadline_s: float = 60.0) -> None:
        self.size = size
        self.epoch = epoch
        self.deadline_s = deadline_s
        self._changed = threading.Condition(threading.Lock())
        self._meeting = _Meeting()
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

    def meet(self, rank: int, name: str, gift: Any, combine: Callable[[list[Any]], list[Any]]) -> Any:
        """Take part in one operation.

        Args:
            name: the operation's, which must be the same for all ranks.
            gift: what this rank gives.
            combine: makes each rank's result from all gifts, both in the order of ranks. The last rank's is called.
        """
        with self._changed:
            self.check()
            meeting = self._meeting
            assert rank not in meeting.given, f"rank {rank} is used by two threads"
            meeting.given[rank] = name, gift
            if len(meeting.given) == self.size:
                self._meeting = _Meeting()
                self._conclude(meeting, combine)
                self._changed.notify_all()
            elif not self._changed.wait_for(lambda: meeting.over or self._cause is not None, self.deadline_s):
                absent = sorted(set(range(self.size)) - set(meeting.given))
                self._break(f"{name}: ranks {absent} didn't take part within {self.deadline_s:g} s")
            if not meeting.over:  # a meeting that was concluded counts, even if the hub has broken since
                self.check()
        if meeting.refusal is not None:
            raise ExchangeError(meeting.refusal)
        assert meeting.results is not None
        return meeting.results[rank]

    def _conclude(self, meeting: _Meeting, combine: Callable[[list[Any]], list[Any]]) -> None:
        names, gifts = zip(*(meeting.given[rank] for rank in range(self.size)), strict=True)
        try:
            if len(set(names)) > 1:
                raise ExchangeError(f"ranks are in different operations: {', '.join(names)}")
            meeting.results = combine(list(gifts))
        except ExchangeError as error:
            meeting.refusal = str(error)
        except BaseException as error:
            self._break(f"{names[0]}: {error!r}")  # a bug, raised in this thread; the others must not wait for it
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
        """As of the hub, for all ranks."""
        return self.hub.deadline_s

    @deadline_s.setter
    def deadline_s(self, seconds: float) -> None:
        self.hub.deadline_s = seconds

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        def combine(gifts: list[torch.Tensor]) -> list[torch.Tensor]:
            _check_alike("all_gather", gifts)
            return [torch.stack(gifts) for _ in gifts]

        return self.hub.meet(self.rank, "all_gather", mine, combine)

    def all_to_all(
        self, rows: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], *, agreed: bool = False
    ) -> torch.Tensor:
        def combine(gifts: list[tuple[torch.Tensor, NDArray[np.int64], list[int]]]) -> list[torch.Tensor]:
            check_all_to_all(np.stack([header for _, header, _ in gifts]))
            parts = [given.split(sizes) for given, _, sizes in gifts]
            return [torch.cat([part[target] for part in parts]) for target in range(self.size)]

        header = all_to_all_header(rows, send_sizes, receive_sizes, self.size)
        return self.hub.meet(self.rank, "all_to_all", (rows, header, list(send_sizes)), combine)

    def reduce_scatter(self, blocks: torch.Tensor) -> torch.Tensor:
        def combine(gifts: list[torch.Tensor]) -> list[torch.Tensor]:
            _check_alike("reduce_scatter", gifts)
            if gifts[0].ndim < 1 or gifts[0].shape[0] != self.size:
                raise ExchangeError(f"reduce_scatter: {self.size} blocks are needed, not shape {tuple(gifts[0].shape)}")
            return [reduce(torch.add, [gift[target] for gift in gifts]).clone() for target in range(self.size)]

        return self.hub.meet(self.rank, "reduce_scatter", blocks, combine)

    def exchange(self, sends: Transfers, receives: Transfers, *, agreed: bool = False) -> None:
        def combine(gifts: list[tuple[bytes, Transfers, Transfers]]) -> list[None]:
            check_exchange([header for header, _, _ in gifts])
            queues = defaultdict(list)
            for source, (_, outgoing, _) in enumerate(gifts):
                for target, tensor in outgoing:
                    queues[source, target].append(tensor)
            streams = {pair: iter(queue) for pair, queue in queues.items()}
            for target, (_, _, incoming) in enumerate(gifts):
                for source, tensor in incoming:
                    tensor.view(-1).copy_(next(streams[source, target]).view(-1))
            return [None] * self.size

        header = exchange_header(self.rank, self.size, sends, receives)
        self.hub.meet(self.rank, "exchange", (header, sends, receives), combine)

    def gather_bytes(self, message: bytes) -> list[bytes]:
        return self.hub.meet(self.rank, "gather_bytes", message, lambda gifts: [list(gifts) for _ in gifts])

    def to_host(self, tensor: torch.Tensor) -> NDArray[Any]:
        self.hub.check()
        return tensor.numpy()

    def abort(self, reason: str) -> None:
        self.hub.break_off(f"rank {self.rank} aborted: {reason}")

    def close(self) -> None:
        self.hub.break_off(f"rank {self.rank} closed its transport")


def _check_alike(name: str, gifts: Sequence[torch.Tensor]) -> None:
    for rank, tensor in enumerate(gifts):
        if (tensor.dtype, tensor.shape) != (gifts[0].dtype, gifts[0].shape):
            raise ExchangeError(
                f"{name}: rank 0 has {gifts[0].dtype} {tuple(gifts[0].shape)}, "
                f"rank {rank} has {tensor.dtype} {tuple(tensor.shape)}"
            )
