"""Pinning, with a stand-in for the CUDA runtime: what is asked of it, and what the user is told when it refuses."""

from __future__ import annotations

import gc
import logging
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from epslots import CorruptExpertError
from epslots.cache import pinning
from epslots.cache.disk_store import DiskStore
from epslots.cache.pinning import pieces, pin_cells, pin_store
from epslots.progress import ProgressDisplay
from tests.support.store_helpers import NARROW, WIDE, NamedExperts, open_store

QUIET = ProgressDisplay(shown=False)
CPU = torch.device("cpu")


class FakeRuntime:
    """Refuses with a code, after some calls."""

    def __init__(self, code: int = 0, after: int = 0) -> None:
        self.code, self.after = code, after
        self.registered: list[tuple[int, int]] = []
        self.released: list[int] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if len(self.registered) >= self.after and self.code:
            return self.code
        self.registered.append((address, size))
        return 0

    def cudaHostUnregister(self, address: int) -> None:
        self.released.append(address)


def test_shared_memory_is_pinned_after_filling_and_released(cache_dir: Path):
    store, runtime = open_store(cache_dir, NamedExperts(), "memory"), FakeRuntime()
    assert pin_store(store, QUIET, CPU, runtime)
    assert store.pinned
    address = store.memory.data_ptr()
    assert runtime.registered == [(address, store.nbytes)]
    del store
    gc.collect()
    assert runtime.released == [address]


def test_a_refusal_is_told_with_its_cost(cache_dir: Path, caplog: pytest.LogCaptureFixture):
    store = open_store(cache_dir, NamedExperts(), "memory")
    with caplog.at_level(logging.WARNING):
        assert not pin_store(store, QUIET, CPU, FakeRuntime(code=2))
    assert not store.pinned
    assert "failed with CUDA error 2 after 0 B of" in caplog.text


def test_pieces_end_where_records_end(cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """Each record is in one piece; a failure leaves the pieces before it pinned, and releases them in the end."""
    store, runtime = open_store(cache_dir, NamedExperts(), "memory"), FakeRuntime(code=2, after=2)
    bounds = list(pieces(store.shape, 3 * 4096))
    assert bounds[0][0] == 0 and bounds[-1][1] == store.nbytes
    assert all(before[1] == after[0] for before, after in pairwise(bounds))
    assert len(bounds) > 3
    for layer, spec in enumerate(store.manifest.layers):
        for expert in range(spec.num_experts):
            first = store.shape.offset(layer, expert)
            assert any(start <= first and first + spec.layout.nbytes <= stop for start, stop in bounds)
    monkeypatch.setattr(pinning, "PIECE_BYTES", 3 * 4096)
    assert not pin_store(store, QUIET, CPU, runtime)
    assert store.pinned_bytes == bounds[1][1]
    addresses = [address for address, _ in runtime.registered]
    del store
    gc.collect()
    assert runtime.released == addresses and len(addresses) == 2


def test_a_mapped_file_is_not_pinned_and_that_is_told(cache_dir: Path, caplog: pytest.LogCaptureFixture):
    store, runtime = open_store(cache_dir, NamedExperts(), "file"), FakeRuntime()
    with caplog.at_level(logging.WARNING):
        assert not pin_store(store, QUIET, CPU, runtime)
    assert runtime.registered == []
    assert "host_store='memory'" in caplog.text


def test_the_ram_of_a_store_on_disk_is_pinned(cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """In pieces of whole cells; where a piece is refused, records from the rest pass through a buffer."""
    open_store(cache_dir, NamedExperts()).close()
    monkeypatch.setattr(pinning, "PIECE_BYTES", 2 * WIDE.stride)
    for refused_after in (0, 2):
        runtime = FakeRuntime(code=2 if refused_after else 0, after=refused_after)
        store = open_store(cache_dir, NamedExperts(), open_as=partial(DiskStore, cells={WIDE: 5, NARROW: 2}))
        assert isinstance(store, DiskStore)
        pin_cells(store, CPU, runtime)
        wide, narrow = (memory.data_ptr() for memory in store.cell_memory)
        step = 2 * WIDE.stride
        pieces_of_wide = [(wide, step), (wide + step, step), (wide + 2 * step, WIDE.stride)]
        assert runtime.registered == (pieces_of_wide[:2] if refused_after else [*pieces_of_wide, (narrow, 2 * NARROW.stride)])
        assert store.cells_pinned is not bool(refused_after) and not store.pinned
        del store
        gc.collect()
        assert sorted(runtime.released) == sorted(address for address, _ in runtime.registered)


def test_a_corrupt_record_is_found_on_the_way(cache_dir: Path):
    store = open_store(cache_dir, NamedExperts(), "memory")
    store.memory[store.shape.offset(0, 2)] ^= 1
    with pytest.raises(CorruptExpertError, match="expert 2"):
        pin_store(store, QUIET, CPU, FakeRuntime())
