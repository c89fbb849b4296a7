"""``MemoryConnection``: a ``PairConnection`` through shared memory, for two processes of one machine.

Pieces are copied into an anonymous memory file, which has cells for several; a socket carries messages, the file's descriptor,
and the news that a piece is in a cell, or that a cell is free. Neither has a name on a disk: if either process is killed, the
kernel frees both, and the other end's next call fails at once.
"""

from __future__ import annotations

import array
import mmap
import os
import socket
import struct
import time
from collections import deque
from contextlib import suppress
from heapq import heappop, heappush

import torch

from epslots.errors import PeerLost
from epslots.piece_sizes import BYTES_IN_FLIGHT, PIECE_BYTES
from epslots.transport.forming import seal
from epslots.transport.pair_connection import MOST_MESSAGE_BYTES, prove

_HEAD = struct.Struct("<cIB")
"""Kind; bytes; the cell of a piece, or how many are free again."""
_MESSAGE, _PIECE, _FREE = b"m", b"p", b"f"
_CELLS = BYTES_IN_FLIGHT // PIECE_BYTES
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
        self._free = list(range(_CELLS))
        """A heap: the first ones are used most, and what is never used is no memory."""
        self._sent = deque[int]()
        """Cells of pieces that the other end hasn't released."""

    def send(self, message: bytes) -> None:
        self._write(_HEAD.pack(_MESSAGE, len(message), 0) + message)

    def receive(self) -> bytes:
        size, _ = self._await(_MESSAGE)
        if size > MOST_MESSAGE_BYTES:
            raise self._foreign(f"a message of {size} bytes", f"{MOST_MESSAGE_BYTES} are allowed")
        return self._take(size)

    def send_piece(self, data: torch.Tensor) -> None:
        assert 0 < len(data) <= PIECE_BYTES
        while not self._free:
            self._await(_FREE)
        cell = heappop(self._free)
        self._sent.append(cell)
        self._memory[cell * PIECE_BYTES :][: len(data)] = data
        self._write(_HEAD.pack(_PIECE, len(data), cell))

    def receive_piece(self, nbytes: int) -> torch.Tensor:
        size, cell = self._await(_PIECE)
        if size != nbytes or cell >= _CELLS:
            raise self._foreign(f"{size} bytes in cell {cell}", f"{nbytes} in one of {_CELLS} cells were due")
        return self._memory[cell * PIECE_BYTES :][:nbytes]

    def release(self, pieces: int) -> None:
        self._write(_HEAD.pack(_FREE, 0, pieces))

    def abort(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits in it
        self._sock.close()

    def _await(self, kind: bytes) -> tuple[int, int]:
        """The size and the number in the next head of a kind; the news of free cells may come before it."""
        while True:
            found, size, number = _HEAD.unpack(self._take(_HEAD.size))
            if found == _FREE:
                self._note_free(number)
            elif found != kind:
                raise self._foreign(f"{found!r} of {size} bytes", f"{kind!r} was due")
            if found == kind:
                return size, number

    def _note_free(self, cells: int) -> None:
        if cells > len(self._sent):
            raise self._foreign(f"the news that {cells} cells are free", f"{len(self._sent)} are in use")
        for _ in range(cells):
            heappush(self._free, self._sent.popleft())

    def _foreign(self, sent: str, due: str) -> PeerLost:
        self.abort()
        return PeerLost(f"the other end of a connection sent {sent}, and {due}")

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
        secret: known only to both ends.
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
