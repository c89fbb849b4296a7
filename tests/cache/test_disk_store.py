"""A store of which RAM holds a part: fetches bring their records, RAM stays bounded, what can't be read is never served."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import mmap
import os
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from epslots import CorruptExpertError, StoreError
from epslots.cache.copy_engine import CopyEngine, EmulatedEngine, SynchronousEngine, put_record
from epslots.cache.cuda_engine import CudaEngine
from epslots.cache.disk_link import DiskLink
from epslots.cache.disk_store import DiskStore
from epslots.cache.expert_loader import ExpertLoader
from epslots.cache.host_store import HostStore, Manifest, map_file
from epslots.cache.node_store import open_node_store
from epslots.cache.record_reader import RecordReader
from epslots.cache.slot_pool import SlotPool
from epslots.layout import LayerSpec, RecordLayout
from epslots.progress import ProgressDisplay
from epslots.telemetry import Telemetry
from epslots.transport.host_wait import wait_until
from epslots.units import LinkSpeed
from tests.support.fake_cuda import FakeCuda
from tests.support.rank_helpers import PATIENCE_S
from tests.support.store_helpers import MANIFEST, NARROW, WIDE, NamedExperts, open_store

CPU = torch.device("cpu")
EXPERTS = 6
CELLS = {WIDE: 2, NARROW: 1}


def open_disk_store(cache_dir: Path, cells: dict[RecordLayout, int] = CELLS) -> DiskStore:
    store = open_store(cache_dir, NamedExperts(), open_as=partial(DiskStore, cells=cells))
    assert isinstance(store, DiskStore)
    return store


@pytest.fixture
def store(cache_dir: Path) -> Iterator[DiskStore]:
    store = open_disk_store(cache_dir)
    yield store
    store.check_integrity()
    assert not any(cells.tier.leases.any() for cells in store._cells.values()), "a lease that nothing will end"
    store.close()


def named(layer: int, expert: int) -> torch.Tensor:
    """The bytes of a record of ``NamedExperts``, all of which fit one another without padding."""
    layout = MANIFEST.layers[layer].layout
    record = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for spec in layout.tensors:
        values = torch.full(spec.shape, 100.0 * layer + expert, dtype=getattr(torch, spec.dtype))
        record[spec.offset : spec.offset + spec.nbytes] = values.view(-1).view(torch.uint8)
    return record


WHOLE = [named(0, expert) for expert in range(EXPERTS)]


def file_of(store: HostStore) -> Path:
    return Path(store.where)


def flip(store: HostStore, layer: int, expert: int) -> None:
    """Flip a bit of a record on the disk; once more restores it."""
    offset = store.shape.offset(layer, expert) + 10
    with open(file_of(store), "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def test_every_record_passes_through_few_cells(store: DiskStore):
    read: list[tuple[int, int]] = []
    store.report_reads(lambda layer, nbytes: read.append((layer, nbytes)))
    for _ in range(2):
        for layer, expert in store.shape.experts():
            assert torch.equal(store.record(layer, expert), named(layer, expert))
    assert len(read) == 2 * 9 and set(read) == {(0, WIDE.nbytes), (1, NARROW.nbytes)}
    assert store.ram_bytes == 2 * WIDE.stride + NARROW.stride
    assert torch.equal(store.record(1, 2), named(1, 2)) and len(read) == 18, "it is in RAM"
    assert store.verify() == []


def links() -> dict[str, Callable[[int], tuple[CopyEngine, FakeCuda | None]]]:
    def cuda(seed: int) -> tuple[CopyEngine, FakeCuda]:
        fake = FakeCuda(seed)
        return CudaEngine(CPU, cuda=fake), fake

    return {
        "a CPU's": lambda seed: (SynchronousEngine(), None),
        "emulated": lambda seed: (EmulatedEngine(LinkSpeed(10**10, 1e-6)), None),
        "a GPU's": cuda,
    }


@pytest.mark.parametrize("cells", [1, 2, 5])
@pytest.mark.parametrize("device", links())
def test_every_fetch_brings_its_record(device: str, cells: int, cache_dir: Path):
    """Random fetches, waits and cancellations of six slots: a cell that was taken too early would bring another record."""
    store = open_disk_store(cache_dir, {WIDE: cells, NARROW: 1})
    choose = random.Random(cells)
    device_link, cuda = links()[device](cells)
    link = DiskLink(device_link, store)
    there = [torch.zeros(WIDE.nbytes, dtype=torch.uint8) for _ in range(6)]
    names, in_flight, reads = [0] * 6, dict[int, Any](), list[tuple[int, list[torch.Tensor]]]()

    def put(slot: torch.Tensor, record: torch.Tensor) -> None:
        later(lambda: slot.copy_(record))

    def later(work: Callable[[], object]) -> None:
        work() if cuda is None else cuda.here.work.append(work)

    def look(slot: int) -> None:
        found: list[torch.Tensor] = []
        later(lambda: found.append(there[slot].clone()))
        reads.append((names[slot], found))

    for _ in range(150):
        slot = choose.randrange(6)
        if choose.random() < 0.5:
            if slot in in_flight:
                begun = link.begun(in_flight[slot])
                assert link.cancel(in_flight.pop(slot)) or not begun
            names[slot] = choose.randrange(EXPERTS)
            key = store.request(0, names[slot])
            (in_flight[slot],) = link.start([there[slot]], [key], put, urgent=choose.random() < 0.4)
        elif slot in in_flight and (choose.random() < 0.7 or link.poll(in_flight[slot])):
            link.wait(in_flight.pop(slot))
            look(slot)
        elif choose.random() < 0.2:
            assert torch.equal(store.record(0, slot), WHOLE[slot]), "also while every cell is leased"
    for slot, transfer in in_flight.items():
        link.wait(transfer)
        look(slot)
    if cuda is not None:
        cuda.finish()
    let_reads_end(link)  # cancelled records may still cross
    assert all(torch.equal(found, WHOLE[name]) for name, (found,) in reads) and len(reads) > 30
    store.check_integrity()
    assert not store._cells[WIDE].tier.leases.any()


def let_reads_end(link: DiskLink) -> None:
    """Wait for the reads that go on though nothing waits for them, and let the link end their leases."""
    wait_until(lambda: not link.busy)
    assert not link.busy  # looks once more: a read may end between the two looks of the call before


@pytest.fixture
def loader(store: DiskStore) -> Iterator[ExpertLoader]:
    """Two slots for the six experts of the first layer."""
    layers = MANIFEST.layers[:1]
    pool = SlotPool(layers, [2], CPU)
    store.watch(WIDE, pool.slot_of)
    link = DiskLink(SynchronousEngine(), store)
    yield ExpertLoader(pool, store, link, (0,), Telemetry(layers, [2], CPU))
    let_reads_end(link)


def fetch(loader: ExpertLoader, expert: int, slot: int, *, urgent: bool = True) -> None:
    held = loader.pool.expert_of[[slot]]
    loader.fetch(0, np.array([expert]), np.array([slot]), held, urgent=urgent)


def fetch_whole(loader: ExpertLoader, expert: int, slot: int) -> None:
    fetch(loader, expert, slot)
    loader.wait(np.array([slot]))
    assert torch.equal(loader.pool.memory[slot], WHOLE[expert])


def assert_fails_and_heals(loader: ExpertLoader, store: DiskStore, message: str, mend: Callable[[], None]) -> None:
    """Expert 0 can't be read: its slot is empty, everything else goes on, and it is fetched once it can be."""
    fetch_whole(loader, 5, 1)
    before = loader.telemetry.snapshot().total("host_bytes")
    fetch(loader, 0, 0)
    with pytest.raises(StoreError, match=message):
        loader.wait(np.array([0]))
    loader.pool.check_integrity()
    assert loader.pool.expert_of.tolist() == [-1, 5] and not loader.any_in_flight
    assert loader.telemetry.snapshot().total("host_bytes") == before
    loader.check_content()
    mend()
    fetch_whole(loader, 0, 0)
    loader.check_content()


