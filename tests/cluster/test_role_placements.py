"""What one controller makes of a prefill group's windows and of a decode group's: both have experts of the same shares."""

from __future__ import annotations

import numpy as np

from cluster.controller.controller import Controller
from cluster.controller.group_controllers import GroupControllers
from cluster.messages.controller import Order, Rebalance, Reply, address, decode_reply, encode
from epslots.arrays import IntArray
from epslots.placement.placement import Placement, unpack
from tests.support.controller_helpers import LAYERS, explained, meeting, placement_of, told, window

SHARES = np.array([90, 80, 20, 20, 20, 20])
"""Tokens of the experts; the first three are at home on rank 0 in the beginning. Two of them are hot."""
STEPS = 100
USES = np.array([90, 80, 20, 20, 20, 20])
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
    misses = np.where(USES >= STEPS / 2, 0, USES * (STEPS - USES) // STEPS)
    assert by_rank(start, SHARES) == [190, 60] and by_rank(start, misses) == [16, 48]
    assert max(by_rank(prefill, SHARES)) <= 130, "a step waits for the rank with the most tokens"
    assert by_rank(decode, misses) == [32, 32], "a step waits for the rank with the most fetches"
    assert max(by_rank(decode, SHARES)) > 150, "tokens of experts that are resident cost next to nothing there"
    assert decode.wanted_LRE[:, decode.home_LE[0, 0], 0].all(), "the most used one stays in its slot: its uses are hits"
    assert [explained(groups.by_group[group]).role for group in (0, 1)] == ["prefill", "decode"]
