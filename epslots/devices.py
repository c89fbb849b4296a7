"""The device that a model computes on, and its free memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from epslots.errors import ConfigError
from epslots.host_limits import MemoryLimit, tightest_memory_limit, usable_cores
from epslots.transport.rendezvous import local_number

# Less than this is in use on a GPU on which only this process has a context.
_CONTEXT_BYTES = 1 << 30
_GROWTH_BYTES = 16 << 20
_STEADY_S, _MOST_FREEING_S, _FREEING_POLL_S = 1.0, 10.0, 0.1


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device to compute on, with its index.

    Args:
        device: None: a GPU if there is one, else the CPU. A GPU without an index: the only one, if there is one; else under
            ``torchrun`` the one with the process's number on the node, and without it the current one.

    Raises:
        ConfigError: no such device here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r}: allowed: cpu, cuda, cuda:N") from error
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device={str(device)!r}, but torch sees no GPU here; use device='cpu'")
        if resolved.index is None:
            number = local_number()
            # Some launchers show each process only its own GPU, and number the processes all the same.
            if number is None or torch.cuda.device_count() == 1:
                number = torch.cuda.current_device()
            resolved = torch.device("cuda", number)
        if resolved.index >= torch.cuda.device_count():
            raise ConfigError(f"device={str(device)!r}, but there are {torch.cuda.device_count()} GPUs here, from cuda:0")
    elif resolved.type != "cpu":
        raise ConfigError(f"device={str(device)!r}: allowed: cpu, cuda, cuda:N")
    return resolved


def make_current(device: torch.device) -> None:
    """Make a GPU this thread's current one; a no-op for the CPU.

    Triton launches on the current GPU, and not on that of its arguments; pinned memory and transformers' continuous
    batching take it, too, and each GPU that is touched loses some hundred MB to a context.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def wait_for_freed_memory(
    device: torch.device, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], object] = time.sleep
) -> None:
    """Wait until a GPU's free memory grows no more. The driver frees a killed process's memory a while after its end.

    A rank that replaces another on its GPU would plan with too little. Returns at once where the GPU is nearly empty, or for
    the CPU; else after ``_STEADY_S`` without growth, and ``_MOST_FREEING_S`` at most.
    """
    if device.type != "cuda":
        return
    began = steady_since = clock()
    free, total = torch.cuda.mem_get_info(device)
    while total - free > _CONTEXT_BYTES and clock() - steady_since < _STEADY_S and clock() - began < _MOST_FREEING_S:
        sleep(_FREEING_POLL_S)
        now_free, _ = torch.cuda.mem_get_info(device)
        if now_free > free + _GROWTH_BYTES:
            steady_since = clock()
        free = now_free


def cpu_share(device: torch.device, ranks: int) -> int:
    """CPU threads of each of so many ranks of a node that compute on GPUs. 0 = torch's choice, for the CPU.

    They pack records, copy them in memory, and compute experts. Ray gives an actor that asks for no CPU a single thread.
    """
    return max(1, usable_cores() // ranks) if device.type == "cuda" else 0


def memory_limit(device: torch.device) -> MemoryLimit:
    """The limit that leaves this process the least of the device's memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return MemoryLimit(str(device), "", total, free + cached)
    return tightest_memory_limit()
