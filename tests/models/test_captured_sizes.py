"""The sizes of captured steps, and the memory that their graphs keep."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from epslots.models.captured_sizes import LEAST_SPAN, MOST_READS, CapturedSizes, span_of


def test_rows_and_positions_are_padded():
    sizes = CapturedSizes(rows=5, kv_tokens=500)
    assert [sizes.padded(rows) for rows in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 5]
    assert [span_of(longest) for longest in (1, 64, 65, 128, 129)] == [64, 64, 128, 128, 256]
    assert sizes.graphs() == [(batch, span) for batch in (1, 2, 4, 5) for span in (64, 128, 256, 512)]
    assert CapturedSizes(rows=0, kv_tokens=500).graphs() == []


def test_one_long_row_among_many_takes_the_usual_path():
    """16 rows as long as one of 1,025 would read 32 caches; 4 of them, 8."""
    sizes = CapturedSizes(rows=16, kv_tokens=1024)
    assert sizes.serves(16, 512) and not sizes.serves(16, 513)
    assert sizes.serves(8, 1024) and not sizes.serves(9, 1024)
    assert not sizes.serves(1, 1025) and not sizes.serves(17, 1)
    assert CapturedSizes(rows=16, kv_tokens=1).serves(16, LEAST_SPAN), "the smallest graphs serve any number of rows"


@example(most=7, kv_tokens=300, rows=3, longest=300)
@given(most=st.integers(0, 70), kv_tokens=st.integers(1, 5000), rows=st.integers(1, 80), longest=st.integers(1, 6000))
def test_the_graphs_are_those_of_the_served_steps(most: int, kv_tokens: int, rows: int, longest: int):
    """And rows of equal length that fill the cache are served."""
    sizes = CapturedSizes(most, kv_tokens)
    assert sizes.serves(rows, longest) == (rows <= most and (sizes.padded(rows), span_of(longest)) in sizes.graphs())
    if rows <= most and rows * longest <= kv_tokens:
        assert sizes.serves(rows, longest)
    for batch, span in sizes.graphs():
        assert batch * span <= max(MOST_READS * kv_tokens, most * LEAST_SPAN)
