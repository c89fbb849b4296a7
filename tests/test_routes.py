"""Which pairs go where: both ends work out the same."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings

from epslots.assignment import assign
from epslots.routes import route, runs
from tests.plan_strategies import Situation, situations


@settings(max_examples=300)
@given(situations())
def test_what_one_sends_the_other_expects_and_every_pair_goes_once(situation: Situation):
    found = assign(*situation.arguments)
    counts_RU = situation.counts_RE[:, found.experts_U].astype(np.int64)
    routes = [route(counts_RU, found.computed_RU, rank) for rank in range(len(counts_RU))]
    for source, mine in enumerate(routes):
        assert mine.send_DO.sum(0).tolist() == counts_RU[source, mine.own_O].tolist()
        assert mine.receive_SC.sum(0).tolist() == found.computed_RU[source, mine.computed_C].tolist()
        assert counts_RU[source].sum() == mine.send_DO.sum()
        sent = wide(mine.send_DO, mine.own_O, counts_RU.shape)
        start = wide(mine.send_start_DO, mine.own_O, counts_RU.shape)
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


def wide(compact: np.ndarray, columns: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The same with a column for every expert."""
    full = np.zeros(shape, np.int64)
    full[:, columns] = compact
    return full


def test_runs():
    assert runs(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert runs(np.zeros(0, int), np.zeros(0, int)).tolist() == []
