"""Tokens to the ranks that compute them, and results back: dispatch and its return, two ways.

``AllToAllDispatch`` sends each pair's hidden state to its rank and nothing else; ``AllGatherDispatch`` gives every rank all
tokens, and adds up results of which each comes from exactly one rank, the others giving zero, so that the sum is that result.
The second needs no sizes per peer: good for a few tokens.

Nothing is sent about sizes or experts: every rank works out both from the plan.

Legend of shape suffixes: R ranks, T own tokens, K experts per token, N = T * K own pairs, M pairs computed here,
U experts with tokens, H hidden size.
"""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np
import torch

from epslots.arrays import IntArray
from epslots.compiled import compiled
from epslots.device_copy import to_device
from epslots.layout import align
from epslots.planner.cost_model import Costs, gathers
from epslots.planner.plan import Assignment, RankPlan
from epslots.planner.token_splits import TokenSplits, runs
from epslots.transport.lockstep import Gathered
from epslots.transport.transport import Transport

_ID_BYTES = 8


class Dispatch(Protocol):
    """Pairs at the rank that computes them.

    Attributes:
        rows_MH: their hidden states.
        ids_M: int64, their experts.
    """

    rows_MH: torch.Tensor
    ids_M: torch.Tensor

    def send_back(self, result_MH: torch.Tensor) -> torch.Tensor:
        """Return each pair's result to the rank whose token it is: [N, H] in the order of that rank's pairs.

        Results of pairs of ids without weights are undefined.
        """
        ...


def dispatch(
    transport: Transport,
    hidden_TH: torch.Tensor,
    ids_N: torch.Tensor,
    plan: RankPlan,
    gathered: Gathered,
    costs: Costs,
    *,
    agreed: bool,
) -> Dispatch:
    """Send own pairs to the ranks that compute them, and receive others' pairs, by the cheaper of two ways.

    Args:
        plan: in which some pairs travel.
        gathered: all ranks' counts.
        agreed: whether ranks skip the comparison of sizes, which follow from the same plan.
    """
    top_k = gathered.top_k
    most_tokens = int(gathered.counts_R.sum(1).max()) // top_k  # of a rank, identity experts' included
    work, splits = plan.assignment, plan.splits
    assert work is not None and splits is not None
    if gathers(costs, most_tokens, plan.moved, len(gathered.counts_R), top_k):
        return AllGatherDispatch(transport, hidden_TH, ids_N, work, splits, most_tokens, top_k)
    return AllToAllDispatch(transport, hidden_TH, ids_N, work, splits, top_k, agreed=agreed)


class LocalDispatch(msgspec.Struct):
    """No pair travels: every rank computes its own pairs."""

    rows_MH: torch.Tensor
    ids_M: torch.Tensor

    def send_back(self, result_MH: torch.Tensor) -> torch.Tensor:
        return result_MH


