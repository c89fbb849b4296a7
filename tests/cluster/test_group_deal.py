"""Which bundle is in which group, as ranks and groups come and go: groups are always of one size, and stay where they are."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.driver.group_deal import GroupDeal, runs
from cluster.driver.scaling import Scaling
from cluster.driver.worker_pool import WorkerPool
from cluster.errors import ClusterError
from epslots.errors import ConfigError


def test_groups_grow_and_come_at_the_end():
    deal = GroupDeal(2, 2)
    assert deal.dealt == [0, 0, 1, 1]
    deal, ranks = deal.changed(6, 2)
    assert (deal.dealt, ranks, deal.size) == ([0, 0, 1, 1, 0, 1], 6, 3)
    deal, ranks = deal.changed(None, 3)
    assert (deal.dealt, ranks) == ([0, 0, 1, 1, 0, 1, 2, 2, 2], 9)
    assert [deal.group_of(bundle) for bundle in (9, 11, 12)] == [3, 3, 4], "of further groups"
    assert deal.changed(4, 2)[0].dealt == [0, 0, 1, 1]
    assert deal.changed(3, 1)[0].dealt == [0, 0, 0]


def test_one_group_takes_any_number():
    deal = GroupDeal(1, None)
    found, ranks = deal.with_size(3).changed(7, None)
    assert ranks == 7
    assert {found.group_of(bundle) for bundle in range(9)} == {0}


@pytest.mark.parametrize(
    ("ranks", "groups", "says"),
    [
        (3, None, "ranks=3; allowed: multiples of 2, the size of a group; with groups=, multiples of that"),
        (5, 2, "ranks=5, groups=2; allowed: a number of ranks that the groups divide equally"),
        (2, 2, "2 ranks in 2 groups; allowed: at least 2 ranks a group, as many as each was started with"),
        (None, None, "ranks or groups"),
    ],
)
def test_what_cannot_be_dealt_is_refused(ranks: int | None, groups: int | None, says: str):
    with pytest.raises(ConfigError, match=says):
        GroupDeal(2, 2).changed(ranks, groups)


@given(
    st.integers(2, 4),
    st.integers(1, 3),
    st.lists(st.tuples(st.one_of(st.none(), st.integers(1, 30)), st.one_of(st.none(), st.integers(1, 6))), max_size=12),
)
def test_groups_are_of_one_size_whatever_comes_and_goes(groups: int, size: int, changes: list[tuple[int | None, int | None]]):
    """And bundles that stay keep their groups."""
    deal = GroupDeal(groups, size)
    for ranks, wanted in changes:
        try:
            found, count = deal.changed(ranks, wanted)
        except ConfigError:
            continue
        assert Counter(Counter(found.dealt).values()) == {found.size: found.groups}
        assert len(found.dealt) == count == (count if ranks is None else ranks)
        assert wanted in (None, found.groups)
        stay = deal.common(found).dealt
        assert deal.dealt[: len(stay)] == found.dealt[: len(stay)] == stay
        assert len(stay) >= size, "the first group serves meanwhile"
        if found.groups >= deal.groups and found.size is not None and deal.size is not None and found.size >= deal.size:
            assert stay == deal.dealt, "nothing ends where more is wanted"
        deal = found


class DealtGroups:
    """Groups without workers."""

    def __init__(self, deal: GroupDeal) -> None:
        self.deal = deal

    def deal_by(self, deal: GroupDeal) -> None:
        self.deal = deal


def test_ranks_that_outlive_their_driver_keep_their_groups():
    """The next driver divides them as the last one did."""
    groups: Any = DealtGroups(GroupDeal(2, 1))
    scaling = Scaling(cast(WorkerPool, SimpleNamespace(size=2)), groups, outlives=True)
    with pytest.raises(ConfigError, match="2 ranks a group; allowed for a cluster whose ranks outlive their driver: 1"):
        asyncio.run(scaling.scale(4, 2))


@pytest.mark.parametrize("interruption", [asyncio.CancelledError(), ClusterError("no room")], ids=type)
def test_a_change_that_is_interrupted_is_none(interruption: BaseException):
    """The next one reserves places first, too."""
    asked: list[int] = []

    async def reserve(ranks: int) -> None:
        asked.append(ranks)
        if len(asked) == 1:
            raise interruption

    async def grow(ranks: int) -> None:
        asked.append(-ranks)

    groups: Any = DealtGroups(before := GroupDeal(2, 2))
    scaling = Scaling(cast(WorkerPool, SimpleNamespace(size=4, reserve=reserve, grow=grow)), groups, outlives=False)
    with pytest.raises(type(interruption)):
        asyncio.run(scaling.scale(6, 3))
    assert groups.deal is before
    asyncio.run(scaling.scale(6, 3))
    assert asked == [6, 6, -6] and groups.deal.groups == 3


@pytest.mark.parametrize("fails", [False, True])
def test_places_are_given_back_once_the_others_serve(fails: bool):
    """They are given back, too, if the others don't: nothing needs them any more."""
    done: list[tuple[str, int]] = []
    groups: Any = DealtGroups(GroupDeal(3, 2))

    async def note(name: str, ranks: int) -> None:
        done.append((name, ranks))
        if fails and name == "serve":
            raise ClusterError("they don't")

    pool = SimpleNamespace(
        size=6,
        shrink=lambda ranks: done.append(("shrink", ranks)),
        wait_until_serving=lambda bundles: note("serve", len(bundles) if groups.deal.groups == 2 else -1),
        reserve=lambda ranks: note("reserve", ranks),
        grow=lambda ranks: note("grow", ranks),
    )
    scaling = Scaling(cast(WorkerPool, pool), groups, outlives=False)
    with pytest.raises(ClusterError) if fails else nullcontext():
        asyncio.run(scaling.scale(None, 2))
    assert done == [("shrink", 4), ("serve", 4), ("reserve", 4), *([] if fails else [("grow", 4)])]
    assert groups.deal.dealt == [0, 0, 1, 1]


