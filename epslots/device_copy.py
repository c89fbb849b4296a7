"""Numbers that the host works out, on their way to the device without a wait."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray


def to_device(numbers: NDArray[Any], device: torch.device) -> torch.Tensor:
    """The numbers as a tensor on ``device``; the copy is queued on the current stream.

    It starts from pinned memory, which torch's allocator keeps until the copy is done: from pageable memory the host might
    wait for the stream, and a lost peer's stream never ends.
    """
    tensor = torch.from_numpy(numbers)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
