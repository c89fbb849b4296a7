"""One host store per node, whoever comes first builds it: as a file in a cache folder, or in shared memory.

*file*: ``<cache>/<model>-<key>.experts``, mapped. It outlives the process, so the second start is quick; where RAM is smaller
than the model, the operating system keeps the hot part in memory and the file is the tier below.

*memory*: anonymous shared memory (memfd), which the kernel frees with the last process that holds it, however that process
ends. Holders announce themselves by empty files ``<cache>/<model>-<key>.<pid>-<fd>.holder``; a newcomer opens the memory
through any holder that is still alive, and removes the files of the dead. Pinning wants this kind: kernels refuse to pin a
disk file's pages for long.

A lock file serialises building, so that of several processes that start together one builds and the others wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

from epslots.errors import ConfigError, StoreError
from epslots.records import Progress
from epslots.store.host_store import HostStore, Manifest, StoreShape
from epslots.store.packed_records import record_views
from epslots.store.store_build import ExpertSource, appearing_whole, check_free_space, fill_store, sweep
from epslots.units import format_bytes

STORE_KINDS = ("file", "memory")
# Left free in RAM beside a store in shared memory.
MEMORY_MARGIN_BYTES = 512 << 20

OpenSource = Callable[[], ExpertSource]
StartProgress = Callable[[str, int], contextlib.AbstractContextManager[Progress]]


def resolve_store_kind(kind: str) -> str:
    """Check the user's choice of a store.

    Raises:
        ConfigError: not one of ``STORE_KINDS``, or memory where the system has no anonymous shared memory.
    """
    if kind not in STORE_KINDS:
        raise ConfigError(f"host_store={kind!r}: allowed: {', '.join(STORE_KINDS)}")
    if kind == "memory" and not hasattr(os, "memfd_create"):
        raise ConfigError("host_store='memory' needs Linux (memfd); use host_store='file'")
    return kind


def open_node_store(
    manifest: Manifest, source: OpenSource, *, kind: str, cache_dir: Path, start_progress: StartProgress
) -> HostStore:
    """The node's store for ``manifest``, built from ``source`` if this is the first process to ask for it.

    Args:
        manifest: what the store must hold; its key names the store.
        source: opens the checkpoint's experts; called only if the store must be built.
        kind: ``"file"`` or ``"memory"``.
        cache_dir: a folder for the file, the lock and the holders; created if missing.
        start_progress: opens a progress display for (title, total bytes).

    Raises:
        StoreError: no room, no permission, or an existing store that is damaged.
        CheckpointError: from the source.
    """
    path = store_path(manifest, cache_dir)
    with _told(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            opened = _open_file(path, manifest) if kind == "file" else _join_memory(path, manifest)
            if opened is not None:
                return opened
            total = StoreShape(manifest).nbytes
            if kind == "file":
                sweep(path)
                check_free_space(cache_dir, total)
                with start_progress("building the host store", total) as progress, appearing_whole(path) as fd:
                    fill_store(fd, manifest, source(), str(path), progress)
                opened = _open_file(path, manifest)
                assert opened is not None
                return opened
            return _build_memory(path, manifest, source, total, start_progress)


def check_room(manifest: Manifest, *, kind: str, cache_dir: Path) -> None:
    """Refuse a store that has yet to be built and can't be, before other work is done.

    Raises:
        StoreError: no room, or no permission.
    """
    path = store_path(manifest, cache_dir)
    with _told(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        if kind == "file" and not path.exists():
            check_free_space(cache_dir, StoreShape(manifest).nbytes)


@contextlib.contextmanager
def _told(cache_dir: Path) -> Iterator[None]:
    """Errors of the operating system as what they mean to the user."""
    try:
        yield
    except OSError as error:
        reason = "no permission" if isinstance(error, PermissionError) else "no place"
        raise StoreError(f"{reason} for the host store in {cache_dir} ({error}); choose another cache_dir") from error


def store_path(manifest: Manifest, cache_dir: Path) -> Path:
    """Where the store of ``manifest`` lives as a file."""
    return cache_dir / f"{manifest.source}-{manifest.key}.experts"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock, which the kernel releases with the process. Waiting can be interrupted."""
    with open(path, "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open_file(path: Path, manifest: Manifest) -> HostStore | None:
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    return _checked(HostStore(fd, str(path)), manifest)


def _checked(store: HostStore, manifest: Manifest) -> HostStore:
    if store.manifest != manifest:
        store.close()
        raise StoreError(f"{store.where} was built for something else; delete it and load again")
    return store


def _memory_name(path: Path) -> str:
    return f"epslots-{path.stem.rpartition('-')[2]}"  # the key alone: the kernel takes 249 bytes


def _join_memory(path: Path, manifest: Manifest) -> HostStore | None:
    """Open the memory through a living holder, and forget the dead ones."""
    found = None
    for entry in sorted(path.parent.glob(f"{glob.escape(path.stem)}.*.holder")):
        pid, _, number = entry.name.removesuffix(".holder").rpartition(".")[2].partition("-")
        held = f"/proc/{pid}/fd/{number}"
        try:
            if not os.readlink(held).startswith(f"/memfd:{_memory_name(path)}"):
                raise FileNotFoundError(held)  # the process id was given to someone else
            if found is None:
                found = os.open(held, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError):
            entry.unlink(missing_ok=True)
    return None if found is None else _checked(_hold(found, path), manifest)


def _build_memory(path: Path, manifest: Manifest, source: OpenSource, total: int, start_progress: StartProgress) -> HostStore:
    free = psutil.virtual_memory().available
    if free < total + MEMORY_MARGIN_BYTES:
        raise StoreError(
            f"no room for the host store in memory: it needs {format_bytes(total)} and leaves "
            f"{format_bytes(MEMORY_MARGIN_BYTES)} free, but only {format_bytes(free)} are available; use "
            f"host_store='file', which keeps what doesn't fit on the disk"
        )
    fd = os.memfd_create(_memory_name(path), os.MFD_CLOEXEC)
    try:
        on_disk = _open_file(path, manifest)
        experts = source() if on_disk is None else _StoreSource(on_disk)
        with start_progress("filling shared memory", total) as progress:
            fill_store(fd, manifest, experts, "shared memory", progress)
    except BaseException:
        os.close(fd)
        raise
    return _hold(fd, path)


def _hold(fd: int, path: Path) -> HostStore:
    """Open shared memory, and announce that this process holds it until the store is closed or the process ends."""
    pid = os.getpid()
    entry = path.with_name(f"{path.stem}.{pid}-{fd}.holder")
    entry.touch()
    return HostStore(fd, f"shared memory of {path.stem}", shared=True, on_close=lambda: _leave(entry, pid))


def _leave(entry: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked child runs the same exit handlers
        entry.unlink(missing_ok=True)


class _StoreSource:
    """An existing store's experts, for filling another: shared memory from the file of an earlier start."""

    def __init__(self, store: HostStore) -> None:
        self._store = store

    def read_expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        layout = self._store.manifest.layers[layer].record
        return record_views(self._store.record(layer, expert), layout)
