"""The reads and writes of pooled layers in a step: the past without the step's own tokens, and each state once."""

from __future__ import annotations

import torch

from epslots.generation.row_layers import LazyStates, RowStep, States, TokenPool

ROWS = torch.tensor([2, 0])


def step_of(width: int, cells_BS: torch.Tensor, left_states: States | None = None) -> RowStep:
    past = cells_BS.shape[1] - width
    return RowStep(ROWS, None, past, width, {}, lambda _window: cells_BS.flatten(), left_states or {})


def test_the_past_ends_before_the_steps_tokens():
    pool = TokenPool(torch.arange(40).view(20, 2), None, (0, 1))
    cells_BS = torch.tensor([[3, 9, 4, 11, 12], [0, 5, 6, 13, 14]])
    for width in (1, 2, 4):
        assert torch.equal(step_of(width, cells_BS).past_of(pool), pool.cells[cells_BS[:, :-width]])


def test_a_state_is_read_once_and_kept_as_it_was_set():
    """A second reading would bring back what the rows had before the step."""
    pools, new_B2 = {n: torch.rand(4, 2) for n in range(2)}, torch.rand(2, 2)
    states = LazyStates(pools, 3, step_of(1, torch.zeros(2, 1, dtype=torch.int64)))
    assert torch.equal(states[0], pools[0][ROWS]) and states[0] is states[0]
    states[1] = new_B2
    assert states[1] is new_B2 and states[2] is None
    assert [(pool is pools[n], state is states[n]) for n, (pool, state) in enumerate(states.found())] == [(True, True)] * 2


def test_what_the_step_before_left_is_handed_out_once():
    """The layer may change it."""
    pool, left_B2 = torch.rand(4, 2), torch.rand(2, 2)
    step = step_of(1, torch.zeros(2, 1, dtype=torch.int64), {id(pool): left_B2})
    assert step.states_of(pool) is left_B2
    assert torch.equal(step.states_of(pool), pool[ROWS])
