"""The host store: a node's one copy of the experts, mapped by all of its processes.

One file, on disk or in anonymous shared memory:

    header      magic, length and digest of the manifest
    manifest    msgpack: the origin of the records, and their layouts
    digests     16 bytes per record (XXH3-128 of its bytes)
    records     one per expert, page-aligned, layer after layer

A record's bytes are compared with its digest before their first use in a process: a bit that flipped on the disk is an error
that names the expert, not a wrong answer. Pages that come back from the disk later aren't compared again. ``node_store.py``
finds or builds a store; ``ExpertLoader`` copies its records.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from epslots.errors import CorruptExpertError, StoreError
from epslots.layout import PAGE, LayerSpec, align
from epslots.progress import Advance

MAGIC = b"EPSLOTS\x01"
DIGEST_BYTES = 16
_HEADER = struct.Struct("<8sQ16s")
# Of Linux; Python 3.11 doesn't name it.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0


class Manifest(msgspec.Struct, frozen=True):
    """A store's content. ``key`` digests everything that the records depend on; ``source`` names it for people."""

    key: str
    source: str
    layers: tuple[LayerSpec, ...]


class StoreShape:
    """Offsets of everything in a store's file, from nothing but its manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.encoded = msgspec.msgpack.encode(manifest)
        self.num_records = sum(layer.num_experts for layer in manifest.layers)
        self.digests_offset = align(_HEADER.size + len(self.encoded), PAGE)
        self.first_record: list[int] = []
        self.layer_offset: list[int] = []
        record, offset = 0, align(self.digests_offset + self.num_records * DIGEST_BYTES, PAGE)
        for layer in manifest.layers:
            self.first_record.append(record)
            self.layer_offset.append(offset)
            record += layer.num_experts
            offset += layer.num_experts * layer.layout.stride
        self.nbytes = offset

    def header(self) -> bytes:
        return _HEADER.pack(MAGIC, len(self.encoded), xxhash.xxh3_128_digest(self.encoded)) + self.encoded

    def offset(self, layer: int, expert: int) -> int:
        """Where a record begins in the file."""
        return self.layer_offset[layer] + expert * self.manifest.layers[layer].layout.stride

    def digest_offset(self, layer: int, expert: int) -> int:
        return self.digests_offset + (self.first_record[layer] + expert) * DIGEST_BYTES

    def experts(self) -> Iterator[tuple[int, int]]:
        """Every (layer, expert), in the order of the records."""
        for index, layer in enumerate(self.manifest.layers):
            for expert in range(layer.num_experts):
                yield index, expert


def read_manifest(fd: int, where: str) -> Manifest:
    """The manifest of an open store.

    Raises:
        StoreError: not a store, one of another version, or a damaged header.
    """
    head = os.pread(fd, _HEADER.size, 0)
    if len(head) < _HEADER.size or head[: len(MAGIC)] != MAGIC:
        raise StoreError(f"{where} is not a host store of this version of epslots; delete it and load again")
    _, length, digest = _HEADER.unpack(head)
    encoded = os.pread(fd, min(length, os.fstat(fd).st_size), _HEADER.size)
    if xxhash.xxh3_128_digest(encoded) != digest:
        raise StoreError(f"{where}: the header is damaged; delete the file and load again to rebuild it")
    return msgspec.msgpack.decode(encoded, type=Manifest)


def record_digest(record: torch.Tensor) -> bytes:
    """The digest of a record's bytes: XXH3-128, which runs at the speed of memory and is not meant against forgery."""
    return xxhash.xxh3_128_digest(record.numpy().data)


