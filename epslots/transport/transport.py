"""Exchanges between ranks: the ``Transport`` protocol, and the checks that its implementations share.

``TorchTransport`` (``torch_transport.py``) joins processes; ``LocalTransport`` (``local_transport.py``) joins threads of one
process, for tests. Both check sizes with the functions below: they refuse the same calls with the same messages.

    operation   one call of a method that all ranks make in the same order
    agreed      sizes derived from integers that all ranks have exchanged already, so that they can't differ
    broken      an operation failed on the wire, or was aborted: nothing more is sent in this epoch

Legend of shape suffixes: R ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from epslots.arrays import IntArray
from epslots.errors import ExchangeError

PeerTensors = Sequence[tuple[int, torch.Tensor]]
"""(peer, contiguous uint8 tensor) of each tensor sent to, or received from, another rank."""


class Transport(Protocol):
    """Moves tensors between the ranks of one process group.

    All ranks make the same calls in the same order, each from one thread. Tensors given and returned are on ``device``. On
    CUDA an operation is queued on the current stream, which orders it; elsewhere it is done on return. A result shares no
    memory with any rank's input, and inputs may be changed after the call.

    Raises:
        PeerLost: from every method but ``abort`` and ``close``: a rank is gone, or silent for longer than the deadline, or
            the transport was aborted. It is broken from then on: later calls raise PeerLost at once, with the first cause.
        ExchangeError: on every rank, and nothing was exchanged; the transport remains usable.

    Attributes:
        rank, size: this rank, and the number of ranks (R).
        device: where tensors are.
        epoch: number of the process group.
        deadline_s: seconds that one operation may take. It may be changed between operations, on all ranks alike.
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
            agreed: whether the ranks go without comparing sizes first.

        Raises:
            ExchangeError: sizes, types or widths differ between ranks (where not ``agreed``).
        """
        ...

    def reduce_scatter(self, blocks: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of ``blocks[rank]``, [*S]. ``blocks`` is [R, *S], of the same shape and type on all ranks."""
        ...

    def exchange(self, sends: PeerTensors, receives: PeerTensors, *, agreed: bool = False) -> None:
        """Copy tensors from rank to rank in place, without staging. A rank may take part with none.

        The sends and receives of a pair of ranks are matched in the order given: both ranks list them alike.

        Raises:
            ExchangeError: numbers or sizes differ between ranks, or a tensor or peer isn't allowed (where not ``agreed``).
        """
        ...

    def gather_bytes(self, message: bytes) -> list[bytes]:
        """Every rank's message; each may have any length."""
        ...

    def to_host(self, tensor: torch.Tensor) -> NDArray[Any]:
        """The tensor's values on the host, once they are computed: on the CPU a view, elsewhere a copy."""
        ...

    def wait_until(self, done: Callable[[], bool]) -> None:
        """Wait on the host for something that the device does, such as ``event.query``. Obeys the deadline and ``abort``.

        Raises:
            PeerLost: it isn't done by the deadline, or the transport is broken.
        """
        ...

    def abort(self, reason: str) -> None:
        """Break the transport, from any thread: the running operation and later ones raise ``PeerLost``. May be repeated."""
        ...

    def close(self) -> None:
        """Leave the group, after the last operation. Safe to repeat, and on a broken transport."""
        ...


# Before an operation whose sizes aren't agreed, each rank announces its own. Every rank checks all announcements, so that all
# ranks raise or none does.

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
_ROW_KIND = slice(1, 3 + _ROW_DIMS)  # type and dimensions of a row: the same on all ranks


def all_to_all_header(rows: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], size: int) -> IntArray:
    """A rank's announcement of its ``all_to_all``, int64 [3 + dims + 2 R].

    Number of rows (-1: unusable), index of their type, dims of a row and their sizes, send sizes, receive sizes.
    """
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


def check_all_to_all(headers: IntArray) -> None:
    """Compare all ranks' announcements, int64 [R, numbers].

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
        if (header[_ROW_KIND] != headers[0, _ROW_KIND]).any():
            raise ExchangeError(f"all_to_all: rank 0 has {_row_kind(headers[0])}, rank {rank} has {_row_kind(header)}")
    for source, target in np.argwhere(sends != receives.T):
        raise ExchangeError(
            f"all_to_all: rank {source} would send {sends[source, target]} rows to rank {target}, "
            f"which expects {receives[target, source]}"
        )


def _row_kind(header: IntArray) -> str:
    return f"{_DTYPES[header[1]]} rows of shape {tuple(header[3 : 3 + header[2]].tolist())}"


def peer_tensors_are_sound(rank: int, size: int, tensors: PeerTensors) -> bool:
    """Whether each is a contiguous uint8 tensor, to or from another rank."""
    return all(
        peer != rank and 0 <= peer < size and tensor.dtype == torch.uint8 and tensor.is_contiguous()
        for peer, tensor in tensors
    )


def exchange_header(rank: int, size: int, sends: PeerTensors, receives: PeerTensors) -> bytes:
    """A rank's announcement of its ``exchange``, int64: number of sends (-1: unusable), then peer and bytes of each tensor."""
    tensors = [*sends, *receives]
    numbers = [len(sends) if peer_tensors_are_sound(rank, size, tensors) else -1]
    for peer, tensor in tensors:
        numbers += [peer, tensor.nbytes]
    return np.array(numbers, np.int64).tobytes()


def check_exchange(headers: Sequence[bytes]) -> None:
    """Compare all ranks' announcements, in their order.

    Raises:
        ExchangeError: naming the first ranks that differ.
    """
    sent, expected = defaultdict(list), defaultdict(list)
    for rank, header in enumerate(headers):
        count, *numbers = np.frombuffer(header, np.int64).tolist()
        if count < 0:
            raise ExchangeError(f"exchange: an entry of rank {rank} isn't a contiguous uint8 tensor, to or from another rank")
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
