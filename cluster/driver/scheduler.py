"""The books of a cluster's requests: pure decisions about who serves what, and what is moved when a rank is lost.

    queued     waits for a rank with room, in the order of arrival
    assigned   a rank has it; what came of it until now is known here
    ending     the user has all of it, but the rank doesn't know yet; the rank's last word on it is awaited

A request goes to the least loaded rank as soon as one has room for it, and not before: those that wait can go to ranks that
come later. A rank that is lost gives its requests back. They go to the front of the queue and are started again from their
prompt and the tokens that had arrived, so nothing that a user has seen changes. A request that was lost with several ranks,
and got on with none of them, may be what ends them: it is tried alone, and in the end given up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from epslots.engine.requests import Output, Request

# Ranks in a row that a request may be lost with, without a token in between, before it has one to itself, so that the others
# aren't blamed if it is the reason; and before it is given up, so that it doesn't go on for ever ending ranks.
MOST_SHARED_LOSSES = 2
MOST_LOSSES = 5


@dataclass(eq=False)
class Entry:
    """A request of the cluster, and what came of it."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    worker: Hashable | None = None
    """Who serves it; None while it is queued."""
    losses: int = 0
    """Ranks in a row that were lost while they had it, before a token came."""
    ending: bool = False

    @property
    def held_tokens(self) -> int:
        """Tokens that its rank keeps in its cache now."""
        return len(self.request.prompt) + len(self.tokens)

    @property
    def needed_tokens(self) -> int:
        """Tokens that its rank may have to keep, and to compute."""
        return len(self.request.prompt) + self.request.max_new_tokens

    @property
    def alone(self) -> bool:
        """Whether it gets a rank to itself."""
        return self.losses >= MOST_SHARED_LOSSES

    def rest(self) -> Request:
        """What is left to do."""
        return self.request.after(self.tokens)


@dataclass(frozen=True)
class RankLoad:
    """What a rank can take.

    Attributes:
        kv_tokens: of its cache.
        batches: whether its requests run together; else one runs, and one waits.
    """

    kv_tokens: int
    batches: bool


class Scheduler:
    """All requests that aren't done. ``worker`` is anything that names a rank's process."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._queue: deque[str] = deque()

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
        """Whether any rank has something to do."""
        return len(self._entries) > len(self._queue)

    def served_by(self, worker: Hashable) -> list[Entry]:
        """What a rank has, oldest first."""
        return [entry for entry in self._entries.values() if entry.worker == worker]

    def add(self, request: Request) -> None:
        """Queue a request; its id is new."""
        assert request.id not in self._entries
        self._entries[request.id] = Entry(request)
        self._queue.append(request.id)

    def assign(self, rooms: dict[Hashable, RankLoad]) -> list[tuple[Hashable, Request]]:
        """Give queued requests to ranks that have room, in order; returns who gets what.

        Args:
            rooms: of all ranks that serve, in the order of their numbers.
        """
        if not self._queue or not rooms:
            return []
        count = dict.fromkeys(rooms, 0)
        held, needed = dict(count), dict(count)
        taken: set[Hashable] = set()

        def book(entry: Entry) -> None:
            worker = entry.worker
            assert worker is not None
            if worker in count:
                count[worker] += 1
                held[worker] += entry.held_tokens
                needed[worker] += entry.needed_tokens
                if entry.alone:
                    taken.add(worker)

        for entry in self._entries.values():
            if entry.worker is not None:
                book(entry)
        given = []
        while self._queue:
            entry = self._entries[self._queue[0]]
            fitting = [
                worker
                for worker, room in rooms.items()
                if not count[worker]
                or (
                    worker not in taken
                    and not entry.alone
                    and (held[worker] + entry.held_tokens <= room.kv_tokens if room.batches else count[worker] < 2)
                )
            ]
            if not fitting:
                break
            entry.worker = min(fitting, key=lambda worker: needed[worker])
            book(entry)
            self._queue.popleft()
            given.append((entry.worker, entry.rest()))
        return given

    def count(self, worker: Hashable, output: Output) -> Entry | None:
        """Count what a rank says of a request; None if that is of no interest any more, else the request.

        A rank that has lost a request, because it was given up as lost itself, isn't listened to.
        """
        entry = self._entries.get(output.id)
        if entry is None or entry.worker != worker:
            return None
        if output.finished:
            del self._entries[output.id]
        if entry.ending:
            return None
        entry.tokens += output.tokens
        if output.tokens:
            entry.losses = 0  # it isn't what ends them: what does so once does it again at the same token
        return entry

    def end(self, id: str) -> Hashable | None:
        """The user wants no more of a request: returns the rank that must be told, None if none has it."""
        entry = self._entries.get(id)
        if entry is None or entry.ending:
            return None
        if entry.worker is None:
            self._queue.remove(id)
            del self._entries[id]
            return None
        entry.ending = True
        return entry.worker

    def release(self, worker: Hashable, *, blame: bool = True) -> tuple[list[Entry], list[Entry]]:
        """A rank is gone: its requests go to the front of the queue.

        Args:
            blame: they may be the reason.

        Returns:
            Those that were moved; and those that are given up, because that happened too often.
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
        self._queue.extendleft(entry.request.id for entry in reversed(moved))
        return moved, given_up

    def clear(self) -> list[Entry]:
        """Forget everything; returns what users still wait for."""
        entries = [entry for entry in self._entries.values() if not entry.ending]
        self._entries.clear()
        self._queue.clear()
        return entries

    def check(self) -> None:
        """Assert that the queue and the entries agree."""
        waiting = [id for id, entry in self._entries.items() if entry.worker is None]
        assert sorted(waiting) == sorted(self._queue)
        assert not any(self._entries[id].ending for id in waiting)


class IdleTracker:
    """Decides who must be woken. Ranks sleep when a step's header said that nobody has work, each by itself; a rank that gets
    a request then makes the next step alone, and waits for the others in it.

    All ranks of a epoch fall asleep at the same step. So it is enough to remember up to which step they have been woken:
    whoever sleeps before that, or will say so later, is woken as well.
    """

    def __init__(self) -> None:
        self.epoch = -1
        self._asleep: dict[Hashable, int] = {}
        self._through = 0

    def begin(self, epoch: int) -> None:
        """A new epoch: all of it is awake."""
        self.epoch = epoch
        self._asleep.clear()
        self._through = 0

    def fell_asleep(self, worker: Hashable, epoch: int, step: int) -> None:
        """A rank says that nobody had work in ``step``."""
        if epoch == self.epoch:
            self._asleep[worker] = step

    def ring(self, outstanding: bool) -> tuple[int, Sequence[Hashable]]:
        """Through which step to wake whom, now that requests are outstanding or not."""
        if outstanding and self._asleep:
            self._through = max(self._through, max(self._asleep.values()) + 1)
        late = [worker for worker, step in self._asleep.items() if step < self._through]
        for worker in late:
            del self._asleep[worker]
        return self._through, late
