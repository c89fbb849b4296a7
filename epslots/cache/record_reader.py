"""Reading records from a store's file into memory, past the operating system's page cache: RAM holds what we keep, once."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from epslots.cache.host_store import StoreShape, record_digest
from epslots.errors import CorruptExpertError, StoreError
from epslots.layout import PAGE

# Reads under way at a time: enough to keep a fast disk busy with records of a MiB.
READERS = 8


class RecordReader:
    """Reads a store's records; any thread may call it.

    Where the file system takes ``O_DIRECT``, the device writes into our memory. Elsewhere the page cache is told to drop what
    was read.

    Args:
        fd: of the store's file; it stays the caller's.
        where: the store's name in messages.
        shape: the records' places.
        digests: uint8 [records, 16], of each record.

    Attributes:
        direct: whether reads bypass the page cache.
    """

    def __init__(self, fd: int, where: str, shape: StoreShape, digests: NDArray[np.uint8]) -> None:
        self._where, self._shape, self._digests = where, shape, digests
        self._fd, self.direct = _open_again(fd)
        os.fdatasync(self._fd)  # only clean pages are dropped: those that building or an earlier start left
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file. No read may be under way."""
        os.close(self._fd)

    def read(self, layer: int, expert: int, cell: torch.Tensor) -> None:
        """Read a record, and compare it with its digest.

        Args:
            cell: uint8 [stride of the layer's layout], on a page boundary; the record's bytes come first.

        Raises:
            CorruptExpertError: the bytes differ from the digest taken when the store was built.
            StoreError: the file ended early, or can't be read. The cell's content is undefined.
        """
        spec = self._shape.manifest.layers[layer]
        self._fill(self._shape.offset(layer, expert), cell[: spec.layout.stride], f"expert {expert} of {spec.name}")
        digest = self._digests[self._shape.first_record[layer] + expert].tobytes()
        if record_digest(cell[: spec.layout.nbytes]) != digest:
            raise CorruptExpertError(spec.name, expert, self._where)

    def _fill(self, offset: int, cell: torch.Tensor, what: str) -> None:
        view, done = cell.numpy().data, 0
        while done < len(view):
            try:
                moved = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise StoreError(f"{what} can't be read from the host store ({self._where}): {error}") from error
            reached = (done + moved) // PAGE * PAGE  # direct reads begin on pages
            if reached == done:
                raise StoreError(
                    f"{what} can't be read from the host store ({self._where}): the file ends at byte "
                    f"{offset + done + moved:,} of {self._shape.nbytes:,}. Delete it and load again to rebuild it"
                )
            done = reached
        if not self.direct:
            os.posix_fadvise(self._fd, offset, len(view), os.POSIX_FADV_DONTNEED)


def measure_read_speed(path: Path, nbytes: int = 64 << 20, piece: int = 1 << 20) -> float | None:
    """Bytes a second that a store's file is read with. As a ``DiskStore`` reads: several pieces at a time, all over the file.

    Args:
        nbytes: to read; no more than the file has.
        piece: bytes of one read, whole pages.

    Returns:
        None where there is no file, or not a piece of it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        again, _ = _open_again(fd)
    finally:
        os.close(fd)
    try:
        size = os.fstat(again).st_size
        pieces = min(size, nbytes) // piece
        if not pieces:
            return None
        os.posix_fadvise(again, 0, 0, os.POSIX_FADV_DONTNEED)
        step = size // pieces // PAGE * PAGE
        free = [on_pages(piece) for _ in range(READERS)]

        def read(number: int) -> None:
            cell = free.pop()
            os.preadv(again, [cell.numpy().data], number * step)
            free.append(cell)

        with ThreadPoolExecutor(READERS) as threads:
            began = time.perf_counter()
            list(threads.map(read, range(pieces)))
            return pieces * piece / (time.perf_counter() - began)
    finally:
        os.close(again)


def on_pages(nbytes: int) -> torch.Tensor:
    """Memory that begins on a page, as direct reads need it: uint8 [nbytes]. It takes RAM as it is written."""
    memory = torch.empty(nbytes + PAGE, dtype=torch.uint8, device="cpu")
    return memory[-memory.data_ptr() % PAGE :][:nbytes]


def _open_again(fd: int) -> tuple[int, bool]:
    """Another descriptor of an open file, and whether it bypasses the page cache."""
    path, flags = f"/dev/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT), True
    except (OSError, AttributeError):  # some file systems, and some systems, have none
        return os.open(path, flags), False