class AllToAllDispatch:
    """Each pair travels to the rank that computes it.

    Args:
        work, splits: the pairs of all ranks, and those that this rank sends and receives.
        top_k: K, also on a rank without tokens.
        agreed: whether ranks skip the comparison of sizes, which follow from the same plan.
    """

    def __init__(
        self,
        transport: Transport,
        hidden_TH: torch.Tensor,
        ids_N: torch.Tensor,
        work: Assignment,
        splits: TokenSplits,
        top_k: int,
        *,
        agreed: bool,
    ) -> None:
        self._transport = transport
        self._agreed = agreed
        self._pairs = ids_N.shape[0]
        self._send = splits.send_DO.sum(1).tolist()
        self._receive = splits.receive_SC.sum(1).tolist()
        # Own pairs sorted by expert are runs, of which each rank gets a part.
        counts_O = work.counts_RU[transport.rank, splits.own_columns_O]
        begin_DO = counts_O.cumsum() - counts_O + splits.send_start_DO
        picked = to_device(runs(begin_DO.ravel(), splits.send_DO.ravel()), hidden_TH.device)
        self._order = torch.argsort(ids_N, stable=True)[picked]
        rows = hidden_TH[self._order // top_k]
        self.rows_MH = transport.all_to_all(rows, self._send, self._receive, agreed=agreed)
        self.ids_M = to_device(_arriving_ids(work, splits), hidden_TH.device)

    def send_back(self, result_MH: torch.Tensor) -> torch.Tensor:
        rows = self._transport.all_to_all(result_MH, self._receive, self._send, agreed=self._agreed)
        return rows.new_empty(self._pairs, rows.shape[1]).index_copy_(0, self._order, rows)


class AllGatherDispatch:
    """All tokens to every rank.

    Args:
        work, splits: the pairs of all ranks, and those that this rank sends and receives.
        most_tokens: tokens of the rank that has most.
        top_k: K, also on a rank without tokens.
    """

    def __init__(
        self,
        transport: Transport,
        hidden_TH: torch.Tensor,
        ids_N: torch.Tensor,
        work: Assignment,
        splits: TokenSplits,
        most_tokens: int,
        top_k: int,
    ) -> None:
        self._transport = transport
        self._pairs = ids_N.shape[0]
        self._block = most_tokens * top_k
        tokens, width = hidden_TH.shape
        # One collective for both: a token's row is its hidden state, then its ids, as bytes.
        state_bytes = width * hidden_TH.element_size()
        ids_at = align(state_bytes, _ID_BYTES)
        block = torch.zeros(most_tokens, ids_at + top_k * _ID_BYTES, dtype=torch.uint8, device=hidden_TH.device)
        block[:tokens, :state_bytes] = hidden_TH.contiguous().view(torch.uint8)
        ids_TK = block[:, ids_at:].view(torch.int64)
        ids_TK.fill_(torch.iinfo(torch.int64).max)  # padding sorts last
        ids_TK[:tokens] = ids_N.view(tokens, top_k)
        blocks = transport.all_gather(block)
        order = torch.argsort(blocks[:, :, ids_at:].view(torch.int64).flatten(), stable=True)
        self._order = order[to_device(_places_among_all(work, splits), hidden_TH.device)]
        states = blocks.flatten(0, 1)[:, :state_bytes].view(hidden_TH.dtype)
        self.rows_MH = states[self._order // top_k]
        self.ids_M = to_device(_arriving_ids(work, splits), hidden_TH.device)

    def send_back(self, result_MH: torch.Tensor) -> torch.Tensor:
        ranks = self._transport.size
        blocks = result_MH.new_zeros(ranks * self._block, result_MH.shape[1]).index_copy_(0, self._order, result_MH)
        return self._transport.reduce_scatter(blocks.view(ranks, self._block, -1))[: self._pairs]


def _places_among_all(work: Assignment, splits: TokenSplits) -> IntArray:
    """The places of the pairs that are computed here among all ranks' pairs, which are sorted by expert, then by source."""
    counts_RU = work.counts_RU
    ends_UR = counts_RU.T.ravel().cumsum().reshape(counts_RU.T.shape)
    begin_SC = (ends_UR.T - counts_RU)[:, splits.computed_C] + splits.receive_start_SC
    return runs(begin_SC.ravel(), splits.receive_SC.ravel())


def _arriving_ids(work: Assignment, splits: TokenSplits) -> IntArray:
    """The expert of each pair that arrives: sources one after another, experts in order within each."""
    return _repeated(work.experts_U[splits.computed_C], splits.receive_SC)


@compiled("int64[::1](int64[::1], int64[:, ::1])")
def _repeated(experts_C: IntArray, pairs_SC: IntArray) -> IntArray:
    total = 0
    for pairs_C in pairs_SC:
        for pairs in pairs_C:
            total += pairs
    ids_M, place = np.empty(total, np.int64), 0
    for pairs_C in pairs_SC:
        for column, expert in enumerate(experts_C):
            for _ in range(pairs_C[column]):
                ids_M[place] = expert
                place += 1
    return ids_M
