"""The host store: one per node, whole or absent, and never a corrupt expert out of it."""

from __future__ import annotations

import errno
import mmap
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epslots import CorruptExpertError, StoreError
from epslots.cache import memory_store
from epslots.cache.host_store import HostStore, Manifest, StoreShape
from epslots.cache.node_store import open_node_store, resolve_store_kind, store_path
from epslots.cache.store_build import appearing_whole
from epslots.cache.unpacking import record_views
from epslots.progress import ProgressDisplay
from tests.support.rank_helpers import FORKED
from tests.support.store_helpers import (
    MANIFEST,
    NARROW,
    WIDE,
    NamedExperts,
    build_slowly,
    hold_store,
    open_store,
    without_privileges,
)

KINDS = ("file", "memory")


def weight(store: HostStore, layer: int, expert: int, name: str) -> torch.Tensor:
    return record_views(store.record(layer, expert), MANIFEST.layers[layer].layout)[name]


@contextmanager
def process(target: Any, *args: Any) -> Iterator[tuple[Any, Connection]]:
    ours, theirs = FORKED.Pipe()
    child = FORKED.Process(target=target, args=(*args, theirs))
    child.start()
    try:
        yield child, ours
    finally:
        if child.is_alive():
            child.kill()
        child.join()


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_is_where_it_belongs(kind: str, cache_dir: Path):
    store = open_store(cache_dir, NamedExperts(), kind)
    for layer, expert in store.shape.experts():
        for spec in MANIFEST.layers[layer].layout.tensors:
            tensor = weight(store, layer, expert, spec.name)
            assert tensor.shape == spec.shape
            assert (tensor == 100 * layer + expert).all()
    assert store.verify() == []
    store.close()


def test_records_are_page_aligned_and_one_contiguous_run():
    shape = StoreShape(MANIFEST)
    offsets = [shape.offset(layer, expert) for layer, expert in shape.experts()]
    assert all(offset % 4096 == 0 for offset in offsets)
    assert offsets == sorted(set(offsets))
    assert WIDE.nbytes == 64 * 32 * 4 + 32 * 32 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_opening_converts_nothing(kind: str, cache_dir: Path):
    first, second = NamedExperts(), NamedExperts()
    store = open_store(cache_dir, first, kind)
    again = open_store(cache_dir, second, kind)
    assert first.reads == 9
    assert second.reads == 0
    assert again.manifest == store.manifest


def test_memory_is_filled_from_the_file_of_an_earlier_start(cache_dir: Path):
    open_store(cache_dir, NamedExperts(), "file").close()
    source = NamedExperts()
    store = open_store(cache_dir, source, "memory")
    assert source.reads == 0
    assert (weight(store, 0, 5, "down_proj") == 5).all()


@pytest.mark.parametrize("kind", KINDS)
def test_processes_that_start_together_share_one_copy(kind: str, cache_dir: Path):
    with process(hold_store, cache_dir, kind) as (_, a), process(hold_store, cache_dir, kind) as (_, b):
        (reads_a, file_a, value_a), (reads_b, file_b, value_b) = a.recv(), b.recv()
        assert sorted([reads_a, reads_b]) == [0, 9], "one builds, the other waits"
        assert len(file_a) == 1
        assert file_a == file_b
        assert value_a == value_b == 102
        a.send("end")
        b.send("end")


def test_shared_memory_lives_as_long_as_any_holder_and_no_longer(cache_dir: Path):
    def holders() -> list[Path]:
        return list(cache_dir.glob("*.holder"))

    with process(hold_store, cache_dir, "memory") as (first, a):
        _, memory, _ = a.recv()
        with process(hold_store, cache_dir, "memory") as (second, b):
            assert b.recv()[:2] == (0, memory)
            first.kill()  # the one that built it
            first.join()
            with process(hold_store, cache_dir, "memory") as (third, c):
                assert c.recv()[:2] == (0, memory)
                c.send("end")
                third.join()
            second.kill()
            second.join()
    assert len(holders()) == 1, "an empty file of the last one killed, of no consequence"
    source = NamedExperts()
    store = open_store(cache_dir, source, "memory")
    assert source.reads == 9, "with its last holder the memory was gone"
    assert len(holders()) == 1
    store.close()
    assert holders() == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("kind", KINDS)
