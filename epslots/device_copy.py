"""Copies of small things between host and device: neither the host nor the copy of an expert holds them up.

A GPU's copy engine serves the copies of all streams in the order in which they become ready, and priorities don't count: a few
bytes queued behind an expert's record wait for the whole of it. So a kernel reads them, straight out of pinned memory, which
every GPU can address. (The host's address is the device's: CUDA's unified addressing. torch wraps an address by
``__cuda_array_interface__``.) Where a first upload shows that a driver or a build of torch doesn't do that, the copy engine
serves uploads after all.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict, deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_WORD_BYTES = 8
# Buffers have sizes in powers of two from this one on, so that few sizes serve all uploads.
_LEAST_WORDS = 32


def to_device(numbers: NDArray[Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """The numbers as a tensor on ``device``; queued on the current stream.

    Args:
        numbers: on the host; free to be changed on return. On the CPU they are the result's memory.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(numbers)) if isinstance(numbers, np.ndarray) else numbers
    if device.type == "cpu":
        return tensor
    words = _uploads(device).send(tensor, None)
    nbytes = tensor.nbytes
    if words.nbytes != nbytes:
        words = words.view(torch.uint8)[:nbytes]
    return words.view(tensor.dtype).view(tensor.shape)


def copy_to_device(numbers: NDArray[Any], target: torch.Tensor) -> None:
    """Overwrite a tensor; queued on the current stream. On the CPU it is written at once.

    Args:
        numbers: on the host; free to be changed on return.
        target: contiguous, of the same dtype and size, in whole words of eight bytes.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    if target.device.type == "cpu":
        target.view(-1).copy_(tensor.view(-1))
    else:
        _uploads(target.device).send(tensor, target)


def to_host(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """A tensor's values on the host, and the event after which they are there; on the CPU itself, and None.

    The copy is queued on the current stream, and nothing waits.
    """
    if tensor.device.type == "cpu":
        return tensor, None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensor.device))
    return host, arrived


class _PinnedBuffer:
    """Pinned memory, as the host and as the device see it.

    Attributes:
        numbers: uint8, the host's view.
        words: int64: the device's view, or the host's where the device has none.
        read: reached when the last upload has been read.
    """

    def __init__(self, words: int, device: torch.device, *, mapped: bool) -> None:
        self._memory = torch.empty(words * _WORD_BYTES, dtype=torch.uint8, pin_memory=True)
        self.numbers: NDArray[np.uint8] = self._memory.numpy()
        self.__cuda_array_interface__ = {
            "shape": (words,),
            "typestr": "<i8",
            "data": (self._memory.data_ptr(), False),
            "strides": None,
            "version": 3,
        }
        self.words = torch.as_tensor(self, device=device) if mapped else self._memory.view(torch.int64)
        self.read = torch.cuda.Event()


class _Uploads:
    """All uploads to one device. A buffer is used again when its last upload has been read.

    The first one is made, and looked at, when this is: so make it before a capture begins.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: dict[int, list[_PinnedBuffer]] = defaultdict(list)
        self._used: deque[tuple[int, _PinnedBuffer]] = deque()
        self._lock = threading.Lock()
        self.mapped = True
        try:
            self.mapped = self._arrives(torch.arange(_LEAST_WORDS) * 0x0101_0101_0101)
            why = "it read other numbers"
        except (RuntimeError, TypeError, ValueError) as error:  # torch refuses the address, or the interface
            self.mapped, why = False, str(error).partition("\n")[0]
        if not self.mapped:
            self._used.clear()  # the buffer that was tried is of no use
            logger.warning("%s can't read pinned memory by a kernel (%s): small uploads wait for expert copies", device, why)

    def _arrives(self, numbers: torch.Tensor) -> bool:
        return torch.equal(self.send(numbers, None).cpu(), numbers)

    def send(self, tensor: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
        """Queue one upload.

        Args:
            tensor: contiguous, on the host.
            target: written; None = new memory.

        Returns:
            int64 [words], the numbers and what is behind them in the last word.
        """
        count = -(-tensor.nbytes // _WORD_BYTES)
        if not count:
            return torch.empty(0, dtype=torch.int64, device=self._device)
        buffer, size = self._buffer(count)
        buffer.numbers[: tensor.nbytes] = tensor.reshape(-1).view(torch.uint8).numpy()
        result = torch.empty(count, dtype=torch.int64, device=self._device) if target is None else _words_of(target)
        if self.mapped:
            torch.bitwise_or(buffer.words[:count], 0, out=result)  # a kernel; a copy would go to the copy engine
        else:
            result.copy_(buffer.words[:count], non_blocking=True)
        buffer.read.record(torch.cuda.current_stream(self._device))
        with self._lock:
            self._used.append((size, buffer))
        return result

    def _buffer(self, count: int) -> tuple[_PinnedBuffer, int]:
        """A buffer that no upload uses, of ``count`` words or more; and its size."""
        size = max(_LEAST_WORDS, 1 << (count - 1).bit_length())
        with self._lock:
            while self._used and self._used[0][1].read.query():
                freed, buffer = self._used.popleft()
                self._free[freed].append(buffer)
            if self._free[size]:
                return self._free[size].pop(), size
        return _PinnedBuffer(size, self._device, mapped=self.mapped), size


def _words_of(target: torch.Tensor) -> torch.Tensor:
    return target.view(-1).view(torch.int64)


_by_device: dict[torch.device, _Uploads] = {}


def prepare_uploads(device: torch.device) -> None:
    """Find out how a GPU takes small uploads, once a process; waits for it. A no-op for the CPU."""
    if device.type == "cuda":
        _uploads(device)


def kernels_read_uploads(device: torch.device) -> bool:
    """Whether small uploads to a GPU are read by a kernel; else by the copy engine, behind expert copies."""
    return _uploads(device).mapped


def _uploads(device: torch.device) -> _Uploads:
    found = _by_device.get(device)
    return _by_device.setdefault(device, _Uploads(device)) if found is None else found
