"""Number of CPU threads of a step, so that a busy machine makes it slower by its load, and not a hundred times.

The threads of a parallel region meet at its end. Libgomp's threads wait there by spinning, for milliseconds by default, each
on a core that the last thread may need: two threads on two busy cores made a step up to 100 times slower than one thread.
So two rules:

- Threads spin briefly and then sleep (``SPIN_COUNT``). Libgomp reads that from the environment when torch loads it, so
  ``import epslots`` sets it (in vain if torch was imported before); settings of the user are left alone.
- A step of the engine uses at most as many threads as there are cores that other processes leave free (``ThreadGovernor``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, MutableMapping
from typing import NamedTuple

# Turns of the waiting loop, some microseconds: between operations of a step the threads stay awake on a quiet machine.
SPIN_COUNT = "1000"
# Seconds over which the load of other processes is averaged.
WINDOW_S = 0.5
# A core that other processes use less than this share of the time takes a thread.
_FREE_CORE_LOAD = 0.15


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Make libgomp's threads spin little as they wait, unless the environment says otherwise."""
    if not environment.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT


class CpuTimes(NamedTuple):
    """Processor seconds since some fixed moment.

    Attributes:
        all: on the cores that this process may use, of all processes.
        own: of this process.
    """

    all: float
    own: float


def allowed_cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def read_cpu_times() -> CpuTimes | None:
    """Processor times until now; None where the system doesn't count them."""
    import psutil

    try:
        times = psutil.cpu_times(percpu=True)
    except (psutil.Error, OSError, NotImplementedError):
        return None
    cores = [times[core] for core in allowed_cores() if core < len(times)]
    busy = sum(core.user + core.system + getattr(core, "nice", 0.0) + getattr(core, "irq", 0.0) for core in cores)
    own = os.times()
    return CpuTimes(busy, own.user + own.system)


def threads_for(cores: int, others: float, most: int) -> int:
    """Threads for a step: one for each core that other processes leave free, at least one, at most ``most``.

    Args:
        cores: number of cores that this process may use.
        others: load of other processes on these, in cores.
    """
    return max(1, min(most, int(cores - others + _FREE_CORE_LOAD)))


class ThreadGovernor:
    """Sets torch's number of threads by the cores that other processes leave free. Called by the thread that makes steps.

    The number of threads that torch has at the start is never exceeded. A number that other code sets later stays.

    Args:
        cores: number of cores that this process may keep busy: a CPU quota stops threads beyond it in the middle of a step.
        get_threads, set_threads: torch's.
        read: reads processor times.
        clock: seconds.
    """

    def __init__(
        self,
        cores: int,
        get_threads: Callable[[], int],
        set_threads: Callable[[int], None],
        read: Callable[[], CpuTimes | None] = read_cpu_times,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._get, self._set, self._read, self._clock = get_threads, set_threads, read, clock
        given = get_threads()
        self._most = self._current = min(given, cores)
        if self._current < given:
            set_threads(self._current)
        self._cores = len(allowed_cores())
        self._since_s = clock()
        self._before = read() if self._most > 1 else None

    def adjust(self) -> None:
        """Measure the load once a window, and set the number of threads by it."""
        if self._before is None:
            return
        now = self._clock()
        seconds = now - self._since_s
        if seconds < WINDOW_S:
            return
        times = self._read()
        if times is None or self._get() != self._current:
            self._before = None
            return
        others = max(0.0, (times.all - self._before.all) - (times.own - self._before.own)) / seconds
        self._since_s, self._before = now, times
        threads = threads_for(self._cores, others, self._most)
        if threads != self._current:
            self._set(threads)
            self._current = threads
