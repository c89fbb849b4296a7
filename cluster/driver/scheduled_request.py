"""The scheduler's dataclasses: ``ScheduledRequest``, a request with its progress, and ``Move``, its hand-over."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

from epslots.generation.requests import Request

MOST_SHARED_LOSSES = 2
"""Losses in a row, without a token, after which a request gets a rank to itself: others aren't blamed if it is the reason."""


@dataclass(eq=False)
class ScheduledRequest:
    """A request of the cluster, with its progress.

    Attributes:
        siblings: id of the first choice of its prompt, which all choices of that prompt have in common.
        number: in the order of arrival.
        arrived_s: when it arrived.
        tokens: generated so far.
        prompt_logprobs: log-probabilities of the prompt that have arrived.
        worker: the rank that serves it; None while it is queued.
        assignment: its number among the request's assignments to ranks; -1 = it had none.
        losses: ranks in a row that were lost while they had it, without a token in between.
        ending: its user needs no more of it.
        blocks: hashes of its prompt's blocks (``block_hashes``).
        reused: tokens of its prompt that its rank needn't compute, as far as is known.
        computed: tokens of its prompt that its rank has computed, as far as is known.
        began: its rank has sent a token.
        leaves: it is to leave its rank when its prompt is computed.
        failed_moves: hand-overs that failed.
        move_at: tokens from which the next hand-over may begin.
    """

    request: Request
    siblings: str
    number: int
    arrived_s: float
    tokens: list[int] = field(default_factory=list)
    prompt_logprobs: int = 0
    worker: Hashable | None = None
    assignment: int = -1
    losses: int = 0
    ending: bool = False
    blocks: tuple[int, ...] = ()
    reused: int = 0
    computed: int = 0
    began: bool = False
    leaves: bool = False
    failed_moves: int = 0
    move_at: int = 1

    def is_at(self, worker: Hashable, assignment: int) -> bool:
        """Whether this is its present assignment; news of an earlier one may come late."""
        return self.worker == worker and self.assignment == assignment

    @property
    def turn(self) -> tuple[int, int]:
        """Its place in the queue: the lowest is assigned first."""
        return self.request.priority, self.number

    @property
    def held_tokens(self) -> int:
        """Tokens that its rank's cache holds now."""
        return len(self.request.prompt) + len(self.tokens)

    @property
    def due_tokens(self) -> int:
        """Tokens that its rank has yet to compute, at most. Its first token says that its prompt is done."""
        prompt = 0 if self.began else len(self.request.prompt) + len(self.tokens) - self.reused
        return prompt if self.leaves else prompt + self.left_tokens

    @property
    def left_tokens(self) -> int:
        """New tokens that are yet to come, at most."""
        return self.request.max_new_tokens - len(self.tokens)

    @property
    def alone(self) -> bool:
        """Whether it gets a rank to itself."""
        return self.losses >= MOST_SHARED_LOSSES

    def rest(self) -> Request:
        """The request for the tokens that are missing, with the number of its assignment."""
        request = self.request
        if self.tokens or self.prompt_logprobs:
            request = request.after(self.tokens, self.prompt_logprobs)
        return replace(request, assignment=self.assignment) if self.assignment > 0 else request


@dataclass(frozen=True)
class MoveClaim:
    """The room that a request in a hand-over has at its target, as ``rank_loads.Costly``."""

    held_tokens: int
    due_tokens: int
    alone: bool = False


@dataclass(frozen=True)
class Move:
    """A request's hand-over from one rank to another.

    Attributes:
        claim: its room at the target.
        near: the two ranks share memory.
        early: it began before the prompt was computed.
    """

    entry: ScheduledRequest
    source: Hashable
    target: Hashable
    claim: MoveClaim
    near: bool
    early: bool = False
