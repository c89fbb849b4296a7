"""Number of CPU threads of a step on a busy machine. Other load makes a step slower by its share, and not a hundred times.

The threads of a parallel region meet at its end. Libgomp's threads wait there by spinning, for milliseconds by default, each
on a core that the last thread may need: two threads on two busy cores made a step up to 100 times slower than one thread.
So two rules:

- Threads spin briefly and then sleep (``SPIN_COUNT``). Libgomp reads that from the environment when torch loads it, so
  ``import epslots`` sets it (in vain if torch was imported before); settings of the user are left alone.
- A step of the engine uses at most as many threads as there are cores that other processes leave free (``ThreadGovernor``).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import NamedTuple

# Turns of the waiting loop, some microseconds: between operations of a step the threads stay awake on a quiet machine.
SPIN_COUNT = "1000"
# Seconds over which the load of other processes is averaged, in pieces of at least so many: systems count in hundredths.
WINDOW_S, PIECE_S = 0.5, 0.1
# A longer pause between steps ends a piece, which doesn't count.
PAUSE_S = 0.01
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
    """Sets torch's number of threads by the cores that other processes leave free. Used by the thread that makes steps.

    The load is measured while steps follow one another. Between requests it tells nothing of the next step: a process that
    waits for this one's answer, as a client or the other side of a comparison does, works just then.

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
        self._measures = self._most > 1
        self._ended_s = -math.inf
        self._since_s = 0.0
        self._before: CpuTimes | None = None
        """When the piece that is being measured began; None: none is."""
        self._measured_s = self._others_s = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within the context, a step is made. Before it, the threads are set, if enough has been measured."""
        if self._measures:
            self._adjust(self._clock())
        try:
            yield
        finally:
            if self._measures:
                self._ended_s = self._clock()

    def _adjust(self, now: float) -> None:
        if now - self._ended_s > PAUSE_S:
            self._before = None
            return
        if self._before is not None and now - self._since_s < PIECE_S:
            return
        times, before = self._read(), self._before
        if times is None or self._get() != self._current:
            self._measures = False
            return
        self._before = times
        if before is not None:
            self._others_s += max(0.0, (times.all - before.all) - (times.own - before.own))
            self._measured_s += now - self._since_s
        self._since_s = now
        if self._measured_s < WINDOW_S:
            return
        threads = threads_for(self._cores, self._others_s / self._measured_s, self._most)
        self._measured_s = self._others_s = 0.0
        if threads != self._current:
            self._set(threads)
            self._current = threads
