"""Pinning the host store: copies from pinned memory to a GPU need no staging buffer.

The calls are the CUDA runtime's (``torch.cuda.cudart()``); the project's own tests run them against a fake.
"""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from epslots.cache.host_store import HostStore, StoreShape
from epslots.progress import ProgressDisplay
from epslots.units import format_bytes

logger = logging.getLogger(__name__)

# A single call for a large store would pin all of it or nothing.
PIECE_BYTES = 1 << 30


def pin_store(store: HostStore, display: ProgressDisplay, device: torch.device, cudart: Any = None) -> bool:
    """Page-lock a filled store in shared memory; where that fails, a warning says what it costs.

    Every record is verified first: pinning reads them all anyway, and first fetches are then as fast as later ones.

    Args:
        device: the GPU that will copy from it.
        cudart: the CUDA runtime, ``torch.cuda.cudart()`` by default; tests give a fake.

    Returns:
        Whether all of the store is pinned. A failure leaves the pieces before it pinned.

    Raises:
        CorruptExpertError: a record differs from its digest.
    """
    if not store.shared:
        logger.warning(
            "The host store is a mapped file, which can't be pinned: every fetch takes an extra copy through a pinned "
            "buffer, at the speed of one core's memory copy instead of the GPU link's. Use host_store='memory' if %s of "
            "RAM can be spared.",
            format_bytes(store.nbytes),
        )
        return False
    with display("verifying the host store", store.nbytes) as advance:
        for error in store.verify(advance):
            raise error
    runtime = cudart or torch.cuda.cudart()
    memory, pinned = store.memory, list[int]()
    weakref.finalize(store, _unpin, runtime, memory, pinned, device, os.getpid())
    code = 0
    with torch.cuda.device(device if device.type == "cuda" else -1):  # the current GPU may be another one
        for start, stop in pieces(store.shape, PIECE_BYTES):
            code = int(runtime.cudaHostRegister(memory.data_ptr() + start, stop - start, 0))
            if code != 0:
                break
            pinned.append(memory.data_ptr() + start)
            store.pinned_bytes = stop
    if code != 0:
        _forget_last_error(device)
        logger.warning(
            "Pinning the host store failed with CUDA error %d after %s of %s: each fetch from the rest takes an extra copy "
            "through a pinned buffer, at the speed of one core's memory copy instead of the GPU link's. Raise the "
            "locked-memory limit (ulimit -l), or free RAM.",
            code,
            format_bytes(store.pinned_bytes),
            format_bytes(store.nbytes),
        )
    return store.pinned


def pieces(shape: StoreShape, most_bytes: int) -> Iterator[tuple[int, int]]:
    """A store's bytes in pieces that end where records end, so that each record is in one.

    Args:
        most_bytes: of a piece, which has at least one record.

    Yields:
        (start, stop) of each.
    """
    start = end = 0
    for layer, spec in enumerate(shape.manifest.layers):
        for expert in range(spec.num_experts):
            after = shape.offset(layer, expert) + spec.layout.stride
            if after - start > most_bytes and end > start:
                yield start, end
                start = end
            end = after
    yield start, shape.nbytes


def _unpin(runtime: Any, memory: torch.Tensor, pinned: list[int], device: torch.device, pid: int) -> None:
    """Release the pages after the last copy from them; ``memory`` is theirs until then."""
    if os.getpid() != pid or not pinned:  # a forked child runs the same exit handlers, and has no CUDA
        return
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for address in pinned:
        runtime.cudaHostUnregister(address)


def _forget_last_error(device: torch.device) -> None:
    """Clear a failed call's error, which CUDA would report at the next kernel launch: this launch takes it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)