@pytest.mark.parametrize("before", [GroupDeal(1, None), GroupDeal(1, None).with_size(5)], ids=["any size", "with_size"])
def test_a_lone_group_shrinks(before: GroupDeal):
    """All that stay are its ranks, meanwhile, too."""
    done: list[tuple[str, int]] = []
    groups: Any = DealtGroups(before)

    async def note(name: str, ranks: int) -> None:
        done.append((name, ranks))
        assert {groups.deal.group_of(bundle) for bundle in range(5)} == {0} and groups.deal.groups == 1

    pool = SimpleNamespace(
        size=5,
        shrink=lambda ranks: done.append(("shrink", ranks)),
        wait_until_serving=lambda bundles: note("serve", len(bundles)),
        reserve=lambda ranks: note("reserve", ranks),
        grow=lambda ranks: note("grow", ranks),
    )
    asyncio.run(Scaling(cast(WorkerPool, pool), groups, outlives=False).scale(3, None))
    assert done == [("shrink", 3), ("serve", 3), ("reserve", 3), ("grow", 3)]


def test_runs_are_groups_that_follow_each_other():
    assert runs([0, 0, 1, 0, 2, 2]) == [(0, 2), (1, 1), (0, 1), (2, 2)]
    assert runs([]) == []


def test_a_group_that_was_alone_is_joined_by_its_like():
    """And may have any number again when it is alone again."""
    deal, ranks = GroupDeal(1, None).with_size(2).changed(None, 3)
    assert (deal.dealt, ranks, deal.size) == ([0, 0, 1, 1, 2, 2], 6, 2)
    assert deal.with_size(6).changed(4, None)[0].dealt == [0, 0, 1, 1]
    with pytest.raises(ConfigError, match="ranks=3; allowed: multiples of 2"):
        deal.changed(3, None)
    deal, ranks = deal.changed(None, 1)
    assert (deal.dealt, ranks) == ([0, 0], 2)
    common = deal.common(deal.changed(5, None)[0])
    assert (common.dealt, common.size, common.groups, common.group_of(0)) == ([], None, 1, 0)
    assert (deal.changed(5, None)[0].size, deal.changed(5, 1)[1]) == (None, 5)
    with pytest.raises(ConfigError, match="ranks or groups"):
        deal.changed(None, None)


def test_a_group_alone_that_outlives_its_driver_stays_alone():
    """The next driver expects one group, of any number of ranks."""
    grown = list[int]()

    async def note(ranks: int) -> None:
        grown.append(ranks)

    groups: Any = DealtGroups(GroupDeal(1, None))
    scaling = Scaling(cast(WorkerPool, SimpleNamespace(size=2, reserve=note, grow=note)), groups, outlives=True)
    with pytest.raises(ConfigError, match="groups=2; allowed for a cluster that was started as one group and whose ranks"):
        asyncio.run(scaling.scale(None, 2))
    asyncio.run(scaling.scale(3, None))
    assert grown == [3, 3] and groups.deal.size is None
