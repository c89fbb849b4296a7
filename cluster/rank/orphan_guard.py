"""``OrphanGuard``: a thread that ends its rank when no driver comes in time."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from cluster.lasting.descriptions import Lasting
from cluster.lasting.lease import Claim, Fate, LeaseRegistry, OrphanWatch, Sight

logger = logging.getLogger("epslots.cluster")

_LOOK_EVERY_S = 2.0
_LOOKS = 4  # at least, while an orphan waits
_LEAST_S = 0.1
_END_S = 10.0  # for Ray to end this process, before it ends itself


class OrphanGuard:
    """Looks at the cluster's lease until the rank ends.

    The first orphan whose time is over claims the next term, so that no driver adopts ranks that are ending.

    Args:
        where: this process, for people.
        worker: Ray's id of it.
        on_orphan: called once whenever the rank becomes an orphan.
        clock: seconds, from any origin.
    """

    def __init__(
        self,
        lasting: Lasting,
        registry: LeaseRegistry,
        *,
        where: str,
        worker: str,
        on_orphan: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lasting, self._registry, self._clock = lasting, registry, clock
        self._where, self._worker, self._on_orphan = where, worker, on_orphan
        self._watch = OrphanWatch()
        self._every_s = _LOOK_EVERY_S
        self._fate = Fate.SERVED

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="epslots-orphan", daemon=True).start()

    def _run(self) -> None:
        never = threading.Event()
        while not self.look():
            never.wait(self._every_s)
        never.wait(_END_S)
        os._exit(0)

    def look(self) -> bool:
        """Look once; returns True when the rank is to end, and its placement group is removed."""
        try:
            sight = self._registry.look(self._lasting.name, at_holder=self._watch.doubts or self._fate is Fate.ORPHAN)
            if sight.claim is not None:
                self._every_s = min(_LOOK_EVERY_S, max(_LEAST_S, sight.claim.orphan_s / _LOOKS))
            before, self._fate = self._fate, self._watch.see(self._clock(), sight)
            if self._fate is Fate.ORPHAN and before is Fate.SERVED:
                self._on_orphan()
            return self._fate is Fate.END and self._end(sight)
        except Exception:  # Ray documents no list of errors; the head may be away for a while
            self._watch.miss()
            return False

    def _end(self, sight: Sight) -> bool:
        """End the cluster's ranks, unless a driver has come just now."""
        if sight.claim is not None and sight.claim.ends:
            term = sight.claim.term
        else:
            term = sight.term + 1
            if not self._registry.put_claim(self._lasting.name, Claim(term, self._where, self._worker, ends=True)):
                return False
        logger.warning("the ranks of %r end: no driver has adopted them", self._lasting.name)
        self._registry.remove_groups(self._lasting.name, term)
        return True