def test_bytes_that_changed_on_disk_are_never_served(loader: ExpertLoader, store: DiskStore):
    fetch_whole(loader, 0, 0)  # once read, and then displaced
    for expert in (1, 2, 3, 1, 2, 3):
        fetch_whole(loader, expert, 0)
    flip(store, 0, 0)
    assert_fails_and_heals(loader, store, "expert 0 of layers.0.experts is corrupt", lambda: flip(store, 0, 0))


def test_a_file_cut_short_is_an_error(loader: ExpertLoader, store: DiskStore):
    whole, end = file_of(store).read_bytes(), store.shape.offset(0, 1) + 100
    os.truncate(file_of(store), end)
    fetch_whole(loader, 0, 0)
    fetch(loader, 1, 1)
    with pytest.raises(StoreError, match=f"expert 1 of layers.0.experts can't be read .* the file ends at byte {end:,} of"):
        loader.wait(np.array([1]))
    with pytest.raises(StoreError, match=r"expert 3 .*can't be read"):
        store.record(0, 3)
    file_of(store).write_bytes(whole)
    fetch_whole(loader, 1, 1)


def test_a_disks_error_is_an_error(loader: ExpertLoader, store: DiskStore, monkeypatch: pytest.MonkeyPatch):
    read = os.preadv

    def broken(fd: int, buffers: Any, offset: int) -> int:
        if offset == store.shape.offset(0, 0):
            raise OSError(errno.EIO, "Input/output error")
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", broken)
    assert_fails_and_heals(loader, store, "expert 0 .*can't be read .*Input/output error", monkeypatch.undo)


