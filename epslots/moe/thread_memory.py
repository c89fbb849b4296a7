"""A thread's memory for the jobs of compiled loops: a job's fields, and its workers' scratch memory. And torch's threads.

A *job* is an array of integers of 64 bits, by whose address a loop is called.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import struct
import threading
from pathlib import Path

import numpy as np
import torch

# Fields of the longest job, with those of the jobs within.
FIELDS = 192
_LINE = 64


class ThreadMemory:
    """One thread's memory. A call's contents stay there until the thread's next call.

    Attributes:
        job: address of a job's fields, at the start of a cache line.
    """

    def __init__(self) -> None:
        memory = np.zeros(FIELDS + _LINE, np.int64)
        skipped = -memory.ctypes.data % _LINE // memory.itemsize
        fields = memory[skipped : skipped + FIELDS]
        self._fields, self.job = fields.data, fields.ctypes.data
        self._scratch = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._bytes, self._address = -1, 0

    def enter(self, first: int, *fields: int) -> None:
        """Fill in a job's fields from ``first`` on. In half of the time that numpy takes for a tuple."""
        _packed(len(fields)).pack_into(self._fields, 8 * first, *fields)

    def places(self, *sizes: int) -> list[int]:
        """Addresses of memory of several sizes in bytes, each at the start of a cache line."""
        whole = [-(-size // _LINE) * _LINE for size in sizes]
        ends = itertools.accumulate(whole, initial=self.reserve(sum(whole)))
        return list(ends)[:-1]

    def reserve(self, nbytes: int) -> int:
        """The address of so many bytes, at the start of a cache line."""
        if self._bytes < nbytes:
            self._scratch, self._bytes = torch.empty(nbytes + _LINE, dtype=torch.uint8, device="cpu"), nbytes
            self._address = -(-self._scratch.data_ptr() // _LINE) * _LINE
        return self._address


@functools.cache
def _packed(count: int) -> struct.Struct:
    return struct.Struct(f"{count}q")


class _Here(threading.local):
    def __init__(self) -> None:
        self.memory = ThreadMemory()


_HERE = _Here()


def thread_memory() -> ThreadMemory:
    """This thread's memory."""
    return _HERE.memory


@functools.cache
def fork_join() -> int:
    """The address of ``GOMP_parallel`` in torch's own OpenMP, whose threads are awake between torch's operations; 0 = none."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):  # another system, or a torch without OpenMP: one thread
        return 0
