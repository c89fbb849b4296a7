"""The lease of a named cluster: which driver its ranks obey, and when they have none. Pure decisions; times are arguments.

claim     one process's entry that it drives the cluster's ranks, with a number; only one process can make it
term      the claim's number. Each driver that takes over claims the next one, and ranks refuse commands of older terms
beat      what the claim's holder writes every second; while it changes, the holder lives
orphan    a rank whose driver is gone: dead, silent for as long as a lease lasts, or detached
adopt     claim the next term, and serve on with the ranks as they are
doom      a rank or placement group that a driver is about to end is marked as doomed; the next driver doesn't adopt it

A paused driver is silent as a dead one is, and may go on at any place, also just before it ends a rank. So it dooms the rank,
then looks at the claims, then ends the rank; the next driver claims, then reads what is doomed, then adopts. In either order
one sees the other (Dekker's rule): the first finds the claim and leaves the rank alone, or the second finds the rank doomed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import msgspec

BEAT_S = 1.0
LEASE_S = 10.0
"""Silence after which another driver may claim the next term. Of a driver whose process has ended, Ray knows at once."""
HELD_S = LEASE_S / 2
"""A driver starts nothing if its last beat is older than this: another one may be there."""
RELEASED = b"released"
"""The last beat of a driver that has left the ranks to the next one."""


class Claim(msgspec.Struct, frozen=True):
    """One process's claim.

    Attributes:
        where: the process, for people.
        worker: Ray's id of the process, in hexadecimal.
        orphan_s: seconds that ranks wait for another driver when this one is gone.
        ends: the ranks are ending, and may not be adopted any more.
    """

    term: int
    where: str
    worker: str
    orphan_s: float = 0.0
    ends: bool = False


@dataclass(frozen=True)
class Sight:
    """The newest claim, as it was seen at one time.

    Attributes:
        claim: None if there is none.
        beat: its holder's last; empty before the first.
        dead: Ray knows that the holder's process has ended.
    """

    claim: Claim | None
    beat: bytes = b""
    dead: bool = False

    @property
    def term(self) -> int:
        """The claim's; 0 without one."""
        return 0 if self.claim is None else self.claim.term


class LeaseRegistry(Protocol):
    """Where claims and beats are kept; ``ray_registry.py`` has the meaning of each call."""

    def look(self, name: str, *, at_holder: bool = True) -> Sight: ...
    def put_claim(self, name: str, claim: Claim) -> bool: ...
    def put_beat(self, name: str, term: int, beat: bytes) -> None: ...
    def doom(self, name: str, id: str) -> None: ...
    def remove_groups(self, name: str, before_term: int) -> None: ...


class Holder(Enum):
    """The state of a claim's holder, as far as it is known."""

    UNKNOWN = "unknown"
    LIVES = "lives"
    GONE = "gone"


class LeaseWatch:
    """Judges from repeated looks whether the newest claim's holder lives.

    Attributes:
        silent_s: seconds for which no beat has come, as far as the claim could be seen.
    """

    def __init__(self, lease_s: float = LEASE_S) -> None:
        self._lease_s = lease_s
        self._seen: tuple[int, bytes] | None = None
        self._looked_s: float | None = None
        self.silent_s = 0.0

    def see(self, now_s: float, sight: Sight) -> Holder:
        """Take a look's result."""
        passed_s = 0.0 if self._looked_s is None else now_s - self._looked_s
        self._looked_s = now_s
        before, self._seen = self._seen, (sight.term, sight.beat)
        changed = before != self._seen
        self.silent_s = 0.0 if changed else self.silent_s + passed_s
        if sight.claim is None or sight.claim.ends or sight.dead or sight.beat == RELEASED or self.silent_s >= self._lease_s:
            return Holder.GONE
        return Holder.LIVES if changed and before is not None else Holder.UNKNOWN

    def miss(self) -> None:
        """A look has failed: the time until the next one isn't silence."""
        self._looked_s = None


class Fate(Enum):
    """A rank's state between drivers."""

    SERVED = "served"
    ORPHAN = "orphan"
    END = "end"


class OrphanWatch:
    """Decides when a rank is an orphan, and when it ends: after the time that its last driver has set."""

    def __init__(self) -> None:
        self._lease = LeaseWatch(LEASE_S)
        self._orphan_s = math.inf
        self._waited_s: float | None = None
        self._looked_s: float | None = None

    @property
    def doubts(self) -> bool:
        """Whether the holder missed a beat, and has to be checked."""
        return self._lease.silent_s > 0

    def see(self, now_s: float, sight: Sight) -> Fate:
        """Take a look's result."""
        passed_s = 0.0 if self._looked_s is None else now_s - self._looked_s
        self._looked_s = now_s
        holder = self._lease.see(now_s, sight)
        if sight.claim is not None:
            self._orphan_s = sight.claim.orphan_s
            if sight.claim.ends:
                return Fate.END
        if holder is Holder.LIVES:
            self._waited_s = None
        elif self._waited_s is not None:
            self._waited_s += passed_s
        elif holder is Holder.GONE:
            self._waited_s = 0.0
        if self._waited_s is None:
            return Fate.SERVED
        return Fate.END if self._waited_s >= self._orphan_s else Fate.ORPHAN

    def miss(self) -> None:
        """A look has failed: the time until the next one doesn't count."""
        self._looked_s = None
        self._lease.miss()
