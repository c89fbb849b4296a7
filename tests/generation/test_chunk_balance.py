"""How long the chunks of a group's ranks are: about as long as the others', and long enough to be worth a step."""

from __future__ import annotations

from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epslots.generation.chunk_balance import MOST_SKEW, balanced_chunk
from epslots.generation.chunk_size import LEAST_PACE, ChunkSize
from epslots.generation.row_plan import RowState, following_prompt_tokens, next_batch


def skew(waiting: list[int], chunk: int) -> float:
    """Of the ranks that have prompts."""
    chunks = [min(tokens, chunk) for tokens in waiting if tokens]
    return max(chunks) / mean(chunks)


@given(st.lists(st.integers(0, 600), max_size=12))
def test_the_longest_balanced_chunk_is_chosen(waiting: list[int]):
    """Longer ones aren't balanced; ranks without a prompt count for nothing, and their order neither."""
    chunk = balanced_chunk(waiting)
    longest = max(waiting, default=0)
    if chunk is None:
        assert not longest or skew(waiting, longest) <= MOST_SKEW * (1 + 1e-9)
    else:
        assert 0 < chunk < longest
        assert skew(waiting, chunk) <= MOST_SKEW * (1 + 1e-9)
        assert skew(waiting, chunk + 1) > MOST_SKEW * (1 - 1e-9)
    assert balanced_chunk(sorted(waiting)) == balanced_chunk([0, *reversed(waiting)]) == chunk


@pytest.mark.parametrize(
    ("waiting", "chunk"),
    [((), None), ((0, 0), None), ((512,), None), ((512, 512), None), ((512, 88), 146), ((512, 0, 88), 146)],
)
def test_chunks_of_some_groups(waiting: tuple[int, ...], chunk: int | None):
    assert balanced_chunk(waiting) == chunk


@given(fixed=st.floats(1e-3, 0.1), per_token=st.floats(1e-5, 1e-2), balanced=st.integers(1, 600))
def test_a_long_prompt_keeps_half_its_pace(fixed: float, per_token: float, balanced: int):
    """However short the others' are: steps would consist of their fixed costs."""
    size = ChunkSize(512, None)
    assert size.prompt_tokens(0, balanced) == 512, "nothing was timed"
    for tokens in (512, 300, 100, 0, 512):
        size.observe(tokens, 0, fixed + per_token * tokens)
    chunk = size.prompt_tokens(0, balanced)
    assert min(balanced, 512) <= chunk <= size.prompt_tokens(0) == 512
    full = 512 / (fixed + per_token * 512)
    assert (chunk + 1) / (fixed + per_token * (chunk + 1)) >= min(LEAST_PACE / per_token, full) * (1 - 1e-3)


@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(0, 89)), min_size=1, max_size=6),
    st.integers(1, 64),
)
def test_the_next_prompts_are_foreseen(rows: list[tuple[int, int]], room: int):
    """As the batch after this one will be, if its prompts are continued."""
    states = [RowState(known, min(computed, known - 1)) for known, computed in rows]
    batch = next_batch(states, room, prompt_was_last=False)
    assert batch is not None
    foreseen = following_prompt_tokens(states, batch, room)
    after = [
        RowState(state.known + (state.left == batch.width), state.computed + batch.width) if i in batch.rows else state
        for i, state in enumerate(states)
    ]
    following = next_batch(after, room, prompt_was_last=False)
    assert following is not None
    assert foreseen == (0 if following.decodes else len(following.rows) * following.width)
