"""A registry of claims and beats in memory, as Ray's head keeps it; its processes end when a test says so."""

from __future__ import annotations

from cluster.errors import ClusterError
from cluster.lasting.lease import Claim, Sight


class MemoryRegistry:
    """Claims and beats of any number of clusters.

    Attributes:
        away: every call fails, as while the head is away.
        removed: clusters whose groups were removed, with the term before which.
        dooms: ids of ranks and groups that are to be ended, by cluster.
    """

    def __init__(self) -> None:
        self.claims: dict[str, dict[int, Claim]] = {}
        self.beats: dict[tuple[str, int], bytes] = {}
        self.ended: set[str] = set()
        self.away = False
        self.removed: list[tuple[str, int]] = []
        self.dooms: dict[str, set[str]] = {}

    def _check(self) -> None:
        if self.away:
            raise ClusterError("the head is away")

    def look(self, name: str, *, at_holder: bool = True) -> Sight:
        self._check()
        claims = self.claims.get(name)
        if not claims:
            return Sight(None)
        claim = claims[max(claims)]
        return Sight(claim, self.beats.get((name, claim.term), b""), at_holder and claim.worker in self.ended)

    def put_claim(self, name: str, claim: Claim) -> bool:
        self._check()
        claims = self.claims.setdefault(name, {})
        if claim.term in claims:
            return False
        claims[claim.term] = claim
        return True

    def put_beat(self, name: str, term: int, beat: bytes) -> None:
        self._check()
        self.beats[name, term] = beat

    def doom(self, name: str, id: str) -> None:
        self._check()
        self.dooms.setdefault(name, set()).add(id)

    def remove_groups(self, name: str, before_term: int) -> None:
        self._check()
        self.removed.append((name, before_term))
