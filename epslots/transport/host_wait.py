"""Waiting on the host for a device's work: awake at first, and always by looking.

A wait that blocks in the driver knows no deadline, and no other thread can end it: when a peer of the group is lost, the
device stops, and with it a host that waits for it there.
"""

from __future__ import annotations

import time
from collections.abc import Callable

HostWait = Callable[[Callable[[], bool]], None]
"""Waits until a question is answered with yes, such as ``event.query``; raises where that is given up."""

# A sleep of 20 us takes about 80: in the first millisecond a wait stays awake.
_AWAKE_S = 1e-3
_NAP_S = 20e-6


def wait_until(
    done: Callable[[], bool],
    check: Callable[[float], object] = lambda waited_s: None,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Wait until ``done()``.

    Args:
        check: called in between with the seconds so far; raises to end the wait.
        clock, sleep: ``time``'s; tests give others.
    """
    began = clock()
    while not done():
        waited_s = clock() - began
        check(waited_s)
        if waited_s > _AWAKE_S:
            sleep(_NAP_S)
