"""Pinning the host store: copies from pinned memory to a GPU need no staging buffer.

The calls are the CUDA runtime's (``torch.cuda.cudart()``); the project's own tests run them against a fake.
"""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from typing import Any

import torch

from epslots.cache.host_store import HostStore
from epslots.progress import ProgressDisplay
from epslots.units import format_bytes

logger = logging.getLogger(__name__)


def pin_store(store: HostStore, display: ProgressDisplay, device: torch.device, cudart: Any = None) -> bool:
    """Page-lock a filled store in shared memory; where that fails, a warning says what it costs.

    Every record is verified first: pinning reads them all anyway, and first fetches are then as fast as later ones.

    Args:
        device: the GPU that will copy from it.
        cudart: the CUDA runtime, ``torch.cuda.cudart()`` by default; tests give a fake.

    Returns:
        Whether the store is pinned.

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
    memory = store.memory
    with torch.cuda.device(device if device.type == "cuda" else -1):  # the current GPU may be another one
        code = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if code != 0:
        _forget_last_error(device)
        logger.warning(
            "Pinning the host store (%s) failed with CUDA error %d: every fetch takes an extra copy through a pinned buffer, "
            "at the speed of one core's memory copy instead of the GPU link's. Raise the locked-memory limit (ulimit -l), or "
            "free RAM.",
            format_bytes(store.nbytes),
            code,
        )
        return False
    store.pinned = True
    weakref.finalize(store, _unpin, runtime, memory, device, os.getpid())
    return True


def _unpin(runtime: Any, memory: torch.Tensor, device: torch.device, pid: int) -> None:
    """Release the pages after the last copy from them."""
    if os.getpid() != pid:  # a forked child runs the same exit handlers, and has no CUDA
        return
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    runtime.cudaHostUnregister(memory.data_ptr())


def _forget_last_error(device: torch.device) -> None:
    """Clear a failed call's error, which CUDA would report at the next kernel launch: this launch takes it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)
