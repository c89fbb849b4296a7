"""``PairConnection``: a connection of two processes beside their groups' exchanges, for bytes that may take their time.

``MemoryConnection`` joins processes of one machine through shared memory, ``GlooConnection`` any two by torch.distributed.
A connection serves one hand-over; a further one makes its own. At most ``BYTES_IN_FLIGHT`` of pieces are sent and not yet
released.
"""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Protocol

import torch

from epslots.errors import PeerLost
from epslots.transport.forming import seal

MOST_MESSAGE_BYTES = 4 << 20
"""A longer message is no message of ours."""


class PairConnection(Protocol):
    """One end of a connection, for one thread. Both ends agree about the order of messages and pieces, and never both send.

    Raises:
        PeerLost: from every method but ``abort``: the other end is gone, silent for longer than the deadline, not the one
            that was meant, or the connection was aborted.
    """

    def send(self, message: bytes) -> None:
        """Send a message of any length."""
        ...

    def receive(self) -> bytes:
        """Wait for the next message."""
        ...

    def send_piece(self, data: torch.Tensor) -> None:
        """Send a piece, uint8 [bytes] on the host. Waits while too much is in flight; the tensor is free on return."""
        ...

    def receive_piece(self, nbytes: int) -> torch.Tensor:
        """Wait for a piece of this size, uint8 [bytes] on the host. It is valid until it is released."""
        ...

    def release(self, pieces: int) -> None:
        """Free the memory of the oldest pieces that were received. The source may send as many more."""
        ...

    def abort(self) -> None:
        """End both ends' calls, from any thread, and free everything. A second call does nothing."""
        ...


def prove(connection: PairConnection, secret: bytes, number: int, *, source: bool) -> None:
    """Show the other end of a connection that this one knows its secret, and check that the other does.

    Args:
        number: of the hand-over.
        source: this end is the source.

    Raises:
        PeerLost: another process has come in its place. Nothing else was exchanged with it.
    """
    if source:  # gloo's send ends with the other's receive
        connection.send(seal(secret, "connection", number, source))
    answer = connection.receive()
    if not source:
        connection.send(seal(secret, "connection", number, source))
    if not hmac.compare_digest(answer, seal(secret, "connection", number, not source)):
        connection.abort()
        raise PeerLost(f"the process at the other end of hand-over {number} doesn't know its secret")


def machine_of_this() -> str:
    """A name that two processes have in common if, and only if, they can be joined by a ``MemoryConnection``.

    It is the running kernel and its network namespace, to which abstract sockets belong. Empty where there are none.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"
    except OSError:
        return ""
