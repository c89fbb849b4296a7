"""The bytes that hand-overs may copy between two steps: a share of the step's time, at the speed that copies have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.rank.copy_budget import FIRST_BYTES_S, STEP_SHARE, CopyBudget
from epslots.piece_sizes import BYTES_IN_FLIGHT, PIECE_BYTES

MOST = BYTES_IN_FLIGHT // PIECE_BYTES


def measured(step_s: float, bytes_s: float, target_s: float | None = None) -> CopyBudget:
    budget = CopyBudget(target_s)
    budget.observe_step(step_s)
    budget.observe_copy(PIECE_BYTES, PIECE_BYTES / bytes_s)
    return budget


@given(
    step_s=st.floats(1e-4, 10),
    bytes_s=st.floats(1e7, 1e12),
    target_s=st.none() | st.floats(1e-3, 1),
    taken=st.integers(0, 2 * BYTES_IN_FLIGHT),
)
def test_copies_take_their_share_of_a_step(step_s: float, bytes_s: float, target_s: float | None, taken: int):
    """Two hand-overs of a rank share it, and each goes on by a piece at least."""
    budget = measured(step_s, bytes_s, target_s)
    share_s = STEP_SHARE * (step_s if target_s is None else target_s)
    budget.take(taken)
    pieces = budget.pieces()
    assert 1 <= pieces <= MOST
    if pieces > 1:
        assert taken + pieces * PIECE_BYTES <= share_s * bytes_s * 1.001
    elif taken + 2 * PIECE_BYTES <= BYTES_IN_FLIGHT:
        assert taken + 2 * PIECE_BYTES > share_s * bytes_s * 0.999, "there was time for another one"


def test_a_budget_is_a_steps():
    budget = measured(1.0, 1e12)
    budget.take((MOST - 2) * PIECE_BYTES)
    assert budget.pieces() == 2
    budget.observe_step(1.0)
    assert budget.pieces() == MOST


def test_a_rank_that_knows_nothing_copies_a_piece():
    budget = CopyBudget()
    assert budget.pieces() == 1
    budget.observe_step(4 * PIECE_BYTES / STEP_SHARE / FIRST_BYTES_S)
    assert budget.pieces() == 4


@pytest.mark.parametrize("bytes_s", [1e8, 1e11])
def test_a_speed_is_that_of_whole_pieces(bytes_s: float):
    """The last few bytes of a cache take as long as many; and one copy that was held up isn't all copies."""
    budget = measured(0.1, 1e10)
    before = budget.step_bytes
    budget.observe_copy(100, 1e-3)
    assert budget.step_bytes == before
    budget.observe_copy(PIECE_BYTES, PIECE_BYTES / bytes_s)
    assert budget.bytes_s == pytest.approx(0.8 * 1e10 + 0.2 * bytes_s)
