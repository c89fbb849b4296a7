"""A host store in anonymous shared memory (memfd), which the kernel frees with the last process that holds it.

A process that holds the memory announces itself by an empty file, ``<cache>/<model>-<key>.<pid>-<fd>.holder``. Another process
opens the memory through any living holder, and removes the files of dead ones. Called by ``node_store.py``; a builder and all
that announce themselves hold the store's lock meanwhile.
"""

from __future__ import annotations

import contextlib
import glob
import mmap
import os
from pathlib import Path

from epslots.cache.host_store import HostStore, Manifest, StoreShape
from epslots.cache.store_build import OpenSource, StartProgress, fill_store
from epslots.errors import StoreError
from epslots.host_limits import tightest_memory_limit
from epslots.private_files import open_private_file
from epslots.units import format_bytes

# Left free in RAM beside the store.
MEMORY_MARGIN_BYTES = 512 << 20
# The system's setting: whether shared memory has pages of 2 MiB never, always, or where a process advises it.
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, of Linux 5.14


def join_memory_store(path: Path, manifest: Manifest, *, announce: bool = True) -> HostStore | None:
    """The memory of a living holder; None if there is none. Removes the files of dead holders.

    Args:
        path: of the store as a file.
        announce: False where no file can be made or removed: none is, and this process becomes no holder.
    """
    found = None
    for file in holder_files(path):
        fd = _open_held(file, path)
        if fd is None and announce:
            file.unlink(missing_ok=True)
        if found is None:
            found = fd
        elif fd is not None:
            os.close(fd)
    if found is None:
        return None
    store = _hold(found, path) if announce else HostStore(found, _where(path), shared=True)
    return store.checked(manifest)


def build_memory_store(path: Path, manifest: Manifest, source: OpenSource, start_progress: StartProgress) -> HostStore:
    """Fill new shared memory, and announce it.

    Args:
        source: opens the experts.
        start_progress: opens a progress display for (title, total bytes).

    Raises:
        StoreError: not enough memory.
        CheckpointError: from the source.
    """
    total = StoreShape(manifest).nbytes
    check_free_memory(total)
    fd = os.memfd_create(_memory_name(path), os.MFD_CLOEXEC)
    try:
        experts = source()
        ask_for_huge_pages(fd, total)
        with start_progress("filling shared memory", total) as advance:
            fill_store(fd, manifest, experts, "shared memory", advance)
    except BaseException:
        os.close(fd)
        raise
    return _hold(fd, path)


def check_free_memory(nbytes: int) -> None:
    """Refuse a store that this process has no memory for.

    Raises:
        StoreError: there is too little room; it says how much is needed and free.
    """
    limit = tightest_memory_limit()
    if limit.free_bytes < nbytes + MEMORY_MARGIN_BYTES:
        raise StoreError(
            f"no room for the host store in memory: it needs {format_bytes(nbytes)} and leaves "
            f"{format_bytes(MEMORY_MARGIN_BYTES)} free, but only {limit}; use host_store='file', which keeps what doesn't fit "
            f"on the disk"
        )


def ask_for_huge_pages(fd: int, nbytes: int) -> bool:
    """Back empty shared memory by pages of 2 MiB, if the system lets a process ask for them.

    A GPU's driver pins a store page by page, anew for each process: with pages of 4 KiB that takes many seconds for a large
    one. Where the system gives huge pages always or never, there is nothing to ask for.

    Returns:
        Whether it was asked for, and granted.
    """
    with contextlib.suppress(OSError):
        if "[advise]" in _HUGE_PAGES.read_text():
            os.ftruncate(fd, nbytes)
            with mmap.mmap(fd, nbytes) as memory:
                memory.madvise(mmap.MADV_HUGEPAGE)
                memory.madvise(_POPULATE_WRITE)  # while it is advised: reserving space knows of no advice
            return True
    return False


def holder_files(path: Path) -> list[Path]:
    """The files of this user's processes that announced themselves as holders; those of other users don't count."""
    found = []
    for file in sorted(path.parent.glob(f"{glob.escape(path.stem)}.*.holder")):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            if file.lstat().st_uid == os.geteuid():
                found.append(file)
    return found


def _open_held(file: Path, path: Path) -> int | None:
    """The memory of the process that made a holder file. None if it has ended, even if another has its process id now."""
    pid, _, number = file.name.removesuffix(".holder").rpartition(".")[2].partition("-")
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


def _hold(fd: int, path: Path) -> HostStore:
    """Open shared memory. This process is announced as a holder until it closes the store or ends."""
    pid = os.getpid()
    file = path.with_name(f"{path.stem}.{pid}-{fd}.holder")
    os.close(open_private_file(file, os.O_RDONLY | os.O_CREAT))
    return HostStore(fd, _where(path), shared=True, on_close=lambda: _withdraw(file, pid))


def _withdraw(file: Path, pid: int) -> None:
    """Remove this process's holder file."""
    if os.getpid() == pid:  # a forked child runs the same exit handlers
        file.unlink(missing_ok=True)


def _memory_name(path: Path) -> str:
    return f"epslots-{path.stem.rpartition('-')[2]}"  # only the key: the kernel takes 249 bytes


def _where(path: Path) -> str:
    return f"shared memory of {path.stem}"
