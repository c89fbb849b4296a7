"""What a layer's step costs, in integer nanoseconds: the arithmetic by which ranks choose how to serve it.

Pure. The figures are measured once at the start and agreed between ranks, or given; decisions compare integers, so that all
ranks decide alike. They steer time and never results.

Legend of shape suffixes: R ranks, U experts of the layer with tokens, F fetches.
"""

from __future__ import annotations

import msgspec
import numpy as np

from epslots.eviction import IntArray
from epslots.residency import BoolArray

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


def sources(
    holds_RU: BoolArray,
    computed_RU: IntArray,
    quota_R: IntArray,
    rank_F: IntArray,
    expert_F: IntArray,
    node_R: IntArray | None = None,
) -> IntArray:
    """For each fetch the rank whose slot it can be copied from, int64 [F], -1 = none.

    The source's slot must keep its expert throughout the step, and the target's must not have to wait for a wave: so both
    have slots enough for what they compute, and the source needs the expert itself or gives nothing up.

    Args:
        holds_RU, computed_RU: residents before the step, and pairs that each rank computes in it.
        rank_F, expert_F: the fetches: target rank, and the expert's column.
        node_R: the node of each rank, if there are several: one on the target's own comes first.
    """
    ranks = len(holds_RU)
    needed_RU = computed_RU > 0
    one_wave_R = needed_RU.sum(1) <= quota_R
    calm_R = np.count_nonzero(needed_RU & ~holds_RU, axis=1) == 0
    able_RU = holds_RU & one_wave_R[:, None] & (needed_RU | calm_R[:, None])
    able_RF = able_RU[:, expert_F] & one_wave_R[rank_F]
    # The next rank that can, going round from the target: copies of one expert to several ranks spread over its holders.
    distance_RF = (np.arange(ranks)[:, None] - rank_F) % ranks
    if node_R is not None:
        distance_RF = distance_RF + ranks * (node_R[:, None] != node_R[rank_F])
    nearest_F = np.where(able_RF, distance_RF, 2 * ranks).argmin(0)
    return np.where(able_RF[nearest_F, np.arange(len(rank_F))], nearest_F, -1)


def layer_cost(costs: Costs, counts_RU: IntArray, computed_RU: IntArray, rank_F: IntArray, source_F: IntArray) -> int:
    """What a plan of a layer's step is judged by, in nanoseconds: its time, and what its fetches will cost later.

    Every fetch takes a slot from another expert, which somebody will have to fetch again: so the mean rank's fetches count
    once more. Arguments as ``layer_time``.
    """
    later = int(fetch_cost(costs, len(counts_RU), rank_F, source_F).sum()) // len(counts_RU) if len(rank_F) else 0
    return layer_time(costs, counts_RU, computed_RU, rank_F, source_F) + later


def layer_time(costs: Costs, counts_RU: IntArray, computed_RU: IntArray, rank_F: IntArray, source_F: IntArray) -> int:
    """Modelled nanoseconds of a layer's step: the slowest rank's fetches and compute, and the slowest rank's exchange.

    Args:
        counts_RU: pairs of each rank's own tokens.
        computed_RU: pairs that each rank computes.
        rank_F, source_F: the fetches: target rank, and source rank or -1 for the host.
    """
    pairs_R = computed_RU.sum(1)
    busy_R = pairs_R * costs.pair_compute + np.count_nonzero(computed_RU, axis=1) * costs.expert_compute
    if len(rank_F):
        busy_R += fetch_cost(costs, len(busy_R), rank_F, source_F)
    moved = int((np.maximum(counts_RU.sum(1), pairs_R) - np.minimum(counts_RU, computed_RU).sum(1)).max())
    return int(busy_R.max()) + 2 * (moved * costs.pair_transfer + (costs.exchange if moved else 0))


def compute_cost(costs: Costs, computed_RU: IntArray) -> IntArray:
    """Nanoseconds of compute, int64 [R]."""
    return computed_RU.sum(1) * costs.pair_compute + np.count_nonzero(computed_RU, axis=1) * costs.expert_compute


def moved_pairs(counts_RU: IntArray, computed_RU: IntArray) -> IntArray:
    """Pairs that each rank sends or receives, whichever is more, int64 [R]: own tokens stay as far as they can."""
    own_R = np.minimum(counts_RU, computed_RU).sum(1)
    return np.maximum(counts_RU.sum(1), computed_RU.sum(1)) - own_R


def fetch_cost(costs: Costs, ranks: int, rank_F: IntArray, source_F: IntArray) -> IntArray:
    """Nanoseconds of fetching, int64 [R]: a copy between ranks keeps both busy."""
    peer = source_F >= 0
    host_R = np.bincount(rank_F[~peer], minlength=ranks)
    peer_R = np.bincount(rank_F[peer], minlength=ranks) + np.bincount(source_F[peer], minlength=ranks)
    result: IntArray = host_R * costs.host_fetch + peer_R * costs.peer_fetch
    return result


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
