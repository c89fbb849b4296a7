"""The controller's decisions: it learns, refuses and publishes, and its versions only grow."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from cluster.controller.controller import OVERDUE, SHARE
from cluster.controller.group_controllers import GroupControllers
from cluster.messages.controller import (
    ControllerState,
    Explain,
    Freeze,
    Learn,
    LoadReport,
    Order,
    Rebalance,
    Reply,
    address,
    decode_order,
    decode_reply,
    encode,
)
from epslots.errors import ConfigError
from epslots.placement.placement import carry_over, pack, unpack
from tests.support.controller_helpers import (
    BAD,
    COSTS,
    EXPERTS,
    LAYERS,
    Planner,
    controller,
    explained,
    meeting,
    placement_of,
    steady,
    told,
    window,
)

SKEWED = (400, 100, 40, 20, 10, 10)


def test_it_waits_for_a_group():
    there = controller(Planner(moves=True))
    assert there.state is ControllerState.WAITING
    assert there.answer(told(1, 2)).set_placement is None
    assert there.answer(Rebalance()).set_placement is None
    assert explained(there).epoch == -1
    assert there.answer(meeting(placement_of(2))).state is ControllerState.WATCHING


def test_what_pays_is_published_and_then_moved_to():
    planner = Planner()
    there = controller(planner)
    there.answer(meeting(placement_of(2, version=4), epoch=7))
    assert there.answer(told(1, 2, window(placement=4), epoch=7)).set_placement is None
    assert len(planner.asked) == 1
    planner.moves = True
    reply = there.answer(told(2, 2, window(placement=4), epoch=7))
    place = reply.set_placement
    assert place is not None
    assert (place.epoch, place.version, reply.version) == (7, 5, 5)
    published = unpack(place.placement)
    assert published.version == 5
    assert (published.home_LE == (placement_of(2).home_LE + 1) % 2).all()
    assert reply.state is ControllerState.MOVING
    assert there.answer(told(3, 2, window(placement=4), epoch=7)).state is ControllerState.MOVING  # not followed
    assert (
        there.answer(told(4, 2, window(placement=5, pending_migrations=2), epoch=7)).state is ControllerState.MOVING
    )  # not there
    planner.moves = False
    assert there.answer(told(5, 2, window(placement=5), epoch=7)).state is ControllerState.WATCHING


def test_one_rank_that_does_not_follow_is_waited_for():
    there = controller(Planner(moves=True))
    there.answer(meeting(placement_of(2)))
    assert there.answer(told(1, 2)).set_placement is not None
    mixed = Learn((LoadReport(0, 0, 2, window(placement=1)), LoadReport(0, 1, 2, window(placement=0))), 0)
    assert there.answer(mixed).state is ControllerState.MOVING
    assert explained(there).followed == 0


def test_on_the_way_nothing_is_published_until_it_is_overdue():
    there = controller(Planner(moves=True))
    there.answer(meeting(placement_of(2)))
    replies = steady(there, 2, 0, range(1, OVERDUE + 4))
    assert [reply.set_placement is not None for reply in replies] == [True, *[False] * OVERDUE, True, False]
    assert [reply.set_placement.version for reply in replies if reply.set_placement] == [1, 2]


def test_windows_count_when_all_ranks_have_told_and_only_once():
    planner = Planner()
    there = controller(planner)
    there.answer(meeting(placement_of(3)))
    for rank in (2, 0):
        assert there.answer(Learn((LoadReport(0, rank, 1, window()),), 0)).set_placement is None
    assert not planner.asked
    there.answer(Learn((LoadReport(0, 1, 1, window()),), 0))
    assert len(planner.asked) == 1
    assert (planner.asked[0][1].tokens_LE == 3 * 8).all()  # of all ranks
    there.answer(told(1, 3))  # again, as a whole
    assert len(planner.asked) == 1
    assert explained(there).windows == 1


def test_slow_ranks_are_planned_for_and_explained():
    planner = Planner()
    there = controller(planner)
    there.answer(meeting(placement_of(3), role="decode"))
    seconds = (0.1, 0.3, 0.1)
    windows = [window(compute_s=(each, 0.0, 0.0)) for each in seconds]
    reply = there.answer(Learn(tuple(LoadReport(0, rank, 1, one) for rank, one in enumerate(windows)), 0))
    assert reply.speeds == (1000, 333, 1000)
    assert planner.asked[0][2].speed_R.tolist() == [1000, 333, 1000]
    found = explained(there)
    assert (found.speeds, found.role, found.pooled) == ((1000, 333, 1000), "decode", 1)
    assert "speeds of the ranks, usual = 1: 1.00, 0.33, 1.00" in str(found)
    assert "epoch 0, role decode" in str(found)


def test_groups_of_a_role_learn_together():
    """Each from the windows of all, at any epochs of the others; and other roles apart."""
    planner = Planner()
    groups = GroupControllers(lambda forecast: controller(planner, forecast=forecast))

    def ask(group: int, order: Order) -> Reply:
        return decode_reply(groups.answer(address(group, encode(order))))

    for group, role in enumerate(("prefill", "decode", "decode")):
        ask(group, meeting(placement_of(2), epoch=group, role=role))
    for number in (1, 2, 3):
        for group, hot in enumerate(((90, 2, 2, 2, 2, 2), (2, 90, 2, 2, 2, 2), (2, 2, 90, 2, 2, 2))):
            ask(group, told(number, 2, window(hot), epoch=group))
    prefill, first, second = (expected.tokens_LE[0] for _, expected, *_ in planner.asked[-3:])
    assert prefill[0] > 150 and max(prefill[1:]) < 10
    assert first[1] > 40 and first[2] > 40 and second[1] > 40, "half of the windows are the other one's"
    assert [explained(groups.by_group[group]).pooled for group in range(3)] == [1, 2, 2]


def test_windows_that_a_rank_left_out_are_given_up():
    planner = Planner()
    there = controller(planner)
    there.answer(meeting(placement_of(2)))
    there.answer(Learn((LoadReport(0, 0, 1, window()), LoadReport(0, 0, 2, window()), LoadReport(0, 1, 2, window())), 3))
    assert len(planner.asked) == 1
    found = explained(there)
    assert (found.windows, found.incomplete, found.dropped) == (1, 1, 3)
    there.answer(Learn((LoadReport(0, 1, 1, window()),), 0))  # late
    found = explained(there)
    assert (found.windows, found.incomplete) == (1, 1)


def test_what_is_gathered_is_bounded_whatever_the_numbers():
    there = controller(Planner())
    there.answer(meeting(placement_of(2)))
    for number in range(10**9, 10**9 + 50):
        there.answer(Learn((LoadReport(0, 1, number, window()),), 0))
    assert len(there._gathered) <= 3
    assert explained(there).incomplete >= 47
    there.answer(told(1, 2))  # and the others' go on
    assert explained(there).windows == 1


def test_windows_of_another_group_are_left_out():
    planner = Planner(moves=True)
    there = controller(planner)
    there.answer(meeting(placement_of(2), epoch=3))
    assert there.answer(told(1, 2, epoch=2)).set_placement is None
    assert not planner.asked


def test_a_window_in_which_nothing_happened_teaches_nothing():
    planner = Planner(moves=True)
    there = controller(planner)
    there.answer(meeting(placement_of(2)))
    assert there.answer(told(1, 2, window((0,) * EXPERTS, steps=0))).set_placement is None
    assert not planner.asked


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_what_can_not_be_true_is_refused_and_the_placement_stays(bad: bytes):
    planner = Planner(moves=True)
    there = controller(planner)
    there.answer(meeting(placement_of(2)))
    before = explained(there)
    reply = there.answer(Learn((LoadReport(0, 0, 1, bad), LoadReport(0, 1, 1, window())), 0))
    assert reply.set_placement is None
    assert not planner.asked
    found = explained(there)
    assert found.refused == 1
    assert found.refusals[0].startswith("window 1 of rank 0: ")
    assert (found.placement, found.followed, found.state) == (before.placement, before.followed, before.state)
    assert there.answer(told(2, 2)).set_placement is not None  # good ones are believed as before


def test_a_rank_that_is_not_there_and_one_that_tells_twice():
    there = controller(Planner(moves=True))
    there.answer(meeting(placement_of(2)))
    for rank in (-1, 2, 10**9):
        there.answer(Learn((LoadReport(0, rank, 1, window()),), 0))
    there.answer(Learn((LoadReport(0, 0, 1, window()), LoadReport(0, 0, 1, window())), 0))
    found = explained(there)
    assert found.refused == 4
    assert "allowed: ranks 0 to 1" in found.refusals[0]
    assert "it was reported twice" in found.refusals[3]


def test_refusals_are_counted_and_the_last_ones_kept():
    there = controller(Planner())
    there.answer(meeting(placement_of(1)))
    for number in range(1, 101):
        there.answer(told(number, 1, b"\xc1"))
    found = explained(there)
    assert found.refused == 100
    assert [reason.split(":")[0] for reason in found.refusals] == [f"window {n} of rank 0" for n in range(93, 101)]
    assert "refused: window 100 of rank 0" in str(found)


def test_frozen_it_learns_and_publishes_nothing_unasked():
    planner = Planner(moves=True)
    there = controller(planner)
    there.answer(meeting(placement_of(2), frozen=True))
    assert there.state is ControllerState.FROZEN
    assert not any(reply.set_placement for reply in steady(there, 2, 0, range(1, 9)))
    assert explained(there).windows == 8
    asked = there.answer(Rebalance())
    assert asked.set_placement is not None
    assert asked.explanation is not None
    assert asked.explanation.published is not None
    assert asked.explanation.published.asked
    assert there.state is ControllerState.FROZEN
    there.answer(Freeze(False))
    assert there.state is ControllerState.MOVING
    there.answer(Freeze(True))
    assert there.state is ControllerState.FROZEN


def test_asked_it_counts_any_gain():
    """The same numbers that are not worth a move by themselves: what they are worth for long is."""
    there = controller()
    there.answer(meeting(placement_of(2, slots=EXPERTS), epoch=0))
    first = there.answer(told(1, 2, window((3, 0, 0, 0, 0, 1), steps=3)))
    assert first.set_placement is None
    found = explained(there)
    assert found.latest is not None
    assert found.latest.kept
    assert not found.latest.asked
    asked = there.answer(Rebalance())
    assert asked.set_placement is not None
    assert asked.explanation is not None
    published = asked.explanation.published
    assert published is not None
    assert published.balance_then > published.balance_now
    assert 0 < published.gain_s < published.migration_s  # as believed, it would not pay


def test_nothing_to_plan_from():
    planner = Planner(moves=True)
    there = controller(planner)
    there.answer(meeting(placement_of(2)))
    reply = there.answer(Rebalance())
    assert reply.set_placement is None
    assert reply.explanation is not None
    assert reply.explanation.latest is None
    assert not planner.asked


def test_a_new_one_goes_on_where_the_last_one_was():
    there = controller(Planner(moves=True))
    # Ranks follow 3; they were told of 5, which the last one had published as its last.
    there.answer(meeting(placement_of(2, version=3), published=5, offered=pack(placement_of(2, version=5))))
    assert there.state is ControllerState.MOVING
    assert explained(there).followed == 3
    replies = steady(there, 2, 5, [1])
    assert replies[0].set_placement is not None
    assert replies[0].set_placement.version == 6


def test_versions_that_were_published_to_no_rank_are_not_reused():
    """Placements 4 and 5 were on their way when the group broke, and its ranks carried 3 over as 4."""
    there = controller(Planner(moves=True))
    there.answer(meeting(placement_of(2, version=4), epoch=1, published=5))
    place = there.answer(told(1, 2, window(placement=4), epoch=1)).set_placement
    assert place is not None
    assert place.version == 6


def test_a_group_that_has_carried_its_placement_over():
    planner = Planner(moves=True)
    there = controller(planner)
    there.answer(meeting(placement_of(2)))
    assert there.answer(told(1, 2)).set_placement is not None  # 1, which reaches no rank: the group breaks
    carried = carry_over(placement_of(2), [0, -1, 1][:2], placement_of(3).quota_LR)
    reply = there.answer(meeting(carried, epoch=1))
    assert carried.version == 1
    assert reply.state is ControllerState.WATCHING
    place = there.answer(told(1, 3, window(placement=1), epoch=1)).set_placement
    assert place is not None
    assert place.version == 2
    assert unpack(place.placement).ranks == 3
    assert explained(there).windows == 2  # what was learned of the traffic stays


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"placement": b"none"}, "this is no placement"),
        ({"nodes": ("a",)}, "a group of 1 ranks"),
        ({"pools": (0,)}, "one number for each of 3 layers"),
        ({"expert_bytes": (0, 1, 1)}, "one number for each of 3 layers"),
    ],
)
def test_a_survey_that_can_not_be(changes: dict[str, Any], said: str):
    meet = meeting(placement_of(2))
    bad = msgspec.structs.replace(meet, group=msgspec.structs.replace(meet.group, **changes))
    with pytest.raises(ConfigError, match=said):
        controller().answer(bad)


@pytest.mark.parametrize("seconds", [1e-6, 0.5, 40.0])
def test_fetching_takes_its_share_of_a_step(seconds: float):
    there = controller(Planner(moves=True))
    there.answer(meeting(placement_of(2)))
    place = there.answer(told(1, 2, window(seconds=seconds, steps=10))).set_placement
    assert place is not None
    fetching_s = place.bytes_per_step / 1000 * COSTS.host_fetch / 1e9
    byte_s = COSTS.host_fetch / 1000 / 1e9
    assert abs(fetching_s - SHARE * seconds / 10) <= byte_s
    assert explained(there).bytes_per_step == place.bytes_per_step


def test_uneven_traffic_is_levelled_once_and_then_kept():
    """With the planner itself: a placement that pays is found within some windows, and none follows while nothing changes."""
    there = controller()
    there.answer(meeting(placement_of(2)))
    version, published = 0, []
    for number in range(1, 21):
        place = there.answer(told(number, 2, window(SKEWED, steps=10, seconds=5.0, placement=version))).set_placement
        if place is not None:
            version = place.version
            published.append(number)
    assert published
    assert published[-1] <= 10
    found = explained(there)
    assert found.published is not None
    assert found.published.balance_then > found.published.balance_now
    assert found.published.gain_s > found.published.migration_s
    assert found.latest is not None
    assert found.latest.kept
    assert found.latest.placement == version
    assert found.state is ControllerState.WATCHING


def test_slots_follow_measured_need_within_a_pool_and_a_rank():
    """A layer that cycles through its experts needs them all; another uses one again and again."""
    planner = Planner(moves=True)
    there = controller(planner)
    meet = meeting(placement_of(2, slots=2))
    there.answer(msgspec.structs.replace(meet, group=msgspec.structs.replace(meet.group, pools=(0, 0, 1))))
    reuse = np.zeros((LAYERS, EXPERTS + 1), "<i8")
    reuse[0, 0] = 100_000
    reuse[1, EXPERTS - 1] = 100_000
    reuse[2, EXPERTS - 1] = 100_000
    place = there.answer(told(1, 2, window(reuse=reuse.tobytes()))).set_placement
    assert place is not None
    quota_LR = unpack(place.placement).quota_LR
    assert (quota_LR[:2].sum(0) == 4).all()
    assert (quota_LR[2] == 2).all()  # alone in its pool
    assert quota_LR[1].sum() == 6
    assert planner.asked[0][3] is not None


def test_orders_and_replies_cross_as_bytes():
    planner = Planner(moves=True)
    there = controller(planner)
    for order in (meeting(placement_of(2)), told(1, 2), Explain(), Rebalance(), Freeze(True)):
        assert decode_order(encode(order)) == order
        reply = there.answer(order)
        assert decode_reply(encode(reply)) == reply


def test_the_explanation_is_text_too():
    there = controller(Planner(moves=True))
    there.answer(meeting(placement_of(2)))
    there.answer(told(1, 2))
    text = str(explained(there))
    assert "moving: placement 1, followed by all ranks: 0, copies and slots to move: 5" in text
    assert "published: by itself: placement 1; balance 0.750 -> 0.875, saves 3e+06 us" in text
    assert "for 1e+06 us of moving 5 copies" in text
