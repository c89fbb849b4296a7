"""Which rows make the next batch, and how many tokens of each: pure decisions of ``RowBatcher``.

A row *decodes* when one token of its sequence is left to compute; else it has a *prompt* to compute, in chunks. A batch is one
forward pass, and does either. All its rows get equally many new tokens, so that none is padded: a padded token would be routed
to experts, and would change recurrent states. The two kinds take turns, so that decoding waits for one chunk at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class RowState:
    """A running row, as the planner sees it.

    Attributes:
        known: tokens of its sequence: the prompt, and the new tokens so far.
        computed: those that the cache holds.
        first: tokens that have to be computed in its first batch together; 0 = any.
        most: new tokens of a batch, at most; 0 = as many as the batch takes. Such a row is a batch of its own.
        stop: a length at which a batch has to end, because another request continues from there; 0 = none.
        last: number of the batch that it was in last, counted from 1; 0 = none.
    """

    known: int
    computed: int
    first: int = 0
    most: int = 0
    stop: int = 0
    last: int = 0

    @property
    def left(self) -> int:
        return self.known - self.computed

    def prompt_tokens(self, room: int) -> int:
        """The tokens of its next batch, where that has room for so many."""
        if not self.computed and self.first:
            return self.first
        tokens = min(self.left, room, self.most or room)
        return min(tokens, self.stop - self.computed) if self.computed < self.stop else tokens


@dataclass(frozen=True)
class RowBatch:
    """The rows of one forward pass.

    Attributes:
        rows: indices into the running rows, in their order.
        width: new tokens of each.
        decodes: they are single tokens that continue texts.
    """

    rows: tuple[int, ...]
    width: int
    decodes: bool


def decodes(row: RowState) -> bool:
    """Whether one token of the row is computed in its next batch, beside other rows' single tokens."""
    return row.computed > 0 and (row.left == 1 or row.first > 0)


def next_batch(rows: Sequence[RowState], room: int, *, prompt_was_last: bool, together: bool = True) -> RowBatch | None:
    """The next batch; None without rows.

    Args:
        rows: those first that are served first; each has a token left to compute.
        room: new tokens of a batch of prompts, at most. The first prompt is computed even if ``first`` exceeds it.
        prompt_was_last: the batch before was one of prompts.
        together: several rows may share a batch. If not, rows decode in turns.
    """
    decoding = tuple(i for i, row in enumerate(rows) if decodes(row))
    prompts = [i for i, row in enumerate(rows) if not decodes(row)]
    if decoding and (prompt_was_last or not prompts):
        longest_ago = min(decoding, key=lambda i: rows[i].last)
        return RowBatch(decoding if together else (longest_ago,), 1, decodes=True)
    if not prompts:
        return None
    oldest = rows[prompts[0]]
    width = oldest.prompt_tokens(room)
    chosen = prompts[:1]
    for i in prompts[1:] if together and not oldest.most else ():
        row = rows[i]
        # Rows without a past take another way through recurrent layers than rows with one.
        alike = (row.computed > 0) == (oldest.computed > 0) and not row.most and row.prompt_tokens(width) == width
        if alike and (len(chosen) + 1) * width <= room:
            chosen.append(i)
    return RowBatch(tuple(chosen), width, decodes=False)


def following_prompt_tokens(rows: Sequence[RowState], batch: RowBatch, room: int, *, together: bool = True) -> int:
    """Tokens of the first batch of prompts after a batch; 0 if no prompt is left.

    Args:
        rows: from which the batch was made. Requests without a row wait for others' ends.
        room: new tokens of a batch of prompts, at most.
        together: several rows may share a batch.
    """
    left = [i for i, row in enumerate(rows) if not decodes(row)]
    made = set(() if batch.decodes else batch.rows)
    after = [replace(rows[i], computed=rows[i].computed + batch.width) if i in made else rows[i] for i in left]
    prompts = [row for row in after if row.left and not decodes(row)]
    planned = next_batch(prompts, room, prompt_was_last=False, together=together)
    return 0 if planned is None else len(planned.rows) * planned.width