def test_a_builder_that_dies_leaves_nothing(kind: str, how: signal.Signals, cache_dir: Path):
    with process(build_slowly, cache_dir, kind) as (child, pipe):
        assert pipe.recv() == "building"
        os.kill(child.pid, how)
        if how == signal.SIGINT:
            pipe.send("go on")
        child.join()
    left = [p for p in cache_dir.rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert left == []
    source = NamedExperts()
    assert open_store(cache_dir, source, kind).verify() == []
    assert source.reads == 9


def write_half(path: Path) -> None:
    with appearing_whole(path) as fd:
        os.write(fd, b"half")
        raise KeyboardInterrupt


def test_without_nameless_files_a_failure_leaves_nothing_either(cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "O_TMPFILE")
    cache_dir.mkdir()
    path = cache_dir / "store"
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    assert list(cache_dir.iterdir()) == []
    with appearing_whole(path) as fd:
        os.write(fd, b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert list(cache_dir.iterdir()) == [path]


def test_a_second_process_waits_for_the_first_to_finish_building(cache_dir: Path):
    with process(build_slowly, cache_dir, "file") as (first, a):
        assert a.recv() == "building"
        with process(hold_store, cache_dir, "file") as (_, b):
            assert not b.poll(2.0), "it went ahead although the store was being built"
            a.send("go on")
            assert b.recv()[0] == 0, "it built a second time"
            b.send("end")
        first.join()


def test_what_a_killed_builder_left_under_a_name_is_swept(cache_dir: Path):
    cache_dir.mkdir()
    leftover = store_path(MANIFEST, cache_dir).with_name(store_path(MANIFEST, cache_dir).name + ".1a2b.tmp")
    leftover.write_bytes(b"half")
    open_store(cache_dir, NamedExperts())
    assert not leftover.exists()


def test_a_disk_that_forgets_what_was_written_is_found_out(cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    read = os.preadv

    def forgetful(fd: int, buffers: list[Any], offset: int) -> int:
        count = read(fd, buffers, offset)
        buffers[0][3] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", forgetful)
    with pytest.raises(StoreError, match="doesn't hold what was written to it"):
        open_store(cache_dir, NamedExperts())


def test_a_store_of_something_else_is_not_taken(cache_dir: Path):
    open_store(cache_dir, NamedExperts()).close()
    other = Manifest("0th3r", "model", MANIFEST.layers)
    store_path(MANIFEST, cache_dir).rename(store_path(other, cache_dir))
    with pytest.raises(StoreError, match="was built for something else"):
        open_node_store(other, NamedExperts, kind="file", cache_dir=cache_dir, start_progress=ProgressDisplay(False))


@pytest.mark.parametrize("place", ["a file", "under a file"])
def test_a_cache_folder_that_cannot_be(place: str, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="no place for the host store"):
        open_store(tmp_path / "file" if place == "a file" else tmp_path / "file" / "cache", NamedExperts())


def test_a_store_that_cannot_be_mapped_gives_back_its_file(cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(StoreError, match=r"no place for the host store .*Cannot allocate memory"):
        open_store(cache_dir, NamedExperts(), "memory")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert list(cache_dir.glob("*.holder")) == []


def test_an_error_in_one_expert_stops_the_build_and_is_told(cache_dir: Path):
    class Failing(NamedExperts):
        def read_expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
            if (layer, expert) == (0, 3):
                raise StoreError("expert 3 can't be read")
            return super().read_expert(layer, expert)

    with pytest.raises(StoreError, match="expert 3"):
        open_store(cache_dir, Failing())
    assert not store_path(MANIFEST, cache_dir).exists()


def flip(cache_dir: Path, offset: int) -> None:
    with open(store_path(MANIFEST, cache_dir), "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def test_a_flipped_bit_names_the_expert_and_is_never_served(cache_dir: Path):
    open_store(cache_dir, NamedExperts()).close()
    flip(cache_dir, StoreShape(MANIFEST).offset(0, 4) + 17)
    store = open_store(cache_dir, NamedExperts())
    with pytest.raises(CorruptExpertError, match=r"expert 4 of layers\.0\.experts is corrupt") as caught:
        store.record(0, 4)
    assert (caught.value.layer, caught.value.expert) == ("layers.0.experts", 4)
    with pytest.raises(CorruptExpertError):
        store.record(0, 4)
    assert (weight(store, 0, 3, "down_proj") == 3).all()
    assert [(e.layer, e.expert) for e in store.verify()] == [("layers.0.experts", 4)]


def test_a_record_is_hashed_once_and_not_at_every_fetch(cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    store, hashed = open_store(cache_dir, NamedExperts()), []
    monkeypatch.setattr("epslots.cache.host_store.record_digest", lambda record: hashed.append(1) or store.digest(0, 1))
    for _ in range(3):
        store.record(0, 1)
    assert len(hashed) == 1


def test_verify_finds_what_changed_after_the_first_use(cache_dir: Path):
    store = open_store(cache_dir, NamedExperts())
    store.record(1, 0)
    flip(cache_dir, StoreShape(MANIFEST).offset(1, 0))
    assert [(e.layer, e.expert) for e in store.verify()] == [("layers.1.experts", 0)]
    with pytest.raises(CorruptExpertError):
        store.record(1, 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: flip(path.parent, 40), "the header is damaged"),
        (lambda path: flip(path.parent, 3), "not a host store of this version"),
        (lambda path: os.truncate(path, StoreShape(MANIFEST).nbytes - 1), "delete it and load again"),
        (lambda path: os.truncate(path, 5), "not a host store"),
    ],
)
def test_a_damaged_store_is_never_opened(damage: Any, message: str, cache_dir: Path):
    open_store(cache_dir, NamedExperts()).close()
    damage(store_path(MANIFEST, cache_dir))
    with pytest.raises(StoreError, match=message):
        open_store(cache_dir, NamedExperts())


def test_a_full_disk_is_said_before_anything_is_written(cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=4096))
    with pytest.raises(StoreError, match=r"it needs .* KiB in .*, beside 64 MiB that stay free, and 4 KiB are free"):
        open_store(cache_dir, NamedExperts())
    assert [p.suffix for p in cache_dir.iterdir()] == [".lock"]


@pytest.mark.parametrize("kind", KINDS)
def test_space_that_runs_out_is_said_too(kind: str, cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match="no room for the host store"):
        open_store(cache_dir, NamedExperts(), kind)
    assert not store_path(MANIFEST, cache_dir).exists()


@pytest.mark.parametrize(
    ("setting", "asked"), [("always [advise] never", True), ("always advise [never]", False), ("", False)]
)
def test_huge_pages_are_asked_for_where_that_helps(setting: str, asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before the first byte is written: the pages are there then, and stay."""
    monkeypatch.setattr(memory_store, "_HUGE_PAGES", tmp_path / "shmem_enabled")
    if setting:
        memory_store._HUGE_PAGES.write_text(setting)
    fd = os.memfd_create("pages")
    try:
        assert memory_store.ask_for_huge_pages(fd, 1 << 20) is asked
        assert (os.fstat(fd).st_blocks * 512 >= 1 << 20) is asked
    finally:
        os.close(fd)


def test_too_little_memory_is_said_with_the_way_out(cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=1 << 30, available=1 << 20))
    with pytest.raises(StoreError, match="1 MiB free of the machine's 1 GiB; use host_store='file'"):
        open_store(cache_dir, NamedExperts(), "memory")


def test_no_permission_is_said(tmp_path: Path):
    tmp_path.chmod(0o500)
    with without_privileges(), pytest.raises(StoreError, match="no permission"):
        open_store(tmp_path / "cache", NamedExperts())


def test_store_kinds():
    with pytest.raises(ValueError, match="host_store='ram': allowed: file, memory"):
        resolve_store_kind("ram")


def test_closing_twice_is_harmless_and_records_stay_valid(cache_dir: Path):
    store = open_store(cache_dir, NamedExperts())
    record = store.record(1, 1)
    store.close()
    store.close()
    assert float(record[: NARROW.tensors[0].nbytes].view(torch.bfloat16)[0]) == 101
