"""Which rows make the next pass: no padding, no row forgotten, decoding never behind more than one chunk."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epslots.generation.row_plan import RowBatch, RowState, decodes, next_batch


def prompt(left: int, computed: int = 0, **more: int) -> RowState:
    return RowState(known=computed + left, computed=computed, **more)


DECODING = prompt(1, computed=9)


def test_prompts_of_equal_length_share_a_pass():
    rows = [prompt(6), prompt(6), prompt(6)]
    assert next_batch(rows, 12, prompt_was_last=False) == RowBatch((0, 1), 6, decodes=False)


def test_a_longer_prompt_joins_with_its_beginning():
    assert next_batch([prompt(4), prompt(9), prompt(3)], 20, prompt_was_last=False) == RowBatch((0, 1), 4, decodes=False)


def test_a_long_prompt_is_cut_into_chunks():
    assert next_batch([prompt(100)], 16, prompt_was_last=False) == RowBatch((0,), 16, decodes=False)


def test_rows_with_and_without_a_past_stay_apart():
    rows = [prompt(8, computed=8), prompt(8), prompt(8, computed=4)]
    assert next_batch(rows, 100, prompt_was_last=False) == RowBatch((0, 2), 8, decodes=False)


def test_prompts_and_decoding_take_turns():
    rows = [DECODING, prompt(50), DECODING]
    assert next_batch(rows, 16, prompt_was_last=False) == RowBatch((1,), 16, decodes=False)
    assert next_batch(rows, 16, prompt_was_last=True) == RowBatch((0, 2), 1, decodes=True)


def test_a_whole_prompt_may_exceed_the_room():
    assert next_batch([prompt(40, first=40)], 16, prompt_was_last=False) == RowBatch((0,), 40, decodes=False)


def test_text_that_is_replayed_comes_token_by_token():
    row = RowState(known=20, computed=12, first=12)
    assert decodes(row) and next_batch([row, DECODING], 16, prompt_was_last=True) == RowBatch((0, 1), 1, decodes=True)


def test_a_prompt_with_logprobs_is_computed_alone():
    rows = [prompt(40, most=4), prompt(40)]
    assert next_batch(rows, 100, prompt_was_last=False) == RowBatch((0,), 4, decodes=False)
    assert next_batch(rows[::-1], 100, prompt_was_last=False) == RowBatch((0,), 40, decodes=False)
    assert next_batch([prompt(3), rows[0]], 100, prompt_was_last=False) == RowBatch((0,), 3, decodes=False)


def test_a_pass_ends_where_another_request_goes_on():
    assert next_batch([prompt(40, computed=5, stop=12)], 100, prompt_was_last=False) == RowBatch((0,), 7, decodes=False)


@pytest.mark.parametrize("together", [False, True])
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=8),
    room=st.integers(1, 20),
    stop=st.integers(0, 30),
)
def test_every_row_ends_and_none_decodes_late(together: bool, sizes: list[tuple[int, int]], room: int, stop: int):
    rows = {i: RowState(known=length, computed=0, stop=stop if i == 0 else 0) for i, (length, _) in enumerate(sizes)}
    new = {i: count for i, (_, count) in enumerate(sizes)}
    prompt_was_last, prompts_in_a_row = False, 0
    waited = dict.fromkeys(rows, 0)
    for batch in range(1, 2000):
        if not rows:
            break
        numbers = list(rows)
        was_decoding = any(decodes(row) for row in rows.values())
        planned = next_batch(list(rows.values()), room, prompt_was_last=prompt_was_last, together=together)
        assert planned is not None and len(set(planned.rows)) == len(planned.rows)
        assert planned.decodes or planned.width * len(planned.rows) <= room
        prompts_in_a_row = 0 if planned.decodes else prompts_in_a_row + was_decoding
        assert prompts_in_a_row <= 1, "a decoding row waits for one chunk"
        chosen = {numbers[i] for i in planned.rows}
        if planned.decodes:
            waited = {i: waited[i] + 1 if i not in chosen and decodes(row) else 0 for i, row in rows.items()}
            assert max(waited.values()) < len(sizes), "a decoding row waits for each other one once"
        pasts = {rows[numbers[i]].computed > 0 for i in planned.rows}
        assert len(pasts) == 1
        for i in planned.rows:
            number = numbers[i]
            row = rows[number] = replace(rows[number], computed=rows[number].computed + planned.width, last=batch)
            assert row.computed <= row.known
            if row.left == 0:
                new[number] -= 1
                rows[number] = replace(row, known=row.known + 1)
            if not new[number]:
                del rows[number]
        prompt_was_last = not planned.decodes
    assert not rows
