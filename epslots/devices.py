"""The device that a model computes on, and its free memory."""

from __future__ import annotations

import torch

from epslots.errors import ConfigError
from epslots.host_limits import MemoryLimit, tightest_memory_limit
from epslots.transport.rendezvous import local_number


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
            # Some launchers show each process its own GPU alone, and number the processes all the same.
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

    Triton launches on the current GPU, whatever device its arguments are on; pinned memory and transformers' continuous
    batching take it, too, and each GPU that is touched loses some hundred MB to a context.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def memory_limit(device: torch.device) -> MemoryLimit:
    """The limit that leaves this process the least of the device's memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return MemoryLimit(str(device), "", total, free + cached)
    return tightest_memory_limit()
