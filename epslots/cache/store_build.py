"""Building a host store: every expert is converted once, in parallel, into a file. The file appears whole or not at all.

``fill_store`` writes the store; the other functions make room for it. Called by ``node_store.py`` and ``memory_store.py``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from epslots.cache.host_store import Manifest, StoreShape, record_digest
from epslots.cache.unpacking import record_views
from epslots.errors import StoreError
from epslots.host_limits import usable_cores
from epslots.layout import RecordLayout
from epslots.progress import Advance
from epslots.units import format_bytes

# Left free on a disk that a store is written to: a full disk harms everyone on the node.
DISK_MARGIN_BYTES = 64 << 20
BUILD_WORKERS = 4


class ExpertSource(Protocol):
    """The origin of a store's experts; safe to call from several threads."""

    def read_expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """The tensors of one expert by name, shaped as in its record's layout; floats may have another float dtype."""


OpenSource = Callable[[], ExpertSource]
StartProgress = Callable[[str, int], contextlib.AbstractContextManager[Advance]]
"""Opens a progress display for (title, total bytes)."""


def pack_record(record: torch.Tensor, layout: RecordLayout, tensors: dict[str, torch.Tensor]) -> None:
    """Copy an expert's tensors into its record, uint8 [layout.nbytes], converting their dtype; padding stays as it is."""
    views = record_views(record, layout)
    for name, tensor in tensors.items():
        views[name].copy_(tensor)


def reserve(fd: int, nbytes: int, where: str) -> None:
    """Reserve all of a store's space before the first byte is written.

    Raises:
        StoreError: there isn't enough.
    """
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT):
            raise
        raise StoreError(
            f"no room for the host store: {format_bytes(nbytes)} needed in {where} ({error.strerror}); free some, or "
            f"choose another place (cache_dir) or kind (host_store)"
        ) from error


def check_free_space(folder: Path, nbytes: int) -> None:
    """Refuse a store that the folder's file system has no room for.

    Raises:
        StoreError: there is too little room; it says how much is needed and free.
    """
    fs = os.statvfs(folder)
    free = fs.f_bavail * fs.f_frsize
    if free < nbytes + DISK_MARGIN_BYTES:
        raise StoreError(
            f"no room for the host store: it needs {format_bytes(nbytes)} in {folder}, beside "
            f"{format_bytes(DISK_MARGIN_BYTES)} that stay free, and {format_bytes(free)} are free; free some, or choose "
            f"another folder (cache_dir)"
        )


@contextlib.contextmanager
def appearing_whole(path: Path) -> Iterator[int]:
    """A new file that appears at ``path`` when the block ends without an error.

    Until then it has no name, so that even a killed process leaves nothing behind. Where the file system has no nameless
    files it has a temporary name, removed on every exit but a kill; ``sweep`` removes a killed process's.
    """
    tmpfile = getattr(os, "O_TMPFILE", 0)
    temporary: Path | None = None
    try:
        if not tmpfile:
            raise OSError(errno.EOPNOTSUPP, "no nameless files")
        fd = os.open(path.parent, tmpfile | os.O_RDWR, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        yield fd
        if temporary is None:
            path.unlink(missing_ok=True)
            # Only with a directory fd does Python call linkat, which follows the link to the nameless file.
            os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)
        else:
            temporary.replace(path)
    finally:
        os.close(fd)
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove the temporary files of killed builders of ``path``. The caller holds the store's lock."""
    for leftover in path.parent.glob(f"{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def fill_store(fd: int, manifest: Manifest, source: ExpertSource, where: str, progress: Advance | None = None) -> None:
    """Write a whole store into an empty file: records first, each read back against its digest, the header last.

    Args:
        where: the store's name in messages.
        progress: called with the bytes of each record.

    Raises:
        StoreError: no room, or a record read back differs from what was written.
        CheckpointError: from the source.
    """
    shape = StoreShape(manifest)
    reserve(fd, shape.nbytes, where)
    of_thread = threading.local()
    stop = threading.Event()

    def write(layer: int, expert: int) -> None:
        layout = manifest.layers[layer].layout
        buffers = of_thread.__dict__.setdefault("buffers", {})
        if layout not in buffers:  # zeros, so that the padding between tensors is defined
            record = torch.zeros(layout.nbytes, dtype=torch.uint8, device="cpu")
            buffers[layout] = record, torch.empty_like(record)
        record, written = buffers[layout]
        pack_record(record, layout, source.read_expert(layer, expert))
        digest = record_digest(record)
        offset = shape.offset(layer, expert)
        _read_or_write(lambda view, at: os.pwrite(fd, view, at), record, offset)
        os.pwrite(fd, digest, shape.digest_offset(layer, expert))
        _read_or_write(lambda view, at: os.preadv(fd, [view], at), written, offset)
        if record_digest(written) != digest:
            raise StoreError(f"{where} doesn't hold what was written to it (expert {expert} of layer {layer})")
        if progress is not None:
            progress(layout.nbytes)

    def write_unless_stopped(layer: int, expert: int) -> None:
        try:
            if not stop.is_set():
                write(layer, expert)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(min(BUILD_WORKERS, usable_cores())) as pool:
        try:
            for future in [pool.submit(write_unless_stopped, layer, expert) for layer, expert in shape.experts()]:
                future.result()
        except BaseException:  # Ctrl-C among them: queued writes do nothing from now on
            stop.set()
            raise
    os.pwrite(fd, shape.header(), 0)


def _read_or_write(call: Callable[[memoryview, int], int], record: torch.Tensor, offset: int) -> None:
    """Read or write a whole record. ``call(view, offset)`` moves at most 2 GiB, and may move less."""
    view = record.numpy().data
    while len(view):
        moved = call(view, offset)
        if moved <= 0:
            raise StoreError(f"the host store ended at byte {offset:,}")
        view, offset = view[moved:], offset + moved
