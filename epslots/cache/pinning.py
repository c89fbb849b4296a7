"""Pinning the host store: without it, a copy to the GPU goes through a staging buffer and waits for it.

Never run on a GPU by the project's own tests; the calls are those of the CUDA runtime through ``torch.cuda.cudart()``.
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
    """Page-lock a filled store in shared memory; say so where it can't be, and what that costs.

    Every record is verified on the way: pinning reads them all in anyway, and a first fetch is then as fast as any.

    Args:
        device: the GPU that will copy from it.
        cudart: the CUDA runtime; ``torch.cuda.cudart()`` unless a test brings its own.

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
    with torch.cuda.device(device if device.type == "cuda" else -1):  # not whichever GPU happens to be current
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
    """Release the pages once no copy reads them any more."""
    if os.getpid() != pid:  # a forked child runs the same exit handlers, and has no CUDA
        return
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    runtime.cudaHostUnregister(memory.data_ptr())


def _forget_last_error(device: torch.device) -> None:
    """CUDA hands a failed call's error to whoever asks next, which would be an innocent kernel launch: let it be this one."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)
