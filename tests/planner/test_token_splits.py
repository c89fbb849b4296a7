"""Which pairs go where: both ends work out the same."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from epslots.planner.assignment import assign
from epslots.planner.cost_model import Costs
from epslots.planner.token_splits import TokenSplits, runs, token_splits
from tests.support.plan_strategies import Situation, situations


@settings(max_examples=150, deadline=None)
@given(situations(), st.data())
def test_sent_pairs_are_expected_and_every_pair_goes_once(situation: Situation, data: st.DataObject):
    ranks = len(situation.counts_RE)
    nodes = data.draw(st.one_of(st.none(), st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks)))
    node_R = None if nodes is None else np.unique(nodes, return_inverse=True)[1]
    found = assign(*situation.arguments, node_R=node_R)
    counts_RU = situation.counts_RE[:, found.experts_U].astype(np.int64)
    routes = [token_splits(counts_RU, found.computed_RU, rank, node_R) for rank in range(len(counts_RU))]
    if node_R is not None:
        stay_on_their_nodes(counts_RU, found.computed_RU, routes, node_R)
    for source, mine in enumerate(routes):
        assert mine.send_DO.sum(0).tolist() == counts_RU[source, mine.own_columns_O].tolist()
        assert mine.receive_SC.sum(0).tolist() == found.computed_RU[source, mine.computed_C].tolist()
        assert counts_RU[source].sum() == mine.send_DO.sum()
        sent = wide(mine.send_DO, mine.own_columns_O, counts_RU.shape)
        start = wide(mine.send_start_DO, mine.own_columns_O, counts_RU.shape)
        for target, theirs in enumerate(routes):
            expected = wide(theirs.receive_SC, theirs.computed_C, counts_RU.shape)[source]
            assert sent[target].tolist() == expected.tolist()
            expected_start = wide(theirs.receive_start_SC, theirs.computed_C, counts_RU.shape)[source]
            assert start[target][expected > 0].tolist() == expected_start[expected > 0].tolist()
        # The parts of a source's pairs are its pairs, without gap or overlap.
        for column, pairs in enumerate(counts_RU[source].tolist()):
            taken = runs(start[:, column], sent[:, column])
            assert sorted(taken.tolist()) == list(range(pairs))
        own = np.minimum(counts_RU, found.computed_RU)[source]
        assert sent[source].tolist() == own.tolist(), "own tokens stay as far as they can"


def stay_on_their_nodes(counts_RU: np.ndarray, computed_RU: np.ndarray, routes: list[TokenSplits], node_R: np.ndarray) -> None:
    """As many pairs as can be are computed on their own node."""
    for node in set(node_R.tolist()):
        here = np.flatnonzero(node_R == node)
        could = np.minimum(counts_RU[here].sum(0), computed_RU[here].sum(0))
        stayed = sum(wide(routes[rank].send_DO, routes[rank].own_columns_O, counts_RU.shape)[here].sum(0) for rank in here)
        own = np.minimum(counts_RU, computed_RU)[here].sum(0)
        assert (stayed >= np.maximum(own, could)).all() and (stayed == could).all()


def test_tokens_stay_on_a_node_that_has_a_copy():
    """Both nodes hold the expert; all tokens are on ranks that don't."""
    holds_RE = np.array([[True], [False], [True], [False]])
    counts_RE = np.array([[0], [90], [0], [110]])
    costs = Costs(10**9, 10**9, 1, 1000, 1, 1, 10**6)
    node_R = np.array([0, 0, 1, 1])
    found = assign(counts_RE, holds_RE, np.ones(4, np.int64), np.zeros(1, np.int64), costs, node_R=node_R)
    assert found.computed_RU[:, 0].tolist() == [90, 0, 110, 0]
    alike = assign(counts_RE, holds_RE, np.ones(4, np.int64), np.zeros(1, np.int64), costs)
    assert alike.computed_RU[:, 0].tolist() == [100, 0, 100, 0]


def wide(compact: np.ndarray, columns: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The same with a column for every expert."""
    full = np.zeros(shape, np.int64)
    full[:, columns] = compact
    return full


def test_runs():
    assert runs(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert runs(np.zeros(0, int), np.zeros(0, int)).tolist() == []
