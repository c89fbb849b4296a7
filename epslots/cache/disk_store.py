"""A host store with a part of its records in RAM. Others are read from its file ahead of their copy into a slot.

    lease      a record's cell, which keeps the record until it is released; its bytes are there, or being read
    DiskStore  leases cells, and reads records into them by threads, several at a time

``ram_tier.py`` decides which records stay in RAM, ``record_reader.py`` reads, ``disk_link.py`` copies from cells into slots.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from epslots.arrays import IntArray
from epslots.cache.host_store import HostStore, record_digest
from epslots.cache.ram_tier import NO_CELL, RamTier
from epslots.cache.record_reader import READERS, RecordReader, on_pages
from epslots.errors import CorruptExpertError
from epslots.layout import RecordLayout
from epslots.progress import Advance


class RecordKey(NamedTuple):
    """A record by its layer and expert, as ``DiskStore.request`` returns it."""

    layer: int
    expert: int


@dataclass(frozen=True, eq=False)
class RecordLease:
    """A leased cell.

    Attributes:
        record: uint8 [layout.nbytes], the record's bytes once ``read`` is done; valid until the lease is released.
        read: the read that brings them; None = they are there.
        cells, cell: for ``release``.
    """

    record: torch.Tensor
    read: Future[None] | None
    cells: _RecordCells
    cell: int


class _RecordCells:
    """The cells of one layout: their memory, the records in them, and the reads under way."""

    def __init__(self, layout: RecordLayout, cells: int, slot_of: IntArray) -> None:
        self.layout, self.width = layout, slot_of.shape[1]
        self.tier = RamTier(cells, slot_of)
        self.memory = on_pages(cells * layout.stride).view(cells, layout.stride)
        self.reads: dict[int, Future[None]] = {}


class DiskStore(HostStore):
    """An open store in a file, whose records pass through cells of RAM.

    Args:
        fd: of the file; the store's own from here on.
        where: the store's name in messages.
        cells: of each layout (``ram_cells.deal_cells``).

    Attributes:
        cells_pinned: whether all cells are page-locked for CUDA.
    """

    def __init__(self, fd: int, where: str, *, cells: Mapping[RecordLayout, int]) -> None:
        closing = contextlib.ExitStack()
        super().__init__(fd, where, on_close=closing.close)
        self._digests = self._digests.copy()  # a look at the mapping would read pages around it into the page cache
        self.cells_pinned = False
        self._lock = threading.Lock()
        self._place: list[tuple[_RecordCells, int]] = []
        """Of each layer: its cells, and its number among their layers."""
        self._cells: dict[RecordLayout, _RecordCells] = {}
        try:
            self._reader = RecordReader(fd, where, self.shape, self._digests)  # not self, which it would keep alive
            closing.callback(self._reader.close)
            self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="epslots-disk")
            closing.callback(self._threads.shutdown)
            self._make_cells(cells)
        except BaseException:
            self.close()
            raise
        self._on_read: Callable[[int, int], object] = lambda layer, nbytes: None

    def _make_cells(self, cells: Mapping[RecordLayout, int]) -> None:
        layers = self.manifest.layers
        seen = dict.fromkeys((layer.layout for layer in layers), 0)
        for layout in seen:
            of_layout = [layer.num_experts for layer in layers if layer.layout == layout]
            count = cells.get(layout, 1)  # a store of something else, which ``checked`` refuses, has other layouts
            self._cells[layout] = _RecordCells(layout, count, np.full((len(of_layout), max(of_layout)), -1))
        for layer in layers:
            self._place.append((self._cells[layer.layout], seen[layer.layout]))
            seen[layer.layout] += 1

    def watch(self, layout: RecordLayout, slot_of: IntArray) -> None:
        """Keep records in RAM by which of them are in slots.

        Args:
            slot_of: the table of the layout's pool, int64 [its layers, experts]; read whenever a cell is needed.
        """
        self._cells[layout].tier.watch(slot_of)

    def report_reads(self, on_read: Callable[[int, int], object]) -> None:
        """Call ``on_read`` with (layer, bytes) when a record begins to be read, in the thread that asked for it."""
        self._on_read = on_read

    def set_cells_pinned(self, nbytes: int) -> None:
        """Note the bytes of the cells that are page-locked for CUDA (``pinning.pin_cells``)."""
        self.cells_pinned = nbytes == self.ram_bytes

    @property
    def cell_memory(self) -> list[torch.Tensor]:
        """The cells of each layout, uint8 [C, bytes of a cell], from the start of a page; for pinning."""
        return [cells.memory for cells in self._cells.values()]

    @property
    def ram_bytes(self) -> int:
        """Memory of all cells."""
        return sum(memory.nbytes for memory in self.cell_memory)

    def request(self, layer: int, expert: int) -> RecordKey:
        return RecordKey(layer, expert)

    def record(self, layer: int, expert: int) -> torch.Tensor:
        """A copy of one expert's bytes, read from the file if RAM doesn't hold them.

        Raises:
            CorruptExpertError: they differ from the digest taken when the store was built.
            StoreError: they can't be read.
        """
        with self.lend(layer, expert) as record:
            return record.clone()

    @contextlib.contextmanager
    def lend(self, layer: int, expert: int) -> Iterator[torch.Tensor]:
        lease = self.lease(RecordKey(layer, expert))
        if lease is None:  # fetches in flight have every cell
            layout = self.manifest.layers[layer].layout
            cell = on_pages(layout.stride)
            self._on_read(layer, layout.nbytes)
            self._reader.read(layer, expert, cell)
            yield cell[: layout.nbytes]
            return
        try:
            if lease.read is not None:
                lease.read.result()
            yield lease.record
        finally:
            self.release(lease)

    def lease(self, key: RecordKey) -> RecordLease | None:
        """Lease a record's cell, and begin to read the record if it isn't in RAM. None while every cell is leased."""
        layer, expert = key
        cells, position = self._place[layer]
        with self._lock:
            cell, must_read = cells.tier.lease(position * cells.width + expert)
            if cell == NO_CELL:
                return None
            if must_read:
                cells.reads[cell] = self._threads.submit(self._read, cells, cell, key)
            lease = RecordLease(cells.memory[cell, : cells.layout.nbytes], cells.reads.get(cell), cells, cell)
        if must_read:
            self._on_read(layer, cells.layout.nbytes)
        return lease

    def release(self, lease: RecordLease) -> None:
        """End a lease. Its read, if any, is done."""
        assert lease.read is None or lease.read.done()
        with self._lock:
            lease.cells.tier.release(lease.cell)

    def _read(self, cells: _RecordCells, cell: int, key: RecordKey) -> None:
        """Read a record into its cell; in a thread."""
        try:
            self._reader.read(key.layer, key.expert, cells.memory[cell])
        except BaseException:
            with self._lock:
                cells.tier.discard(cell)
            raise
        finally:
            with self._lock:
                del cells.reads[cell]

    def verify(self, progress: Advance | None = None, workers: int = 4) -> list[CorruptExpertError]:
        """Read every record, and compare it with its digest. RAM keeps what it has."""
        of_thread = threading.local()
        widest = max(layer.layout.stride for layer in self.manifest.layers)

        def check(key: tuple[int, int]) -> CorruptExpertError | None:
            if not hasattr(of_thread, "cell"):
                of_thread.cell = on_pages(widest)
            try:
                self._reader.read(*key, of_thread.cell)
            except CorruptExpertError as error:
                return error
            if progress is not None:
                progress(self.manifest.layers[key[0]].layout.nbytes)
            return None

        with ThreadPoolExecutor(workers) as pool:
            return [error for error in pool.map(check, list(self.shape.experts())) if error is not None]

    def check_integrity(self) -> None:
        """Assert that the tables agree, and that every cell holds its record, byte for byte, unless it is being read.

        Raises:
            AssertionError: naming the cell. It is a bug of ours.
        """
        for index, (cells, position) in enumerate(self._place):
            cells.tier.check_integrity()
            for expert in range(self.manifest.layers[index].num_experts):
                cell = int(cells.tier.cell_of[position * cells.width + expert])
                if cell != NO_CELL and cell not in cells.reads:
                    held = record_digest(cells.memory[cell, : cells.layout.nbytes])
                    assert held == self.digest(index, expert), f"cell {cell} isn't expert {expert} of layer {index}"
