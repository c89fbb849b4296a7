"""How long steps are divided."""

from __future__ import annotations

import pytest

from epslots.moe.token_room import TokenRoom


@pytest.mark.parametrize(
    ("tokens", "free_bytes", "parts"),
    [
        (512, 0, 1),  # planned, with any room left
        (513, 0, 2),
        (5120, 0, 10),
        (5120, 2 * 5120 * 100, 1),  # half of what is free
        (5120, 2 * 5119 * 100, 2),
        (5120, 2 * 2000 * 100, 3),
    ],
)
def test_a_step_is_divided_where_memory_is_scarce(tokens: int, free_bytes: int, parts: int):
    assert TokenRoom(512, 100, lambda: free_bytes).parts(tokens) == parts


def test_a_planned_step_asks_for_nothing():
    """Asking a device takes longer than deciding."""
    assert TokenRoom(512, 100, lambda: pytest.fail("it asks")).parts(512) == 1
