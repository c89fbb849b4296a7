"""One host store per node, whoever comes first builds it: as a file in a cache folder, or in shared memory.

*file*: ``<cache>/<model>-<key>.experts``, mapped. It outlives the process, so the second start is quick; where RAM is smaller
than the model, the operating system keeps the hot part in memory and the file is the tier below.

*memory*: anonymous shared memory (memfd), which the kernel frees with the last process that holds it, however that process
ends. Holders announce themselves by empty files ``<cache>/<model>-<key>.<pid>-<fd>.holder``; a newcomer opens the memory
through any holder that is still alive, and removes the files of the dead. Pinning wants this kind: kernels refuse to pin a
disk file's pages for long.

A lock file serialises building, so that of several processes that start together one builds and the others wait. A store
file appears whole, so that it is opened without the lock: a folder that can't be written to serves the stores that it has.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from epslots.cache.host_store import HostStore, Manifest, StoreShape
from epslots.cache.store_build import ExpertSource, appearing_whole, check_free_space, fill_store, sweep
from epslots.cache.unpacking import record_views
from epslots.errors import ConfigError, StoreError
from epslots.host_limits import tightest_memory_limit
from epslots.private_files import check_owner, make_private_folder, open_private_file
from epslots.progress import Advance
from epslots.units import format_bytes

logger = logging.getLogger(__name__)

STORE_KINDS = ("file", "memory")
# Left free in RAM beside a store in shared memory.
MEMORY_MARGIN_BYTES = 512 << 20

OpenSource = Callable[[], ExpertSource]
StartProgress = Callable[[str, int], contextlib.AbstractContextManager[Advance]]


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
        opened = _open_read_only(path, manifest, kind) if not _enter(cache_dir) else None
        if opened is None and kind == "file":
            opened = _open_file(path, manifest)
        if opened is not None:
            return opened
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
        writable = _enter(cache_dir)
        if path.exists():
            return
        if not writable and not (kind == "memory" and _holders(path)):
            raise PermissionError(
                errno.EACCES, "it can't be written to, and holds no store of this checkpoint", str(cache_dir)
            )
        if kind == "file":
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
    fd = open_private_file(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _open_read_only(path: Path, manifest: Manifest, kind: str) -> HostStore | None:
    """The store of a folder in which no file can be made: without a lock, and without an announcement."""
    if kind == "file":
        return _open_file(path, manifest)
    joined = _join_memory(path, manifest, announce=False)
    if joined is not None:
        return joined
    opened = _open_file(path, manifest)
    if opened is not None:
        logger.warning("%s can't be written to: the host store is served from its file there, not from memory", path.parent)
    return opened


def _open_file(path: Path, manifest: Manifest) -> HostStore | None:
    try:
        fd = open_private_file(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    return _checked(HostStore(fd, str(path)), manifest)


def _enter(cache_dir: Path) -> bool:
    """Make the folder if it is missing, check its owner, and say whether files can be made in it."""
    if cache_dir.is_dir() and not os.access(cache_dir, os.W_OK | os.X_OK, effective_ids=True):
        check_owner(cache_dir.stat(), cache_dir)
        return False
    make_private_folder(cache_dir)
    return True


def _checked(store: HostStore, manifest: Manifest) -> HostStore:
    if store.manifest != manifest:
        store.close()
        raise StoreError(f"{store.where} was built for something else; delete it and load again")
    return store


def _memory_name(path: Path) -> str:
    return f"epslots-{path.stem.rpartition('-')[2]}"  # the key alone: the kernel takes 249 bytes


def _holders(path: Path) -> list[Path]:
    """The files of this user's processes that announced themselves as holders; another user's are none."""
    found = []
    for entry in sorted(path.parent.glob(f"{glob.escape(path.stem)}.*.holder")):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            if entry.lstat().st_uid == os.geteuid():
                found.append(entry)
    return found


def _join_memory(path: Path, manifest: Manifest, *, announce: bool = True) -> HostStore | None:
    """Open the memory through a living holder, and forget the dead ones.

    Args:
        announce: False where no file can be made or removed: nothing is forgotten, and this process is no holder.
    """
    found = None
    for entry in _holders(path):
        held = _open_held(entry, path)
        if held is None and announce:
            entry.unlink(missing_ok=True)
        if found is None:
            found = held
        elif held is not None:
            os.close(held)
    if found is None:
        return None
    return _checked(_hold(found, path) if announce else HostStore(found, _memory_where(path), shared=True), manifest)


def _open_held(entry: Path, path: Path) -> int | None:
    """The memory of the process that made ``entry``; None if it has ended, whoever has its process id now."""
    pid, _, number = entry.name.removesuffix(".holder").rpartition(".")[2].partition("-")
    held = f"/proc/{pid}/fd/{number}"
    try:
        if not os.readlink(held).startswith(f"/memfd:{_memory_name(path)}"):
            return None
        fd = os.open(held, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    if os.fstat(fd).st_uid != os.geteuid():
        os.close(fd)
        return None
    return fd


def _build_memory(path: Path, manifest: Manifest, source: OpenSource, total: int, start_progress: StartProgress) -> HostStore:
    limit = tightest_memory_limit()
    if limit.free_bytes < total + MEMORY_MARGIN_BYTES:
        raise StoreError(
            f"no room for the host store in memory: it needs {format_bytes(total)} and leaves "
            f"{format_bytes(MEMORY_MARGIN_BYTES)} free, but only {limit}; use host_store='file', which keeps what doesn't fit "
            f"on the disk"
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
    os.close(open_private_file(entry, os.O_RDONLY | os.O_CREAT))
    return HostStore(fd, _memory_where(path), shared=True, on_close=lambda: _leave(entry, pid))


def _memory_where(path: Path) -> str:
    return f"shared memory of {path.stem}"


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
