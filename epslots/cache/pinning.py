"""Pinning the host store, or its part in RAM: copies from pinned memory to a GPU need no staging buffer.

The calls are the CUDA runtime's (``torch.cuda.cudart()``); the project's own tests run them against a fake.
"""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from epslots.cache.disk_store import DiskStore
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
            "RAM can be spared, else host_memory with as much as can.",
            format_bytes(store.nbytes),
        )
        return False
    with display("verifying the host store", store.nbytes) as advance:
        for error in store.verify(advance):
            raise error
    store.set_pinned(_pin(store, store.memory, pieces(store.shape, PIECE_BYTES), device, cudart))
    return store.pinned


def pin_cells(store: DiskStore, device: torch.device, cudart: Any = None) -> None:
    """Page-lock the RAM of a store on disk; where that fails, a warning says what it costs.

    Torch's own pinned memory comes in powers of two, which would take up to twice the bytes.

    Args:
        device: the GPU that will copy from it.
        cudart: the CUDA runtime, ``torch.cuda.cudart()`` by default; tests give a fake.
    """
    pinned = 0
    for memory in store.cell_memory:
        step = max(1, PIECE_BYTES // memory.shape[1]) * memory.shape[1]
        ends = ((start, min(start + step, memory.nbytes)) for start in range(0, memory.nbytes, step))
        pinned += _pin(store, memory.view(-1), ends, device, cudart)
    store.set_cells_pinned(pinned)


def _pin(store: HostStore, memory: torch.Tensor, ends: Iterable[tuple[int, int]], device: torch.device, cudart: Any) -> int:
    """Page-lock memory until the store is gone; returns how many bytes from the start are.

    Args:
        memory: uint8 [any number].
        ends: (start, stop) of each piece.
    """
    runtime = cudart or torch.cuda.cudart()
    addresses = list[int]()
    weakref.finalize(store, _unpin, runtime, memory, addresses, device, os.getpid())
    pinned = code = 0
    with torch.cuda.device(device if device.type == "cuda" else -1):  # the current GPU may be another one
        for start, stop in ends:
            code = int(runtime.cudaHostRegister(memory.data_ptr() + start, stop - start, 0))
            if code != 0:
                break
            addresses.append(memory.data_ptr() + start)
            pinned = stop
    if code != 0:
        _forget_last_error(device)
        logger.warning(
            "Pinning the host store failed with CUDA error %d after %s of %s: each fetch from the rest takes an extra copy "
            "through a pinned buffer, at the speed of one core's memory copy instead of the GPU link's. Raise the "
            "locked-memory limit (ulimit -l), or free RAM.",
            code,
            format_bytes(pinned),
            format_bytes(memory.nbytes),
        )
    return pinned


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
