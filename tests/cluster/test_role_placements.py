"""One controller's placements for a prefill group and a decode group, whose experts have the same shares."""

from __future__ import annotations

import numpy as np

from cluster.controller.controller import Controller
from cluster.controller.group_controllers import GroupControllers
from cluster.messages.controller import Order, Rebalance, Reply, address, decode_reply, encode
from epslots.arrays import IntArray
from epslots.placement.placement import Placement, unpack
from tests.support.controller_helpers import LAYERS, explained, meeting, placement_of, told, window

SHARES = np.array([60, 60, 60, 20, 20, 20])
"""Tokens of the experts; the first three are at home on rank 0 in the beginning."""
STEPS = 100
USES = SHARES
"""Of a decode group's steps, which have few tokens. Each of a prefill group's steps uses every expert."""


def by_rank(placement: Placement, values_E: IntArray) -> list[int]:
    return [int(values_E[placement.home_LE[0] == rank].sum()) for rank in range(2)]


def test_prefill_balances_tokens_and_decode_fetches():
    """Where slots are short: prompts take as long as their tokens, decoding as long as its misses."""
    groups = GroupControllers(lambda forecast: Controller(lambda: 0.0, forecast=forecast))

    def ask(group: int, order: Order) -> Reply:
        return decode_reply(groups.answer(address(group, encode(order))))

    start = placement_of(2, slots=2)
    uses = np.tile(USES.astype("<i8"), (LAYERS, 1)).tobytes()
    prompts, decoding = window(1000 * SHARES, steps=STEPS), window(SHARES, steps=STEPS, uses=uses)
    for group, role in enumerate(("prefill", "decode")):
        ask(group, meeting(start, epoch=group, role=role))
    found = [start, start]
    for number in range(1, 6):
        for group, one in enumerate((prompts, decoding)):
            replies = [ask(group, told(number, 2, one, epoch=group)), ask(group, Rebalance())]
            for reply in replies:
                if reply.set_placement is not None:
                    found[group] = unpack(reply.set_placement.placement)
    prefill, decode = found
    misses = np.where(USES >= STEPS / 2, 0, USES * (STEPS - USES) // STEPS)  # the others stay in their slots
    assert by_rank(start, SHARES) == [180, 60] and by_rank(start, misses) == [0, 48]
    assert by_rank(prefill, SHARES) == [120, 120], "a step waits for the rank with the most tokens"
    assert max(by_rank(prefill, misses)) == 48, "which would be the slower one while it decodes"
    assert max(by_rank(decode, misses)) == 32, "a step waits for the rank with the most fetches"
    assert max(by_rank(decode, SHARES)) >= 140
    wanted_RE = decode.wanted_LRE[0]
    assert wanted_RE[:, :3].any() and not wanted_RE[:, 3:].any(), "the most used ones stay in slots: their uses are hits"
    assert [explained(groups.by_group[group]).role for group in (0, 1)] == ["prefill", "decode"]
