"""What a layer's step costs, in integer nanoseconds: the arithmetic by which ranks choose how to serve it.

Pure. The figures are measured once at the start and agreed between ranks, or given; decisions compare integers, so that all
ranks decide alike. They steer time and never results.

Legend of shape suffixes: R ranks, U experts of the layer with tokens, F fetches.
"""

from __future__ import annotations

import msgspec
import numpy as np
from msgspec.structs import astuple

from epslots.arrays import IntArray
from epslots.planner import assignment_kernels

# The costs that are 0 where the host's CPU computes no experts.
HOST_COMPUTE = ("host_expert", "host_pair")


class Costs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nanoseconds that one rank spends on each thing. All are positive, but for the last two, which may be 0 together.

    A *pair* is one (token, k): a row of the hidden size.

    Attributes:
        host_fetch: one expert from the host store into a slot.
        peer_fetch: one expert from another rank's slot into a slot.
        pair_transfer: one pair from rank to rank, one way.
        pair_compute: one pair through its expert, when there are many.
        expert_compute: what an expert adds, however few its pairs: reading its weights.
        exchange: an all-to-all of nothing.
        gather: an all-gather of nothing, and likewise a reduce-scatter.
        host_expert: what an expert takes that is computed by the host's CPU, straight from the host store, however few its
            pairs. 0 = experts aren't computed there.
        host_pair: one pair computed there; its row's way there and back included.
    """

    host_fetch: int
    peer_fetch: int
    pair_transfer: int
    pair_compute: int
    expert_compute: int
    exchange: int
    gather: int
    host_expert: int = 0
    host_pair: int = 0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            most = 2 ** (26 if "pair" in name else 40)  # 67 ms, 18 min: sums over a step stay within 64 bits
            least = 0 if name in HOST_COMPUTE else 1
            if not isinstance(value, int) or not least <= value < most:
                raise ValueError(f"{name}={value!r}: allowed: nanoseconds, an int from {least} to {most - 1}")
        if (self.host_expert == 0) != (self.host_pair == 0):
            raise ValueError(f"host_expert={self.host_expert!r}, host_pair={self.host_pair!r}: allowed: both 0, or neither")

    @property
    def computes_on_host(self) -> bool:
        """Whether the host's CPU may compute an expert."""
        return self.host_expert > 0


def layer_cost(costs: Costs, counts_RU: IntArray, computed_RU: IntArray, rank_F: IntArray, source_F: IntArray) -> int:
    """What a plan of a layer's step is judged by, in nanoseconds: its time, and what its fetches will cost later.

    Every fetch takes a slot from another expert, which somebody will have to fetch again: so the mean rank's fetches count
    once more. Arguments as ``layer_time``.
    """
    return sum(_layer_times(costs, counts_RU, computed_RU, rank_F, source_F))


def layer_time(costs: Costs, counts_RU: IntArray, computed_RU: IntArray, rank_F: IntArray, source_F: IntArray) -> int:
    """Modelled nanoseconds of a layer's step: the slowest rank's fetches and compute, and the slowest rank's exchange.

    Args:
        counts_RU: pairs of each rank's own tokens.
        computed_RU: pairs that each rank computes.
        rank_F, source_F: the fetches: target rank, and source rank or -1 for the host.
    """
    return _layer_times(costs, counts_RU, computed_RU, rank_F, source_F)[0]


def _layer_times(
    costs: Costs, counts_RU: IntArray, computed_RU: IntArray, rank_F: IntArray, source_F: IntArray
) -> tuple[int, int]:
    return assignment_kernels.layer_times(
        _plain(counts_RU), _plain(computed_RU), _plain(rank_F), _plain(source_F), astuple(costs)[:6]
    )


def compute_cost(costs: Costs, computed_RU: IntArray) -> IntArray:
    """Nanoseconds of compute, int64 [R]."""
    cost_R = np.zeros(len(computed_RU), np.int64)
    assignment_kernels.add_compute(_plain(computed_RU), costs.pair_compute, costs.expert_compute, cost_R)
    return cost_R


def moved_pairs(counts_RU: IntArray, computed_RU: IntArray) -> IntArray:
    """Pairs that each rank sends or receives, whichever is more, int64 [R]: own tokens stay as far as they can."""
    _, sent_R, received_R = travelling_pairs(counts_RU, computed_RU)
    return np.maximum(sent_R, received_R)


def travelling_pairs(counts_RU: IntArray, computed_RU: IntArray) -> tuple[int, IntArray, IntArray]:
    """The most pairs that any rank sends or receives; and those that leave each rank, and that come to it, int64 [R]."""
    sent_R, received_R = np.empty(len(counts_RU), np.int64), np.empty(len(counts_RU), np.int64)
    most = assignment_kernels.travelling(_plain(counts_RU), _plain(computed_RU), sent_R, received_R)
    return most, sent_R, received_R


def fetch_cost(costs: Costs, ranks: int, rank_F: IntArray, source_F: IntArray) -> IntArray:
    """Nanoseconds of fetching, int64 [R]: a copy between ranks keeps both busy."""
    cost_R = np.zeros(ranks, np.int64)
    assignment_kernels.add_fetches(_plain(rank_F), _plain(source_F), costs.host_fetch, costs.peer_fetch, cost_R)
    return cost_R


def _plain(array: IntArray) -> IntArray:
    return np.ascontiguousarray(array, np.int64)


def gathers(costs: Costs, most_tokens: int, moved: int, ranks: int, top_k: int) -> bool:
    """Whether to exchange by all-gather and reduce-scatter rather than by all-to-all.

    An all-to-all moves just the pairs that leave their rank. An all-gather moves every rank's tokens to every rank, and the
    reduce-scatter a result for every pair; but neither needs sizes per peer, which makes them faster to start.

    Args:
        most_tokens: tokens of the rank that has most.
        moved: pairs that the busiest rank sends or receives.
    """
    rows = (ranks - 1) * most_tokens * (1 + top_k)
    return 2 * costs.gather + rows * costs.pair_transfer < 2 * (costs.exchange + moved * costs.pair_transfer)
