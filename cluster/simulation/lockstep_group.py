"""``LockstepGroup``: the ranks of one simulated group, which step together; a step takes the time of its slowest rank.

The experts' side of a step is ``SimulatedGroup``: the planner, the caches and the clock of real ranks. Ranks that only decode
cost nothing here until something happens to them.

Legend of shape suffixes: R ranks of the group, M requests of a rank at a time, L layers, E experts, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.simulation.simulated_rank import RankStep, SimulatedRank
from cluster.simulation.trace_counts import TraceCounts
from epslots.arrays import FloatArray, IntArray
from epslots.generation.chunk_balance import balanced_chunk
from epslots.generation.requests import Output
from epslots.generation.row_admission import RunningRow
from epslots.simulation.simulated_group import SimulatedGroup

_NEVER = np.iinfo(np.int64).max
_IDLE_ROW = -1


@dataclass
class GroupTally:
    """Sums over a group's steps.

    Attributes:
        steps: made.
        seconds: that they took.
        tokens: of all ranks together.
        most_tokens: of each step's busiest rank, once for each rank that has some.
        gaps: for each step of each rank that decoded: seconds since it decoded last, and its streams; in turn.
    """

    steps: int
    seconds: float
    tokens: int
    most_tokens: int
    gaps: list[tuple[FloatArray, IntArray]]

    @classmethod
    def empty(cls) -> GroupTally:
        return cls(0, 0.0, 0, 0, [])


class LockstepGroup:
    """The ranks of a group.

    Args:
        ranks: of it, all idle.
        experts: where its experts are.
        counts: the routing of tokens.
        first_rows: the trace's row of each request's first token, by id.
        most_requests: of a rank at a time.
        depth: layers of the model for each layer of the trace.

    Attributes:
        steps: made so far.
        tally: since it was last taken.
        stepped: ranks that were asked for the latest step, and made it.
        news_R: ranks with tokens that ``outputs`` hasn't returned, bool.
    """

    def __init__(
        self,
        ranks: Sequence[SimulatedRank],
        experts: SimulatedGroup,
        counts: TraceCounts,
        first_rows: dict[str, int],
        *,
        most_requests: int,
        depth: float,
    ) -> None:
        self.ranks, self.experts = tuple(ranks), experts
        self._counts, self._first_rows, self._depth = counts, first_rows, depth
        self.steps = 0
        self.tally = GroupTally.empty()
        self.news_R = np.zeros(len(ranks), bool)
        self._inbox: list[tuple[int, Callable[[], None]]] = []
        self._row_RM = np.full((len(ranks), most_requests), _IDLE_ROW)
        """The trace's row of each token that is decoded in the next step."""
        self._tokens_R = np.zeros(len(ranks), np.int64)
        self._due_R = np.full(len(ranks), _NEVER)
        """The step before which a rank has to be asked; until then it makes the same step, or none."""
        self._caught_up_R = np.zeros(len(ranks), np.int64)
        self._decodes_R = np.zeros(len(ranks), bool)
        """Whether the tokens of each rank's step continue texts."""
        self._decoded_s_R = np.zeros(len(ranks))
        """When each rank has decoded last."""
        self._asked: list[int] = []
        self._waiting_R = np.zeros(len(ranks), np.int64)
        """Tokens of each rank's prompts that wait for the next step but one: chunks are balanced by them."""
        self._seconds: list[float] = []
        """Of each step."""
        self.stepped: list[int] = []

    def take(self) -> GroupTally:
        """The sums since the last call."""
        tally, self.tally = self.tally, GroupTally.empty()
        return tally

    def put(self, rank: int, command: Callable[[], None]) -> None:
        """Have a rank carry out a command before its next step."""
        self._inbox.append((rank, command))

    def catch_up(self, rank: int) -> None:
        """Enter the steps that a rank has made since it was last asked."""
        made = self.steps - int(self._caught_up_R[rank])
        if made and self.ranks[rank].coasting is not None:
            self.ranks[rank].catch_up(self._seconds[-made:])
        self._caught_up_R[rank] = self.steps

    def begin(self, now_s: float) -> float | None:
        """Carry out the commands, and begin a step; returns its seconds, or None if no rank has work."""
        while self._inbox:  # a command may put others
            inbox, self._inbox = self._inbox, []
            for rank, command in inbox:
                self.catch_up(rank)
                self._due_R[rank] = self.steps
                command()
        self._asked = np.flatnonzero(self._due_R <= self.steps).tolist()
        balanced = balanced_chunk(self._waiting_R.tolist()) if self._waiting_R.any() else None
        stretches = {rank: found for rank in self._asked if (found := self._ask(rank, balanced, now_s))}
        if not self._tokens_R.any():
            return None
        rank_N, place_N = np.nonzero(self._row_RM >= 0)
        counts_LRE = self._counts.of_tokens(self._row_RM[rank_N, place_N], rank_N)
        for rank, those in stretches.items():
            counts_LRE[:, rank] += self._counts.of_stretches(those)
        return self.experts.step(counts_LRE, self._tokens_R) * self._depth / 1e9

    def _ask(self, rank: int, balanced: int | None, now_s: float) -> list[tuple[int, int]]:
        """Begin a rank's step; returns the stretches of the trace that are its chunks of prompts."""
        self.catch_up(rank)
        if not self._tokens_R[rank]:  # it was idle
            self._decoded_s_R[rank] = now_s
        step = self.ranks[rank].begin(balanced)
        self._waiting_R[rank] = self.ranks[rank].waiting
        self._enter(rank, step)
        self._due_R[rank] = _NEVER
        self._decodes_R[rank] = step is not None and step.decodes
        if step is None or step.width == 1:
            return []
        return [(self._row_of(running), step.width) for running in step.rows]

    def _enter(self, rank: int, step: RankStep | None) -> None:
        """Note the tokens of a rank's next step."""
        self._row_RM[rank] = _IDLE_ROW
        self._tokens_R[rank] = 0 if step is None else step.tokens
        if step is not None and step.width == 1:
            self._row_RM[rank, : len(step.rows)] = [self._row_of(running) for running in step.rows]

    def _row_of(self, running: RunningRow) -> int:
        """The trace's row of a request's next token."""
        return (self._first_rows[running.entry.request.id] + running.row.length) % self._counts.tokens

    def end(self, now_s: float, seconds: float) -> tuple[list[int], list[int]]:
        """End the step that began. Returns the ranks with a request's first token, and the ranks with a request's end.

        Args:
            now_s: at its end.
            seconds: that it took.
        """
        self.steps += 1
        self._seconds.append(seconds)
        self._count(now_s, seconds)
        self.news_R |= self._decodes_R & (self._tokens_R > 0)
        self._row_RM[self._row_RM >= 0] += 1
        self._row_RM[self._row_RM == self._counts.tokens] = 0
        first, ended = list[int](), list[int]()
        for rank in self._asked:
            one = self.ranks[rank]
            if self._tokens_R[rank]:
                news = one.end(seconds)
                self._caught_up_R[rank] = self.steps
                self.news_R[rank] |= news.tokens
                first += [rank] if news.first else []
                ended += [rank] if news.ended else []
                if not self._decodes_R[rank] and not news.paused:
                    self._decoded_s_R[rank] = now_s
            self._go_on(rank)
        self.stepped, self._asked = self._asked, []
        return first, ended

    def _go_on(self, rank: int) -> None:
        """Find out when a rank has to be asked again."""
        one = self.ranks[rank]
        if (steps := one.coasts()) > 0:
            self._due_R[rank], self._decodes_R[rank] = self.steps + steps, True
            self._enter(rank, one.coasting)
        elif one.has_work:
            self._due_R[rank] = self.steps
        else:
            self._enter(rank, None)

    def outputs(self, rank: int) -> list[Output]:
        """A rank's results since the last call."""
        self.catch_up(rank)
        self.news_R[rank] = False
        return self.ranks[rank].outputs()

    def _count(self, now_s: float, seconds: float) -> None:
        tally, tokens_R = self.tally, self._tokens_R
        decodes_R = self._decodes_R & (tokens_R > 0)
        tally.steps += 1
        tally.seconds += seconds
        tally.tokens += int(tokens_R.sum())
        tally.most_tokens += int(tokens_R.max()) * int(np.count_nonzero(tokens_R))
        tally.gaps.append((now_s - self._decoded_s_R[decodes_R], tokens_R[decodes_R]))
        self._decoded_s_R[decodes_R] = now_s
