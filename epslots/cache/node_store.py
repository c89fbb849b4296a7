"""The host store of a node. The first process that asks for it builds it, as a file or in shared memory; all others open it.

    file     ``<cache>/<model>-<key>.experts``, mapped. It outlives its processes, so the second start is quick. Where RAM is
             smaller than the model, the operating system keeps in memory what it will; with ``host_memory`` each rank keeps
             a given part, and reads the rest itself (``disk_store.py``).
             On a CPU, slots are a second copy of what its page cache holds.
    memory   shared memory, which the kernel frees with its last process (``memory_store.py``). Pinning wants this kind.

A lock file serialises building: of several processes that start together one builds, and the others wait. A store file
appears whole, so it is opened without the lock: a folder that can't be written to serves the stores that it has.
Read ``open_node_store`` first.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from epslots.cache.host_store import HostStore, Manifest, StoreShape
from epslots.cache.memory_store import build_memory_store, check_free_memory, holder_files, join_memory_store
from epslots.cache.store_build import (
    ExpertSource,
    OpenSource,
    StartProgress,
    appearing_whole,
    check_free_space,
    fill_store,
    sweep,
)
from epslots.cache.unpacking import record_views
from epslots.errors import ConfigError, StoreError
from epslots.private_files import check_owner, locked, make_private_folder, open_private_file

logger = logging.getLogger(__name__)

STORE_KINDS = ("file", "memory")
OpenFile = Callable[[int, str], HostStore]


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


def store_path(manifest: Manifest, cache_dir: Path) -> Path:
    """The path of the store of ``manifest`` as a file; its lock and its holders have the same stem."""
    return cache_dir / f"{manifest.source}-{manifest.key}.experts"


def check_room(manifest: Manifest, *, kind: str, cache_dir: Path) -> None:
    """Refuse a store that can't be built, before other work is done. An existing one passes.

    Raises:
        StoreError: no room, or no permission.
    """
    path = store_path(manifest, cache_dir)
    with _os_errors_refused(cache_dir):
        writable = _prepare_folder(cache_dir)
        if path.exists():
            return
        if kind == "memory" and holder_files(path):
            return
        if not writable:
            raise PermissionError(
                errno.EACCES, "it can't be written to, and holds no store of this checkpoint", str(cache_dir)
            )
        check_free = partial(check_free_space, cache_dir) if kind == "file" else check_free_memory
        check_free(StoreShape(manifest).nbytes)


def open_node_store(
    manifest: Manifest,
    source: OpenSource,
    *,
    kind: str,
    cache_dir: Path,
    start_progress: StartProgress,
    open_as: OpenFile = HostStore,
) -> HostStore:
    """The node's store for ``manifest``, built from ``source`` if there is none.

    Args:
        manifest: what the store must hold; its key names the store.
        source: opens the checkpoint's experts; called only if the store must be built.
        kind: ``"file"`` or ``"memory"``.
        cache_dir: a folder for the file, the lock and the holders; created if missing.
        start_progress: opens a progress display for (title, total bytes).
        open_as: makes a store of (its file, its name in messages): mapped, or a ``DiskStore``.

    Raises:
        StoreError: no room, no permission, or an existing store that is damaged.
        CheckpointError: from the source.
    """
    path = store_path(manifest, cache_dir)
    with _os_errors_refused(cache_dir):
        writable = _prepare_folder(cache_dir)
        store = None
        if kind == "file":
            store = _open_file(path, manifest, open_as)
        elif not writable:
            store = _open_memory_read_only(path, manifest)
        if store is not None:
            return store
        with locked(path.with_suffix(".lock")):
            store = _open_file(path, manifest, open_as) if kind == "file" else join_memory_store(path, manifest)
            if store is not None:
                return store
            if kind == "file":
                return _build_file(path, manifest, source, start_progress, open_as)
            return _build_memory(path, manifest, source, start_progress)


@contextlib.contextmanager
def _os_errors_refused(cache_dir: Path) -> Iterator[None]:
    """Turn errors of the operating system into StoreErrors that name the folder."""
    try:
        yield
    except OSError as error:
        reason = "no permission" if isinstance(error, PermissionError) else "no place"
        raise StoreError(f"{reason} for the host store in {cache_dir} ({error}); choose another cache_dir") from error


def _prepare_folder(cache_dir: Path) -> bool:
    """Make the folder if it is missing, and check its owner; returns whether files can be made in it."""
    if cache_dir.is_dir() and not os.access(cache_dir, os.W_OK | os.X_OK, effective_ids=True):
        check_owner(cache_dir.stat(), cache_dir)
        return False
    make_private_folder(cache_dir)
    return True


def _open_file(path: Path, manifest: Manifest, open_as: OpenFile = HostStore) -> HostStore | None:
    """The store's file; None if there is none."""
    try:
        fd = open_private_file(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    return open_as(fd, str(path)).checked(manifest)


def _open_memory_read_only(path: Path, manifest: Manifest) -> HostStore | None:
    """The memory of a folder that can't be written to, else its file: without a lock or an announcement."""
    store = join_memory_store(path, manifest, announce=False)
    if store is not None:
        return store
    store = _open_file(path, manifest)
    if store is not None:
        logger.warning("%s can't be written to: the host store is served from its file there, not from memory", path.parent)
    return store


def _build_file(
    path: Path, manifest: Manifest, source: OpenSource, start_progress: StartProgress, open_as: OpenFile
) -> HostStore:
    """Build the store's file and open it. The caller holds the lock."""
    total = StoreShape(manifest).nbytes
    sweep(path)
    check_free_space(path.parent, total)
    with start_progress("building the host store", total) as advance, appearing_whole(path) as fd:
        fill_store(fd, manifest, source(), str(path), advance)
    store = _open_file(path, manifest, open_as)
    assert store is not None
    return store


def _build_memory(path: Path, manifest: Manifest, source: OpenSource, start_progress: StartProgress) -> HostStore:
    """Build the store in shared memory, from its file where an earlier start left one. The caller holds the lock."""

    def experts() -> ExpertSource:
        on_disk = _open_file(path, manifest)
        return source() if on_disk is None else _StoredExperts(on_disk)

    return build_memory_store(path, manifest, experts, start_progress)


class _StoredExperts:
    """The experts of an existing store, for filling another one. An ``ExpertSource``."""

    def __init__(self, store: HostStore) -> None:
        self._store = store

    def read_expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        layout = self._store.manifest.layers[layer].layout
        return record_views(self._store.record(layer, expert), layout)
