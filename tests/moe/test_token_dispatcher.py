"""Pairs come to the ranks that compute them, and their results back, in either way of exchange."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from epslots.moe.token_dispatcher import AllGatherDispatch, AllToAllDispatch, Dispatch
from epslots.planner.plan import NO_EXPERTS, Assignment
from epslots.planner.token_splits import token_splits
from epslots.transport.local_transport import LocalTransport
from tests.support.rank_helpers import run_threads

TOP_K = 2


@pytest.mark.parametrize("gathers", [False, True], ids=["all to all", "all gather"])
@pytest.mark.parametrize("seed", range(4))
def test_pairs_of_one_expert_spread_over_ranks_and_back(gathers: bool, seed: int):
    """Every rank computes a part of other ranks' pairs of each expert: a part begins behind those of the ranks before."""
    random = np.random.default_rng(seed)
    ids_RTK = [random.permuted(np.tile(np.arange(4), (tokens, 1)), axis=1)[:, :TOP_K] for tokens in (9, 0, 5)]
    counts_RU = np.array([np.bincount(ids_TK.ravel(), minlength=4) for ids_TK in ids_RTK])
    parts_RU = np.array([random.multinomial(pairs, [1 / 3] * 3) for pairs in counts_RU.sum(0)]).T
    work = Assignment(np.arange(4), counts_RU, parts_RU, NO_EXPERTS, NO_EXPERTS, NO_EXPERTS, 0)

    def compute(transport: LocalTransport) -> int:
        splits = token_splits(counts_RU, parts_RU, transport.rank)
        ids_N = torch.from_numpy(ids_RTK[transport.rank].ravel())
        hidden_TH = 100.0 * transport.rank + torch.arange(len(ids_N) // TOP_K * 3.0).view(-1, 3)
        routed: Dispatch
        if gathers:
            routed = AllGatherDispatch(transport, hidden_TH, ids_N, work, splits, 9, TOP_K)
        else:
            routed = AllToAllDispatch(transport, hidden_TH, ids_N, work, splits, TOP_K, agreed=False)
        assert routed.ids_M.bincount(minlength=4).tolist() == parts_RU[transport.rank].tolist()
        results_NH = routed.send_back(routed.rows_MH * (1 + routed.ids_M[:, None]))
        assert torch.equal(results_NH, hidden_TH.repeat_interleave(TOP_K, 0) * (1 + ids_N[:, None]))
        return int(splits.receive_start_SC[splits.receive_SC > 0].max(initial=0))

    assert max(run_threads(compute, 3)) > 0, "no part begins behind another"