def test_reads_that_move_less_go_on(store: DiskStore, monkeypatch: pytest.MonkeyPatch):
    """A read may end early at any page."""
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:4096]], offset))
    assert all(torch.equal(store.record(0, expert), WHOLE[expert]) for expert in range(EXPERTS))


def test_a_guess_that_cant_be_read_fails_nobody(loader: ExpertLoader, store: DiskStore):
    flip(store, 0, 4)
    fetch(loader, 4, 0, urgent=False)
    fetch_whole(loader, 1, 1)
    fetch_whole(loader, 2, 0)
    assert loader.telemetry.snapshot().total("host_bytes") == 2 * WIDE.nbytes


class Gate:
    """Reads wait until it opens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.begun = threading.Event(), list[int]()
        read = RecordReader.read

        def wait_and_read(reader: RecordReader, layer: int, expert: int, cell: torch.Tensor) -> None:
            self.begun.append(expert)
            assert self.open.wait(PATIENCE_S)
            read(reader, layer, expert, cell)

        monkeypatch.setattr(RecordReader, "read", wait_and_read)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def test_a_miss_is_read_before_guesses(cache_dir: Path, gate: Gate):
    store = open_disk_store(cache_dir, {WIDE: EXPERTS, NARROW: 1})
    link = DiskLink(SynchronousEngine(), store)
    there = [torch.zeros(WIDE.nbytes, dtype=torch.uint8) for _ in range(EXPERTS)]
    prefetches = link.start(there[:5], [store.request(0, expert) for expert in range(5)], put_record, urgent=False)
    (miss,) = link.start(there[5:], [store.request(0, 5)], put_record, urgent=True)
    assert link.busy and not link.poll(miss)
    read = {expert for expert in range(EXPERTS) if store._cells[WIDE].tier.cell_of[expert] >= 0}
    assert read == {0, 1, 2, 3, 5}, "prefetch 4 waits: it would take what a miss needs"
    gate.open.set()
    link.wait(miss)
    assert torch.equal(there[5], WHOLE[5]) and not there[0].any(), "prefetches stay in RAM until they are needed"
    for number, prefetch in enumerate(prefetches):
        link.wait(prefetch)
        assert torch.equal(there[number], WHOLE[number])


def test_two_fetches_of_a_record_read_it_once(cache_dir: Path, gate: Gate):
    store = open_disk_store(cache_dir)
    link = DiskLink(SynchronousEngine(), store)
    there = [torch.zeros(WIDE.nbytes, dtype=torch.uint8) for _ in range(2)]
    transfers = link.start(there, [store.request(0, 3)] * 2, put_record, urgent=True)
    gate.open.set()
    for transfer in transfers:
        link.wait(transfer)
    assert gate.begun == [3] and torch.equal(there[0], there[1])


# Memory.

MIB = 1 << 20
LARGE = RecordLayout.of([("up_proj", (512, 512), "float32")])  # 1 MiB
LARGE_STORE = Manifest("l4rge", "large", (LayerSpec("layers.0.experts", 48, LARGE),))


class LargeExperts:
    def read_expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        return {"up_proj": torch.full((512, 512), float(expert))}


def open_large(cache_dir: Path, open_as: Any) -> HostStore:
    display = ProgressDisplay(shown=False)
    return open_node_store(
        LARGE_STORE, LargeExperts, kind="file", cache_dir=cache_dir, start_progress=display, open_as=open_as
    )


def pages_in_ram(path: Path) -> int:
    """Bytes of a file that the page cache holds."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        mapping = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        seen = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        anchor = (ctypes.c_char * 1).from_buffer(mapping)
        code = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), seen
        )
        del anchor
        mapping.close()
    assert code == 0
    return sum(page & 1 for page in seen) * mmap.PAGESIZE


