"""The cost of a layer's step, in integer nanoseconds: the arithmetic by which ranks choose how to serve it.

Read ``Costs`` first, then ``layer_times``, by which ``assignment_kernels.py`` compares plans. The figures are
measured at the start and agreed between ranks (``group/cost_probe.py``), or given by the user. Decisions compare integers, so
that all ranks decide alike. Costs steer time, never results.

Pure. Legend of shape suffixes: R ranks, U experts of the layer with tokens, F fetches.
"""

from __future__ import annotations

import msgspec
import numpy as np
from msgspec.structs import astuple

from epslots.arrays import IntArray
from epslots.compiled import compiled

# The costs that are 0 where the host's CPU computes no experts.
HOST_COMPUTE = ("host_expert", "host_pair")


class Costs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nanoseconds that one rank spends on each operation. All are positive; the last two may both be 0.

    A *pair* is one (token, k): a row of the hidden size.

    Attributes:
        host_fetch: one expert from the host store into a slot.
        peer_fetch: one expert from another rank's slot into a slot.
        pair_transfer: one pair from rank to rank, one way.
        pair_compute: one pair through its expert, when there are many.
        expert_compute: an expert's fixed part, however few its pairs: reading its weights.
        exchange: an empty all-to-all.
        gather: an empty all-gather; a reduce-scatter costs the same.
        host_expert: the fixed part of an expert that the host's CPU computes, straight from the host store. 0 = the CPU
            computes no experts.
        host_pair: one pair computed by the CPU, its row's way there and back included.
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


def layer_time(costs: Costs, counts_RU: IntArray, computed_RU: IntArray, rank_F: IntArray, source_F: IntArray) -> int:
    """Modelled nanoseconds of a layer's step: the slowest rank's fetches and compute, and the slowest rank's exchange.

    Args:
        counts_RU: pairs of each rank's own tokens.
        computed_RU: pairs that each rank computes.
        rank_F, source_F: the fetches: target rank, and source rank or -1 for the host.
    """
    prices = astuple(costs)[:6]
    return layer_times(_int64(counts_RU), _int64(computed_RU), _int64(rank_F), _int64(source_F), prices)[0]


def compute_cost(costs: Costs, computed_RU: IntArray) -> IntArray:
    """Nanoseconds of each rank's compute, int64 [R]."""
    cost_R = np.zeros(len(computed_RU), np.int64)
    add_compute(_int64(computed_RU), costs.pair_compute, costs.expert_compute, cost_R)
    return cost_R


def fetch_cost(costs: Costs, ranks: int, rank_F: IntArray, source_F: IntArray) -> IntArray:
    """Nanoseconds of each rank's fetches, int64 [R]; a copy between ranks keeps both busy."""
    cost_R = np.zeros(ranks, np.int64)
    add_fetches(_int64(rank_F), _int64(source_F), costs.host_fetch, costs.peer_fetch, cost_R)
    return cost_R


def moved_pairs(counts_RU: IntArray, computed_RU: IntArray) -> IntArray:
    """Pairs that each rank sends or receives, the larger of the two, int64 [R]. As many own pairs as possible stay."""
    _, sent_R, received_R = travelling_pairs(counts_RU, computed_RU)
    return np.maximum(sent_R, received_R)


def travelling_pairs(counts_RU: IntArray, computed_RU: IntArray) -> tuple[int, IntArray, IntArray]:
    """The most pairs that any rank sends or receives, and those of each rank.

    The pairs that each rank sends, and that it receives, are int64 [R].
    """
    sent_R, received_R = np.empty(len(counts_RU), np.int64), np.empty(len(counts_RU), np.int64)
    most = count_travelling(_int64(counts_RU), _int64(computed_RU), sent_R, received_R)
    return most, sent_R, received_R


def gathers(costs: Costs, most_tokens: int, moved: int, ranks: int, top_k: int) -> bool:
    """Whether an all-gather and a reduce-scatter cost less than two all-to-alls.

    An all-to-all moves only the pairs that leave their rank. An all-gather moves every rank's tokens to every rank, and the
    reduce-scatter one result for every pair; but neither needs sizes per peer, so that they start faster.

    Args:
        most_tokens: tokens of the rank that has most.
        moved: pairs that the busiest rank sends or receives.
    """
    rows = (ranks - 1) * most_tokens * (1 + top_k)
    return 2 * costs.gather + rows * costs.pair_transfer < 2 * (costs.exchange + moved * costs.pair_transfer)


def _int64(array: IntArray) -> IntArray:
    return np.ascontiguousarray(array, np.int64)


@compiled("void(int64[:, ::1], int64, int64, int64[::1])")
def add_compute(computed_RU: IntArray, pair_compute: int, expert_compute: int, cost_R: IntArray) -> None:
    """Add the nanoseconds of each rank's compute to ``cost_R``."""
    for rank in range(len(computed_RU)):
        pairs = experts = 0
        for computed in computed_RU[rank]:
            pairs += computed
            experts += computed > 0
        cost_R[rank] += pairs * pair_compute + experts * expert_compute


@compiled("void(int64[::1], int64[::1], int64, int64, int64[::1])")
def add_fetches(rank_F: IntArray, source_F: IntArray, host_fetch: int, peer_fetch: int, cost_R: IntArray) -> None:
    """Add the nanoseconds of each rank's fetches to ``cost_R``; a copy between ranks keeps both busy."""
    for fetch in range(len(rank_F)):
        rank, source = rank_F[fetch], source_F[fetch]
        if source < 0:
            cost_R[rank] += host_fetch
        else:
            cost_R[rank] += peer_fetch
            cost_R[source] += peer_fetch


@compiled("int64(int64[:, ::1], int64[:, ::1], int64[::1], int64[::1])")
def count_travelling(counts_RU: IntArray, computed_RU: IntArray, sent_R: IntArray, received_R: IntArray) -> int:
    """Enter the pairs that each rank sends and receives; returns the most that any rank sends or receives."""
    ranks, experts = counts_RU.shape
    most = 0
    for rank in range(ranks):
        sent = received = 0
        for expert in range(experts):
            surplus = counts_RU[rank, expert] - computed_RU[rank, expert]
            sent += max(surplus, 0)
            received += max(-surplus, 0)
        sent_R[rank], received_R[rank] = sent, received
        most = max(most, sent, received)
    return most


@compiled("UniTuple(int64, 2)(int64[:, ::1], int64[:, ::1], int64[::1], int64[::1], UniTuple(int64, 6))")
def layer_times(
    counts_RU: IntArray,
    computed_RU: IntArray,
    rank_F: IntArray,
    source_F: IntArray,
    prices: tuple[int, int, int, int, int, int],
) -> tuple[int, int]:
    """A step's nanoseconds (``layer_time``), and those of the mean rank's fetches.

    Plans are compared by the sum: every fetch takes a slot from an expert that will have to be fetched again later.

    Args:
        prices: the first six fields of ``Costs``.
    """
    host_fetch, peer_fetch, pair_transfer, pair_compute, expert_compute, exchange = prices
    ranks = len(counts_RU)
    busy_R, sent_R, received_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    add_fetches(rank_F, source_F, host_fetch, peer_fetch, busy_R)
    fetching = busy_R.sum()
    add_compute(computed_RU, pair_compute, expert_compute, busy_R)
    moved = count_travelling(counts_RU, computed_RU, sent_R, received_R)
    return busy_R.max() + 2 * (moved * pair_transfer + (exchange if moved else 0)), fetching // ranks
