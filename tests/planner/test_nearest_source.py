"""Fetches and migrations copy an expert from the next holder in cyclic order, on the target's own node if there is one."""

from __future__ import annotations

import numpy as np
import pytest

from epslots.planner.nearest_source import nearest_sources


@pytest.mark.parametrize("seed", range(20))
def test_a_source_is_the_next_one_after_the_target(seed: int):
    random = np.random.default_rng(seed)
    size = int(random.integers(1, 9))
    keeps_RE, node_R = random.random((size, 6)) < 0.4, random.integers(0, 3, size)
    ranks, experts = (np.ascontiguousarray(found) for found in np.nonzero(~keeps_RE))
    for nodes in (None, node_R):
        found = nearest_sources(keeps_RE, ranks, experts, nodes)
        for target, expert, source in zip(ranks.tolist(), experts.tolist(), found.tolist(), strict=True):
            holders = [(target + step) % size for step in range(1, size) if keeps_RE[(target + step) % size, expert]]
            near = [rank for rank in holders if node_R[rank] == node_R[target]] if nodes is not None else []
            assert source == [*near, *holders, -1][0]
