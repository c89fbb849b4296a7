"""Copies of numbers from the host to the device that the host doesn't wait for."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray


def to_device(numbers: NDArray[Any], device: torch.device) -> torch.Tensor:
    """The numbers as a tensor on ``device``; the copy is queued on the current stream.

    It reads pinned memory, which torch's allocator keeps until the copy has ended. From pageable memory the host might wait
    for the stream, which never ends after a peer was lost.
    """
    tensor = torch.from_numpy(numbers)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
