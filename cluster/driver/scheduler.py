"""``Scheduler``: which rank serves which request, and what moves when a rank is lost. Pure decisions.

    queued     waits for a rank with room, in the order of priority and arrival
    assigned   a rank has it; its tokens until now are recorded here
    ending     the user needs no more of it, but its rank doesn't know yet; the rank's last output is awaited

A request goes to the least loaded rank as soon as one has room, and not before: a queued request can still go to a rank that
comes later. The choices of one prompt go to one rank, as long as that has room, because it computes their prompt once. The
requests of a lost rank return to their place in the queue, and start again from their prompt and the tokens that had arrived.
A request that was lost with several ranks, without a token in between, may be the reason: it gets a rank to itself, and in
the end is given up.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from epslots.generation.requests import Output, Request

MOST_SHARED_LOSSES = 2
"""Losses in a row, without a token, after which a request gets a rank to itself: others aren't blamed if it is the reason."""
MOST_LOSSES = 5
"""Losses in a row, without a token, after which a request is given up: it doesn't go on ending ranks."""
BACKLOG_PART = 4
"""A rank is given a fourth more requests than it runs, and at least one more: one of them starts when another ends."""


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
        losses: ranks in a row that were lost while they had it, without a token in between.
        ending: its user needs no more of it.
    """

    request: Request
    siblings: str
    number: int
    arrived_s: float
    tokens: list[int] = field(default_factory=list)
    prompt_logprobs: int = 0
    worker: Hashable | None = None
    losses: int = 0
    ending: bool = False

    @property
    def turn(self) -> tuple[int, int]:
        """Its place in the queue: the lowest is assigned first."""
        return self.request.priority, self.number

    @property
    def held_tokens(self) -> int:
        """Tokens that its rank's cache holds now."""
        return len(self.request.prompt) + len(self.tokens)

    @property
    def needed_tokens(self) -> int:
        """Tokens that its rank may have to hold, and to compute."""
        return len(self.request.prompt) + self.request.max_new_tokens

    @property
    def alone(self) -> bool:
        """Whether it gets a rank to itself."""
        return self.losses >= MOST_SHARED_LOSSES

    def rest(self) -> Request:
        """The request for the tokens that are missing."""
        return self.request.after(self.tokens, self.prompt_logprobs)


