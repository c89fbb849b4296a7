"""A controller's lives, by hypothesis: after any loss and any lie, versions grow, and the memory is bounded."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.messages.controller import ControllerState, Freeze, Learn, LoadReport, Rebalance, Reply
from epslots.placement.placement import carry_over, unpack
from tests.support.controller_helpers import BAD, Planner, controller, explained, meeting, placement_of, told, window


class Lives(RuleBasedStateMachine):
    """Groups form and break, controllers are lost and replaced, messages are lost, ranks tell nonsense."""

    @initialize(ranks=st.integers(1, 3))
    def begin(self, ranks: int) -> None:
        self.group = 0
        self.followed = placement_of(ranks)
        self.offered: bytes | None = None
        self.seen = -1
        """As the driver knows it."""
        self.frozen = False
        self.number = 0
        self.published: list[int] = []
        self.start_worker()

    @property
    def ranks(self) -> int:
        return self.followed.ranks

    def start_worker(self) -> None:
        self.planner = Planner()
        self.there = controller(self.planner)
        self.met = False

    def take(self, reply: Reply, *, lost: bool) -> None:
        """As the driver does; or the reply is lost with the controller."""
        if lost:
            self.start_worker()
            return
        place = reply.set_placement
        if place is not None:
            assert place.version > self.seen
            assert place.version > max(self.published, default=-1)
            assert place.bytes_per_step > 0
            placement = unpack(place.placement)
            assert placement.version == place.version
            self.published.append(place.version)
            if place.epoch == self.group:
                assert placement.ranks == self.ranks
                assert place.version > self.followed.version
                self.offered = place.placement
        self.seen = max(self.seen, reply.version)

    @rule()
    def the_controller_is_lost(self) -> None:
        self.start_worker()

    @rule()
    def introduce(self) -> None:
        meet = meeting(self.followed, epoch=self.group, published=self.seen, offered=self.offered, frozen=self.frozen)
        self.take(self.there.answer(meet), lost=False)
        self.met = True

    @rule(ranks=st.integers(1, 3), data=st.data())
    def another_group_forms(self, ranks: int, data: st.DataObject) -> None:
        kept = data.draw(st.integers(0, min(ranks, self.ranks)))
        old = [rank if rank < kept else -1 for rank in range(self.ranks)]
        self.followed = carry_over(self.followed, old, placement_of(ranks).quota_LR)
        self.offered, self.number, self.met = None, 0, False
        self.group += 1

    @precondition(lambda self: self.offered is not None)
    @rule()
    def the_ranks_follow(self) -> None:
        assert self.offered is not None
        self.followed, self.offered = unpack(self.offered), None

    @rule(frozen=st.booleans())
    def freeze(self, frozen: bool) -> None:
        self.frozen = frozen
        self.take(self.there.answer(Freeze(frozen)), lost=False)

    @rule(moves=st.booleans(), lost=st.booleans())
    def ask(self, moves: bool, lost: bool) -> None:
        self.planner.moves = moves
        self.take(self.there.answer(Rebalance()), lost=lost)

    @rule(moves=st.booleans(), pending_migrations=st.integers(0, 1), lost=st.booleans())
    def a_window(self, moves: bool, pending_migrations: int, lost: bool) -> None:
        self.number += 1
        self.planner.moves = moves
        message = window(placement=self.followed.version, pending_migrations=pending_migrations)
        reply = self.there.answer(told(self.number, self.ranks, message, epoch=self.group))
        if self.frozen or not moves or not self.met:
            assert reply.set_placement is None
        self.take(reply, lost=lost)

    @rule(data=st.data(), moves=st.booleans())
    def a_window_in_part(self, data: st.DataObject, moves: bool) -> None:
        """Of some ranks, in any order, of any of some numbers."""
        self.planner.moves = moves
        heard = data.draw(st.lists(st.tuples(st.integers(0, self.ranks - 1), st.integers(0, 9)), max_size=5))
        message = window(placement=self.followed.version)
        number = self.number
        self.number += 10
        windows = tuple(LoadReport(self.group, rank, number + ahead, message) for rank, ahead in heard)
        self.take(self.there.answer(Learn(windows, 0)), lost=False)

    @rule(bad=st.sampled_from(sorted(BAD)), data=st.data())
    def nonsense(self, bad: str, data: st.DataObject) -> None:
        if bad == "a placement that was never published":
            return
        self.number += 1
        self.planner.moves = True
        liar = data.draw(st.integers(0, self.ranks - 1))
        good = window(placement=self.followed.version)
        heard = tuple(
            LoadReport(self.group, rank, self.number, BAD[bad] if rank == liar else good) for rank in range(self.ranks)
        )
        before = explained(self.there)
        reply = self.there.answer(Learn(heard, 0))
        assert reply.set_placement is None
        after = explained(self.there)
        assert (after.placement, after.followed, after.windows) == (before.placement, before.followed, before.windows)
        assert after.refused == before.refused + self.met

    @invariant()
    def bounded(self) -> None:
        if hasattr(self, "there"):
            assert len(self.there._gathered) <= 3
            assert len(self.there._refusals) <= 8

    @invariant()
    def the_state_follows_from_what_it_knows(self) -> None:
        if not hasattr(self, "there"):
            return
        found = explained(self.there)
        if found.epoch == -1:
            assert found.state is ControllerState.WAITING
        elif self.frozen:
            assert found.state is ControllerState.FROZEN
        elif found.state is ControllerState.WATCHING:
            assert found.pending_migrations == 0


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