class HostStore:
    """An open store. Records are read-only; many processes may hold one store open.

    Args:
        fd: an open file descriptor of the file or shared memory; the store's own from here on, also after an error.
        where: the store's name in messages.
        shared: whether to map it writable and shared, which pinning needs; privately, a stray write harms only this process.
        on_close: called once when the store is closed or dropped, or the process exits.

    Attributes:
        close: closes the file; later calls do nothing. Tensors from ``record`` stay valid.
        pinned_bytes: the mapping's bytes, from the start, that are page-locked for CUDA.

    Raises:
        StoreError: the file is not a whole store.
    """

    def __init__(self, fd: int, where: str, *, shared: bool = False, on_close: Callable[[], None] | None = None) -> None:
        self.close = weakref.finalize(self, _release, fd, on_close)
        self.where = where
        try:
            self._open(fd, shared)
        except BaseException:
            self.close()
            raise

    def _open(self, fd: int, shared: bool) -> None:
        where = self.where
        self.shape = StoreShape(read_manifest(fd, where))
        self.manifest = self.shape.manifest
        self.shared = shared
        self.pinned_bytes = 0
        size = os.fstat(fd).st_size
        if size < self.shape.nbytes:
            raise StoreError(f"{where} holds {size:,} of {self.shape.nbytes:,} bytes; delete it and load again to rebuild it")
        self._bytes = map_file(fd, self.shape.nbytes, shared=shared)
        # Taking a row out of a tensor takes microseconds.
        self._records = [self._layer_records(index).unbind(0) for index in range(len(self.manifest.layers))]
        table = self._bytes[self.shape.digests_offset :][: self.shape.num_records * DIGEST_BYTES]
        self._digests: NDArray[np.uint8] = table.numpy().reshape(-1, DIGEST_BYTES)
        self._trusted = bytearray(self.shape.num_records)

    def _layer_records(self, index: int) -> torch.Tensor:
        layer = self.manifest.layers[index]
        stride = layer.layout.stride
        block = self._bytes[self.shape.layer_offset[index] :][: layer.num_experts * stride]
        return block.view(layer.num_experts, stride)[:, : layer.layout.nbytes]

    def checked(self, manifest: Manifest) -> HostStore:
        """This store, or StoreError if it holds something else than ``manifest``; it is closed then."""
        if self.manifest != manifest:
            self.close()
            raise StoreError(f"{self.where} was built for something else; delete it and load again")
        return self

    @property
    def nbytes(self) -> int:
        return self.shape.nbytes

    def set_pinned(self, nbytes: int) -> None:
        """Note the mapping's bytes, from the start, that are page-locked for CUDA (``pinning.pin_store``)."""
        self.pinned_bytes = nbytes

    @property
    def pinned(self) -> bool:
        """Whether all records are page-locked for CUDA."""
        return self.pinned_bytes >= self.nbytes

    @property
    def memory(self) -> torch.Tensor:
        """The whole mapping, uint8 [nbytes]; for pinning."""
        return self._bytes

    def record(self, layer: int, expert: int) -> torch.Tensor:
        """One expert's bytes, uint8 [layout.nbytes of its layer], in the store's memory.

        Raises:
            CorruptExpertError: the bytes differ from the digest taken when the store was built.
        """
        record = self._records[layer][expert]
        index = self.shape.first_record[layer] + expert
        if not self._trusted[index]:
            if record_digest(record) != self.digest(layer, expert):
                raise CorruptExpertError(self.manifest.layers[layer].name, expert, self.where)
            self._trusted[index] = 1
        return record

    def request(self, layer: int, expert: int) -> Any:
        """A record for the copy engine that belongs to the store: here its bytes, uint8 [record bytes].

        Raises:
            CorruptExpertError: the bytes differ from the digest taken when the store was built.
        """
        return self.record(layer, expert)

    def lend(self, layer: int, expert: int) -> contextlib.AbstractContextManager[torch.Tensor]:
        """A record's bytes, uint8 [record bytes], until the block ends.

        Raises:
            CorruptExpertError: the bytes differ from the digest taken when the store was built.
            StoreError: they can't be read.
        """
        return contextlib.nullcontext(self.record(layer, expert))

    def digest(self, layer: int, expert: int) -> bytes:
        """The digest taken of a record when the store was built."""
        return self._digests[self.shape.first_record[layer] + expert].tobytes()

    def verify(self, progress: Advance | None = None, workers: int = 4) -> list[CorruptExpertError]:
        """Compare every record with its digest, also those that were compared before.

        Args:
            progress: called with the bytes of each record.

        Returns:
            One error for each corrupt expert, in the order of the records.
        """
        self._trusted = bytearray(self.shape.num_records)

        def check(layer: int, expert: int) -> CorruptExpertError | None:
            try:
                record = self.record(layer, expert)
            except CorruptExpertError as error:
                return error
            if progress is not None:
                progress(record.nbytes)
            return None

        with ThreadPoolExecutor(workers) as pool:
            found = pool.map(lambda key: check(*key), list(self.shape.experts()))
            return [error for error in found if error is not None]


def map_file(fd: int, nbytes: int, *, shared: bool) -> torch.Tensor:
    """A file's bytes, uint8 [nbytes]. A private mapping reserves no memory: it may be larger than RAM and swap together."""
    flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE | _MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(fd, nbytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE), dtype=torch.uint8)


def _release(fd: int, on_close: Callable[[], None] | None) -> None:
    try:
        os.close(fd)
    finally:
        if on_close is not None:
            on_close()
