"""``GlooConnection``: a ``PairConnection`` over torch.distributed, for two processes anywhere.

The pair is a gloo group of its own: nothing of it waits for the ranks' groups, nor they for it. Caches of GPUs go through the
host's memory, as they do in ``MemoryConnection``.
"""

from __future__ import annotations

import atexit
import time
from concurrent.futures import Future
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from epslots.errors import PeerLost
from epslots.piece_sizes import PIECE_BYTES
from epslots.transport.forming import connect_gloo
from epslots.transport.gloo_operations import WaitingThread
from epslots.transport.pair_connection import MOST_MESSAGE_BYTES, prove
from epslots.transport.torch_transport import cut

_PROBE_EVERY_S = 0.1
_PROBE_TAG = 2  # no message has it

_open: WeakSet[GlooConnection] = WeakSet()


class GlooConnection:
    """One end of a connection. Make it with ``open_gloo_connection``.

    Args:
        group: torch's gloo group of two ranks; the source is rank 0.
        deadline_s: seconds that each call may take.
    """

    def __init__(self, group: Any, deadline_s: float) -> None:
        self._group, self._peer = group, 1 - group.rank()
        self._deadline_s = deadline_s
        self._sending: tuple[dist.Work, torch.Tensor] | None = None
        """The last piece, which may still be on its way."""
        self._aborted = False
        self._waiting = WaitingThread(group)
        self._probe = torch.zeros(1, dtype=torch.uint8)
        _open.add(self)

    def send(self, message: bytes) -> None:
        self._wait_for_piece()
        self._wait(self._start(torch.tensor([len(message)]), outgoing=True))
        if message:  # gloo never ends with an empty one
            self._wait(self._start(torch.frombuffer(bytearray(message), dtype=torch.uint8), outgoing=True))

    def receive(self) -> bytes:
        size = torch.zeros(1, dtype=torch.int64)
        self._wait(self._start(size, outgoing=False))
        if not 0 <= int(size) <= MOST_MESSAGE_BYTES:
            self.abort()
            raise PeerLost(f"the other end of a connection announces a message of {int(size)} bytes")
        message = torch.zeros(int(size), dtype=torch.uint8)
        if len(message):
            self._wait(self._start(message, outgoing=False))
        return message.numpy().tobytes()

    def send_piece(self, data: torch.Tensor) -> None:
        assert 0 < len(data) <= PIECE_BYTES
        self._wait_for_piece()
        own = data.clone()
        self._sending = self._start(own, outgoing=True), own

    def receive_piece(self, nbytes: int) -> torch.Tensor:
        piece = torch.empty(nbytes, dtype=torch.uint8)
        self._wait(self._start(piece, outgoing=False))
        return piece

    def release(self, pieces: int) -> None:
        """Nothing: each piece has memory of its own, and the source sends one at a time."""

    def abort(self) -> None:
        if not self._aborted:
            self._aborted = True
            self._waiting.end()
            cut(self._group)

    def _wait_for_piece(self) -> None:
        sending, self._sending = self._sending, None
        if sending is not None:
            self._wait(sending[0])

    def _start(self, data: torch.Tensor, *, outgoing: bool) -> dist.Work:
        if self._aborted:
            raise PeerLost("the connection was aborted")
        try:
            started = self._group.send if outgoing else self._group.recv
            work: dist.Work = started([data], self._peer, 0)
        except RuntimeError as error:
            raise self._lost(error) from error
        return work

    def _wait(self, work: dist.Work) -> None:
        """Wait for a send or receive, and look now and then whether the connection is alive: gloo itself doesn't."""
        operation = self._waiting.start([work], time.monotonic() + self._deadline_s)
        try:
            while not operation.ends_within(_PROBE_EVERY_S):
                if self._aborted:
                    raise PeerLost("the connection was aborted")
                self._group.send([self._probe], self._peer, _PROBE_TAG)  # raises if the connection is closed
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> PeerLost:
        self.abort()
        return PeerLost(f"the other end of a connection is gone or silent: {str(error).partition(chr(10))[0]}")


def open_gloo_connection(
    store: Store,
    number: int,
    secret: bytes,
    form_s: float,
    deadline_s: float,
    *,
    source: bool,
    stop: Future[str] | None = None,
) -> GlooConnection:
    """One end of a hand-over's connection; waits for the other.

    Args:
        store: holds the two ends' addresses.
        number: of the hand-over.
        secret: known only to both ends.
        form_s: seconds to wait for the other end.
        deadline_s: seconds that each call may take afterwards.
        source: this end is the source.
        stop: ends the attempt when it is done.

    Raises:
        PeerLost: the other end didn't come in time, or isn't the one that was meant.
    """
    try:
        place = PrefixStore(f"epslots/hand-over/{number}", store)
        group = connect_gloo(stop, store, place, 0 if source else 1, 2, timedelta(seconds=form_s))
    except RuntimeError as error:
        raise PeerLost(f"the other end of hand-over {number} didn't connect: {error}") from error
    connection = GlooConnection(group, deadline_s)
    prove(connection, secret, number, source=source)
    return connection


@atexit.register
def _end_connections() -> None:
    """End the groups' own threads before the interpreter goes, as ``torch_transport.py`` does for the ranks' groups."""
    for connection in list(_open):
        connection.abort()
        del connection._group