@dataclass(frozen=True)
class RankCapacity:
    """The capacity of a rank.

    Attributes:
        kv_tokens: tokens that its cache holds.
        max_requests: requests that it runs at a time.
    """

    kv_tokens: int
    max_requests: int

    @property
    def most_requests(self) -> int:
        """Requests that it is given, those that wait there included."""
        return self.max_requests + max(1, self.max_requests // BACKLOG_PART)


@dataclass(eq=False)
class _RankLoad:
    """The requests of a rank, in numbers."""

    capacity: RankCapacity
    requests: int = 0
    held_tokens: int = 0
    needed_tokens: int = 0
    siblings: set[str] = field(default_factory=set)
    """Of its requests."""
    reserved: bool = False
    """One of them gets the rank to itself."""

    def add(self, entry: ScheduledRequest) -> None:
        self.requests += 1
        self.siblings.add(entry.siblings)
        self.held_tokens += entry.held_tokens
        self.needed_tokens += entry.needed_tokens
        self.reserved |= entry.alone

    def fits(self, entry: ScheduledRequest) -> bool:
        """Whether the rank has room for one more request; an idle rank has room for any."""
        if not self.requests:
            return True
        if self.reserved or entry.alone:
            return False
        if self.requests >= self.capacity.most_requests:
            return False
        return self.held_tokens + entry.held_tokens <= self.capacity.kv_tokens


class Scheduler:
    """All requests that aren't done. A ``worker`` is any key that stands for a rank's process."""

    def __init__(self) -> None:
        self._entries: dict[str, ScheduledRequest] = {}
        self._queue: list[ScheduledRequest] = []
        """In the order of turns."""
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, id: str) -> bool:
        return id in self._entries

    @property
    def queued(self) -> int:
        """Requests that wait for a rank."""
        return len(self._queue)

    @property
    def outstanding(self) -> bool:
        """Whether any rank has a request."""
        return len(self._entries) > len(self._queue)

    def served_by(self, worker: Hashable) -> list[ScheduledRequest]:
        """A rank's requests, oldest first."""
        return [entry for entry in self._entries.values() if entry.worker == worker]

    def longest_wait_s(self, now_s: float) -> float:
        """The longest time that a request is without its first token, wherever it waits; 0 if all have one."""
        without = [entry.arrived_s for entry in self._entries.values() if not entry.tokens and not entry.ending]
        return now_s - min(without, default=now_s)

    def add(self, choices: Sequence[Request], now_s: float = 0.0) -> None:
        """Queue the choices of one prompt, whose ids must be new."""
        for request in choices:
            assert request.id not in self._entries
            entry = ScheduledRequest(request, siblings=choices[0].id, number=next(self._numbers), arrived_s=now_s)
            self._entries[request.id] = entry
            self._enqueue(entry)

    def _enqueue(self, entry: ScheduledRequest) -> None:
        insort(self._queue, entry, key=lambda queued: queued.turn)

    def assign(self, capacities: Mapping[Hashable, RankCapacity]) -> list[tuple[Hashable, Request]]:
        """Assign queued requests, in order, to ranks with room; returns pairs of rank and request.

        Args:
            capacities: of all ranks that serve, in the order of their numbers.
        """
        if not self._queue or not capacities:
            return []
        loads = {worker: _RankLoad(capacity) for worker, capacity in capacities.items()}
        for entry in self._entries.values():
            if entry.worker in loads:
                loads[entry.worker].add(entry)
        assigned = []
        while self._queue:
            entry = self._queue[0]
            fitting = [worker for worker, load in loads.items() if load.fits(entry)]
            if not fitting:
                break
            beside_siblings = [worker for worker in fitting if entry.siblings in loads[worker].siblings]
            entry.worker = min(beside_siblings or fitting, key=lambda worker: loads[worker].needed_tokens)
            loads[entry.worker].add(entry)
            del self._queue[0]
            assigned.append((entry.worker, entry.rest()))
        return assigned

    def count(self, worker: Hashable, output: Output) -> ScheduledRequest | None:
        """Record a rank's output; returns its request, or None if no caller needs the output.

        Outputs of a rank that was reserved for lost, and whose requests have moved, are ignored.
        """
        entry = self._entries.get(output.id)
        if entry is None or entry.worker != worker:
            return None
        if output.finished:
            del self._entries[output.id]
        if entry.ending:
            return None
        entry.tokens += output.tokens
        entry.prompt_logprobs += len(output.prompt_logprobs)
        if output.tokens:
            entry.losses = 0  # it isn't the reason: that would end every rank at the same token
        return entry

    def end(self, id: str) -> Hashable | None:
        """End a request for its user; returns the rank that has to cancel it, or None."""
        entry = self._entries.get(id)
        if entry is None or entry.ending:
            return None
        if entry.worker is None:
            self._queue.remove(entry)
            del self._entries[id]
            return None
        entry.ending = True
        return entry.worker

    def release(self, worker: Hashable, *, blame: bool = True) -> tuple[list[ScheduledRequest], list[ScheduledRequest]]:
        """A rank is lost: move its requests to the queue.

        Args:
            blame: they may be the reason.

        Returns:
            The requests that moved; and those that are given up, after too many losses.
        """
        moved, given_up = [], []
        for entry in self.served_by(worker):
            if entry.ending:
                del self._entries[entry.request.id]
                continue
            entry.losses += blame
            if entry.losses >= MOST_LOSSES:
                del self._entries[entry.request.id]
                given_up.append(entry)
            else:
                entry.worker = None
                moved.append(entry)
                self._enqueue(entry)
        return moved, given_up

    def clear(self) -> list[ScheduledRequest]:
        """Drop all requests; returns those that users still wait for."""
        entries = [entry for entry in self._entries.values() if not entry.ending]
        self._entries.clear()
        self._queue.clear()
        return entries

    def check(self) -> None:
        """Assert that the queue and the entries agree."""
        waiting = [entry for entry in self._entries.values() if entry.worker is None]
        assert self._queue == sorted(waiting, key=lambda entry: entry.turn)
        assert not any(entry.ending for entry in waiting)


class IdleTracker:
    """Decides which ranks to wake.

    A rank falls asleep by itself when a step's header says that no rank has work. A rank that gets a request then begins the
    next step, and waits in it for the others.

    All ranks of an epoch fall asleep at the same step. So it is enough to remember the step up to which they were woken: a
    rank that sleeps before that step, or reports so later, is woken as well.
    """

    def __init__(self) -> None:
        self.epoch = -1
        self._asleep: dict[Hashable, int] = {}
        self._woken_to = 0

    def begin(self, epoch: int) -> None:
        """A new epoch: all its ranks are awake."""
        self.epoch = epoch
        self._asleep.clear()
        self._woken_to = 0

    def fell_asleep(self, worker: Hashable, epoch: int, step: int) -> None:
        """A rank reports that no rank had work in ``step``."""
        if epoch == self.epoch:
            self._asleep[worker] = step

    def wake(self, outstanding: bool) -> tuple[int, Sequence[Hashable]]:
        """The step to make ranks run to, and the ranks to wake for it; ``outstanding``: some rank has requests."""
        if outstanding and self._asleep:
            self._woken_to = max(self._woken_to, max(self._asleep.values()) + 1)
        late = [worker for worker, step in self._asleep.items() if step < self._woken_to]
        for worker in late:
            del self._asleep[worker]
        return self._woken_to, late
