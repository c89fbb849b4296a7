"""``MemoryConnection``: a ``PairConnection`` through shared memory, for two processes of one machine.

Pieces are copied into an anonymous memory file, which has room for two; a socket carries messages, the file's descriptor, and
the news that a piece is there or was read. Neither has a name on a disk: if either process is killed, the kernel frees both,
and the other end's next call fails at once.
"""

from __future__ import annotations

import array
import mmap
import os
import socket
import struct
import time
from contextlib import suppress

import torch

from epslots.errors import PeerLost
from epslots.transport.forming import seal
from epslots.transport.pair_connection import BYTES_IN_FLIGHT, MOST_MESSAGE_BYTES, PIECE_BYTES, prove

_HEAD = struct.Struct("<cI")
_MESSAGE, _PIECE, _READ = b"m", b"p", b"r"
_RETRY_S = 0.002  # until the other end listens: a socket that nothing listens at has no event to wait for


class MemoryConnection:
    """One end of a connection. Make it with ``open_source`` or ``open_target``.

    Args:
        sock: the socket to the other end.
        memory: shared with it, ``BYTES_IN_FLIGHT`` bytes; None = there are only messages yet.
    """

    def __init__(self, sock: socket.socket, memory: mmap.mmap | None = None) -> None:
        self._sock = sock
        self._memory = torch.empty(0) if memory is None else torch.frombuffer(memory, dtype=torch.uint8)
        self._sent = self._read = 0
        """Pieces that were sent; pieces that the other end has read, or that this one has received."""
        self._unread = False
        """A piece was received, and is still in use."""

    def send(self, message: bytes) -> None:
        self._write(_HEAD.pack(_MESSAGE, len(message)) + message)

    def receive(self) -> bytes:
        self._release()
        return self._await(_MESSAGE)

    def send_piece(self, data: torch.Tensor) -> None:
        assert 0 < len(data) <= PIECE_BYTES
        while self._sent - self._read >= BYTES_IN_FLIGHT // PIECE_BYTES:
            self._await(_READ)
            self._read += 1
        self._half(self._sent)[: len(data)] = data
        self._sent += 1
        self._write(_HEAD.pack(_PIECE, len(data)))

    def receive_piece(self, nbytes: int) -> torch.Tensor:
        self._release()
        self._await(_PIECE, nbytes)
        self._unread = True
        self._read += 1
        return self._half(self._read - 1)[:nbytes]

    def abort(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits in it
        self._sock.close()

    def _half(self, number: int) -> torch.Tensor:
        start = number % (BYTES_IN_FLIGHT // PIECE_BYTES) * PIECE_BYTES
        return self._memory[start : start + PIECE_BYTES]

    def _release(self) -> None:
        """Tell the other end that the last piece was read."""
        if self._unread:
            self._unread = False
            self._write(_HEAD.pack(_READ, 0))

    def _await(self, kind: bytes, nbytes: int | None = None) -> bytes:
        """The next message of a kind; news of pieces that were read may come before it."""
        while True:
            found, size = _HEAD.unpack(self._take(_HEAD.size))
            if found == _READ and kind == _MESSAGE:
                self._read += 1
                continue
            if found != kind or (size > MOST_MESSAGE_BYTES if nbytes is None else size != nbytes):
                self.abort()
                raise PeerLost(f"the other end of a connection sent {found!r} of {size} bytes, and {kind!r} was due")
            return self._take(size) if kind == _MESSAGE else b""

    def _write(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise self._lost(error) from error

    def _take(self, count: int) -> bytes:
        found = bytearray()
        try:
            while len(found) < count:
                part = self._sock.recv(min(count - len(found), 1 << 20))
                if not part:
                    raise ConnectionResetError("its process has closed the connection, or has ended")
                found += part
        except OSError as error:
            raise self._lost(error) from error
        return bytes(found)

    def _lost(self, error: OSError) -> PeerLost:
        self.abort()
        return PeerLost(f"the other end of a connection is gone or silent: {error}")


def open_source(number: int, secret: bytes, form_s: float, deadline_s: float) -> MemoryConnection:
    """The source's end of a hand-over's connection; waits until the target listens.

    Args:
        number: of the hand-over.
        secret: known to both ends alone.
        form_s: seconds to wait for the other end.
        deadline_s: seconds that each call may take afterwards.

    Raises:
        PeerLost: the target didn't come in time, or another process came.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    ends = time.monotonic() + form_s
    while True:
        try:
            sock.connect(_address(number, secret))
            break
        except OSError as error:
            if time.monotonic() > ends:
                sock.close()
                raise PeerLost(f"the target of hand-over {number} didn't listen within {form_s:g} s: {error}") from error
            time.sleep(_RETRY_S)  # a socket that isn't there yet can't be waited for
    sock.settimeout(deadline_s)
    file = os.memfd_create("epslots-hand-over")
    try:
        os.ftruncate(file, BYTES_IN_FLIGHT)
        connection = MemoryConnection(sock, mmap.mmap(file, BYTES_IN_FLIGHT))
        prove(connection, secret, number, source=True)
        sock.sendmsg([b"f"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))])
    except OSError as error:
        sock.close()
        raise PeerLost(f"no memory can be shared with the target of hand-over {number}: {error}") from error
    finally:
        os.close(file)
    return connection


def open_target(number: int, secret: bytes, form_s: float, deadline_s: float) -> MemoryConnection:
    """The target's end of a hand-over's connection; waits for the source (see ``open_source``)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.settimeout(form_s)
        try:
            listening.bind(_address(number, secret))
            listening.listen(1)
            sock, _ = listening.accept()
        except OSError as error:
            raise PeerLost(f"the source of hand-over {number} didn't connect within {form_s:g} s: {error}") from error
    sock.settimeout(deadline_s)
    prove(MemoryConnection(sock), secret, number, source=False)
    try:
        _, files, _, _ = socket.recv_fds(sock, 1, 1)
        shared = [mmap.mmap(file, BYTES_IN_FLIGHT) for file in files]
        for file in files:
            os.close(file)
        if len(shared) != 1:
            raise ConnectionResetError("it sent no memory")
    except (OSError, ValueError) as error:
        sock.close()
        raise PeerLost(f"the source of hand-over {number} shared no memory: {error}") from error
    return MemoryConnection(sock, shared[0])


def _address(number: int, secret: bytes) -> str:
    """In the abstract namespace, so that no file is left behind; not to be guessed by others."""
    return f"\0epslots/{number}/{seal(secret, 'address').hex()[:32]}"
