"""``HandOvers``: the driver's side of hand-overs: which are under way, their messages, and what follows from their ends.

``scheduler.py`` decides which request moves where. The source holds the request until it has reported. If a rank is lost
before that, the request goes on at the source, or is computed again elsewhere if the source was lost.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, replace

from cluster.driver.scheduled_request import Move
from cluster.driver.scheduler import Scheduler
from cluster.messages.hand_over import (
    ConnectionOrder,
    Forget,
    GoOn,
    HandedOver,
    HandOver,
    HandOverContact,
    HandOverContacts,
    PromptProgress,
    Release,
    TakeOver,
)
from cluster.messages.rank import Command, Submit

_SECRET_BYTES = 16


@dataclass(frozen=True)
class HandOverCounts:
    """Hand-overs that have ended.

    Attributes:
        done: the request goes on at its target.
        early: those of them that began before the prompt was computed.
        failed: the request went on at its source, was computed again elsewhere, or had ended meanwhile.
        nbytes: of those that are done, together.
        seconds: in which their requests stood still.
    """

    done: int = 0
    early: int = 0
    failed: int = 0
    nbytes: int = 0
    seconds: float = 0.0


NO_HAND_OVERS = HandOverCounts()


class HandOvers:
    """Hand-overs of one cluster. For the supervisor's thread.

    Args:
        scheduler: knows the requests, and decides about moves.
        send: sends a command to a rank, in the background and in order.
        form_s, deadline_s: of ``ConnectionOrder``.
        first: number of the first one. Ranks that were adopted may still end hand-overs of the last driver.

    Attributes:
        counts: of those that have ended.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        send: Callable[[Hashable, Command], None],
        *,
        form_s: float,
        deadline_s: float,
        first: int = 0,
    ) -> None:
        self._scheduler, self._send = scheduler, send
        self._form_s, self._deadline_s = form_s, deadline_s
        self._numbers = itertools.count(first)
        self._moves: dict[int, Move] = {}
        self._given_up: dict[int, Move] = {}
        """Of those whose source hasn't reported the end yet, and still has the request."""
        self.counts = NO_HAND_OVERS

    def __len__(self) -> int:
        """Those under way."""
        return len(self._moves)

    def consider(self, id: str) -> None:
        """Begin a request's hand-over, if it is to move now: its rank has sent an output of it."""
        if (move := self._scheduler.begin_move(id)) is not None:
            self._begin(move)

    def consider_early(self, worker: Hashable, prompt: PromptProgress) -> None:
        """Begin the hand-over of a request whose prompt is being computed, if that pays now."""
        if (move := self._scheduler.begin_early_move(worker, prompt)) is not None:
            self._begin(move)

    def _begin(self, move: Move) -> None:
        id = move.entry.request.id
        number = next(self._numbers)
        self._moves[number] = move
        connection = ConnectionOrder(
            number=number,
            secret=secrets.token_bytes(_SECRET_BYTES),
            kind="memory" if move.near else "gloo",
            form_s=self._form_s,
            deadline_s=self._deadline_s,
        )
        self._send(move.target, TakeOver(id, connection))
        self._send(move.source, HandOver(id, connection))

    def pass_on(self, worker: Hashable, contact: HandOverContact) -> None:
        """Send a rank's address to the other one."""
        if (move := self._moves.get(contact.number)) is not None:
            other = move.target if worker == move.source else move.source
            self._send(other, HandOverContacts(contact.number, {contact.key: contact.value}))

    def take(self, worker: Hashable, event: HandedOver) -> None:
        """A source reports the end of a hand-over."""
        late = self._given_up.pop(event.number, None)
        if late is not None and late.source == worker and event.failure is None:
            self._send(worker, GoOn(late.entry.request.id))
        if event.number not in self._moves or self._moves[event.number].source != worker:
            return
        move, done = self._moves.pop(event.number), event.failure is None
        id = move.entry.request.id
        outcome = self._scheduler.end_move(move, done=done)
        self._count(event, move, moved=outcome == "moved")
        if outcome == "moved":
            self._send(move.target, Submit((move.entry.rest(),)))
            self._send(move.source, Forget(id))
            return
        self._send(move.target, Release(id))
        if done and outcome == "stays":  # the target was lost after it had the cache
            self._send(move.source, GoOn(id))

    def _count(self, event: HandedOver, move: Move, *, moved: bool) -> None:
        if event.failure is None:
            self._scheduler.observe_move(move, event)
        old = self.counts
        if moved:
            self.counts = replace(
                old,
                done=old.done + 1,
                early=old.early + move.early,
                nbytes=old.nbytes + event.nbytes,
                seconds=old.seconds + event.seconds,
            )
        else:
            self.counts = replace(old, failed=old.failed + 1)

    def lose(self, worker: Hashable) -> None:
        """A rank is lost: hand-overs from it have ended, and their requests are back in the queue."""
        for number, move in list(self._moves.items()):
            if move.source == worker:
                self._fail(number)
        self._drop_stale()

    def give_up(self, workers: Collection[Hashable]) -> None:
        """End the hand-overs that wait for prompts of a group that makes no steps.

        They would hold their places at the targets.
        """
        self._drop_stale()
        for number, move in list(self._moves.items()):
            if move.source in workers and not move.entry.began:
                self._given_up[number] = move
                self._fail(number)

    def _drop_stale(self) -> None:
        """Drop those that were given up and whose request has left its source, or ended: none is told to go on there."""
        at = self._scheduler.worker_of
        self._given_up = {number: move for number, move in self._given_up.items() if at(move.entry.request.id) == move.source}

    def _fail(self, number: int) -> None:
        move = self._moves.pop(number)
        self._scheduler.end_move(move, done=False)
        self.counts = replace(self.counts, failed=self.counts.failed + 1)
        self._send(move.target, Release(move.entry.request.id))

    def clear(self) -> None:
        """All requests are dropped."""
        self._moves.clear()
        self._given_up.clear()
