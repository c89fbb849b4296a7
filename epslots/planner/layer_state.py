"""Which rank holds which experts of one layer, and where its placement wants them.

All ranks keep the same copy by applying the same plans (``layer_planner.py``). A digest of it travels in the step header
(``lockstep.py``), so ranks that disagree find out at once.

Legend of shape suffixes: R ranks, E experts of the layer.
"""

from __future__ import annotations

import numpy as np
import xxhash

from epslots.arrays import BoolArray, IntArray
from epslots.planner.evictions import spare_copies
from epslots.planner.plan import Migrations


class LayerState:
    """One layer as all ranks know it.

    Args:
        holds_RE: which rank holds which expert; kept, and changed in place.
        quota_R: slots of the layer on each rank; kept, and changed in place by ``resize``.
        home_E: the home rank of each expert.
        node_R: the node of each rank, if there are several.

    Attributes:
        wanted_RE: the copies that the placement wants, as far as slots are there for them (``fit_wanted``).
        pending_RE: those of them that have yet to be migrated; each is migrated once.
        pending_migrations: how many these are.
    """

    def __init__(self, holds_RE: BoolArray, quota_R: IntArray, home_E: IntArray, node_R: IntArray | None = None) -> None:
        self.holds_RE = holds_RE
        self.quota_R = quota_R
        self.home_E = home_E
        self.node_R = node_R
        self.wanted_RE = self.pending_RE = self._placed_RE = np.zeros(holds_RE.shape, bool)
        self.pending_migrations = 0
        self._past = xxhash.xxh3_64_intdigest(home_E.tobytes())
        self._holds_digest: int | None = None
        self._spare_RE: BoolArray | None = None
        self._idle_slots: bool | None = None
        self._holds_all: bool | None = None

    @property
    def ranks(self) -> int:
        """R."""
        return len(self.holds_RE)

    @property
    def digest(self) -> int:
        """63 bits that differ between ranks with different tables, or with other plans or placements behind them."""
        if self._holds_digest is None:
            self._holds_digest = xxhash.xxh3_64_intdigest(self.holds_RE.tobytes())
        return (self._holds_digest ^ self._past) >> 1

    @property
    def spare_RE(self) -> BoolArray:
        """Copies that may be evicted before any other: neither at home, nor the last, nor wanted."""
        if self._spare_RE is None:
            self._spare_RE = spare_copies(self.holds_RE, self.home_E, self.wanted_RE)
        return self._spare_RE

    @property
    def has_idle_slots(self) -> bool:
        """Whether any rank has a slot that is empty or holds a spare copy."""
        if self._idle_slots is None:
            held, spare = np.count_nonzero(self.holds_RE), np.count_nonzero(self.spare_RE)
            self._idle_slots = bool(self.quota_R.sum() > held - spare)
        return self._idle_slots

    @property
    def holds_all(self) -> bool:
        """Whether every expert is in a slot of some rank."""
        if self._holds_all is None:
            held = np.count_nonzero(self.holds_RE)
            self._holds_all = bool(held >= len(self.home_E) and self.holds_RE.any(0).all())
        return self._holds_all

    def follow(self, home_E: IntArray, wanted_RE: BoolArray) -> None:
        """Follow another placement from the next step on."""
        self.home_E = home_E
        self.wanted_RE = self.pending_RE = self._placed_RE = wanted_RE
        self.update_pending()
        self._spare_RE = self._idle_slots = None
        self.add_to_digest(home_E, wanted_RE)

    def update_pending(self) -> None:
        """Strike off the wanted copies that are there by now, whether migrated or fetched on demand."""
        self.pending_RE = self.pending_RE & ~self.holds_RE
        self.pending_migrations = int(np.count_nonzero(self.pending_RE))

    def resize(self, rank: int, change: int, score_E: IntArray) -> int:
        """Add a slot to a rank, or take one from it (``change`` is 1 or -1).

        Returns:
            The expert that is evicted there, -1 = none.
        """
        self.quota_R[rank] += change
        evicted = -1
        if int(np.count_nonzero(self.holds_RE[rank])) > self.quota_R[rank]:
            # Spare copies first, wanted ones last; the lowest score among equals.
            kind_E = np.where(self.spare_RE[rank], 0, np.where(self.wanted_RE[rank], 2, 1))
            order = np.lexsort((score_E, kind_E))
            evicted = int(order[self.holds_RE[rank, order]][0])
            self.holds_RE[rank, evicted] = False
        self.holds_changed()
        self.add_to_digest(np.array([rank, change, evicted]))
        return evicted

    def fit_wanted(self, score_E: IntArray) -> None:
        """Want as many of the placement's copies as a rank has slots: those with the highest scores.

        When slots are taken away, some copies are wanted no longer. When slots return, copies are wanted once more,
        beside those that still are, and migrated if they aren't there.
        """
        before_RE = self.wanted_RE
        # By rank: wanted ones, then the placement's others, then the rest; the highest score among equals.
        kind_RE = np.where(before_RE, 0, np.where(self._placed_RE, 1, 2))
        # Of equal ones the last: ``resize`` evicts the first, which is to come back.
        last_E = -np.arange(len(score_E))
        order_RE = np.lexsort([np.broadcast_to(last_E, kind_RE.shape), np.broadcast_to(-score_E, kind_RE.shape), kind_RE])
        chosen_RE = np.zeros_like(before_RE)
        np.put_along_axis(chosen_RE, order_RE, np.arange(len(score_E)) < self.quota_R[:, None], axis=1)
        self.wanted_RE = self._placed_RE & chosen_RE
        self.pending_RE = (self.pending_RE & self.wanted_RE) | (self.wanted_RE & ~before_RE)
        self.update_pending()
        self._spare_RE = self._idle_slots = None

    def replace(self, holds_RE: BoolArray) -> None:
        """Enter the residents after a step, bool [R, E]."""
        self.holds_RE[:] = holds_RE
        self.holds_changed()

    def migrate(self, migrations: Migrations) -> None:
        """Enter the residents after these migrations."""
        ranks, full = migrations.ranks, migrations.evicted >= 0
        self.holds_RE[ranks[full], migrations.evicted[full]] = False
        self.holds_RE[ranks, migrations.experts] = True
        self.holds_changed()
        self.add_to_digest(ranks, migrations.experts, migrations.evicted, migrations.sources)
        self.update_pending()

    def add_to_digest(self, *decided: IntArray | BoolArray) -> None:
        """Let the digest depend on what was decided. A rank alone has none to compare it with, and saves the time."""
        if len(self.quota_R) > 1:
            self._past = xxhash.xxh3_64_intdigest(b"".join(array.tobytes() for array in decided), seed=self._past)

    def holds_changed(self) -> None:
        """To be called after ``holds_RE`` was changed in place."""
        self._holds_digest = self._spare_RE = self._idle_slots = self._holds_all = None