def peak_growth(work: Callable[[], None]) -> int:
    """Bytes by which this process's memory, mapped files included, exceeds what it had, at most."""

    def field(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
    except OSError as error:
        pytest.skip(f"the peak of a process's memory can't be measured here: {error}")
    before = field("VmRSS")
    work()
    return field("VmHWM") - before


@pytest.mark.parametrize("direct", [True, False])
def test_ram_stays_bounded_and_is_not_doubled(direct: bool, cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """48 MiB of experts pass through 6 MiB, with and without direct reads; a mapped store takes all of them."""
    open_large(cache_dir, HostStore).close()
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT")
    store = open_large(cache_dir, partial(DiskStore, cells={LARGE: 6}))
    assert isinstance(store, DiskStore)
    if pages_in_ram(file_of(store)) > 8 * MIB:
        pytest.skip("the test's file system keeps files in RAM")
    order = random.Random(0).sample(range(48), 48) * 2

    def use() -> None:
        for expert in order:
            with store.lend(0, expert) as record:
                assert record[:4].view(torch.float32).item() == expert

    assert peak_growth(use) < 12 * MIB
    assert pages_in_ram(file_of(store)) < 8 * MIB
    mapped = open_large(cache_dir, HostStore)
    assert peak_growth(lambda: [mapped.record(0, expert) for expert in order] and None) > 40 * MIB
    store.close()


def test_a_store_larger_than_ram_can_be_opened(tmp_path: Path):
    """Its mapping reserves no memory, which the system would refuse."""
    layer = LayerSpec("layers.0.experts", 1 << 22, LARGE)  # 4 TiB
    file = tmp_path / "sparse"
    file.touch()
    os.truncate(file, layer.num_experts * LARGE.stride)
    with open(file, "rb") as opened:
        assert map_file(opened.fileno(), file.stat().st_size, shared=False)[-1] == 0


def test_a_dropped_store_leaves_nothing(cache_dir: Path):
    """Neither its RAM nor its threads and files."""
    store = open_disk_store(cache_dir)
    store.record(0, 1)
    name, gone = store.where, weakref.ref(store)
    assert [fd for fd in open_files() if fd == name]
    del store
    gc.collect()
    assert gone() is None and not [fd for fd in open_files() if fd == name]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("epslots-disk")]


def open_files() -> list[str]:
    """Where this process's descriptors lead to."""
    found = []
    for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found


def test_a_store_of_something_else_is_refused(cache_dir: Path):
    """Before its layouts are looked for among ours."""
    open_large(cache_dir, HostStore).close()
    (cache_dir / "large-l4rge.experts").rename(cache_dir / "model-k3y.experts")
    with pytest.raises(StoreError, match="was built for something else"):
        open_disk_store(cache_dir)


def test_a_corrupt_expert_is_found_by_verify(store: DiskStore):
    flip(store, 1, 1)
    (error,) = store.verify()
    assert isinstance(error, CorruptExpertError) and (error.layer, error.expert) == ("layers.1.experts", 1)
    flip(store, 1, 1)
