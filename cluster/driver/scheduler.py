"""``Scheduler``: which rank serves which request, and what follows when a rank is lost. Pure decisions.

    queued     waits for a rank with room, in the order of priority and arrival
    assigned   a rank serves it; its tokens until now are kept here
    ending     the user needs no more of it; its rank's last output is awaited

A request goes to the rank with room that has the least time of work before it (``rank_loads.py``). It waits until some rank
has room, and may go to one that came later. Work is the tokens yet to compute, without a beginning that the rank has in its
cache (``prefix_index.py``). Free cache decides whether a rank fits, not which one is best. A decision takes O(log ranks). A
lost rank's requests return to their place in the queue, and go on after their delivered tokens. A request may be the reason
for the loss of several ranks in a row: then it gets a rank to itself, and in the end is given up.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Literal

from cluster.driver.prefix_index import BLOCK, PrefixIndex, block_hashes
from cluster.driver.rank_loads import RankCapacity, RankLoads
from cluster.driver.request_queue import RequestQueue, next_in_turn
from cluster.driver.role_loads import RoleLoads
from cluster.driver.scheduled_request import Move, MoveClaim, ScheduledRequest
from cluster.messages.hand_over import HandedOver, PromptProgress
from epslots.generation.requests import Output, Request

MOST_MOVES = 2
"""Hand-overs of one rank at a time: each takes memory and time between its steps. Others go on where they are meanwhile."""
RETRY_TOKENS = 8
"""After a hand-over that failed, a request goes on for so many tokens before it tries again; twice as many after the next."""
MOST_LOSSES = 5
"""Losses in a row, without a token, after which a request is given up: it doesn't go on ending ranks."""


class Scheduler:
    """All requests that aren't done. A ``worker`` is any key that stands for a rank's process.

    All ranks of all groups are one set. A group that forms anew pauses its ranks, and they keep their requests. The choices of
    one prompt stay together while their rank has room, because it computes their prompt once.

    Where groups have roles (``role_loads.py``), a request moves once more: after its first token, from the rank that computed
    its prompt to the decode rank with the most free cache. A move may begin before that token, so that most of the cache is
    there by then (``hand_over_costs.py``). Until the move has ended well the request is the first rank's. Short prompts are
    computed where they decode, and wait in a line of their own (``request_queue.py``).
    """

    def __init__(self) -> None:
        self._entries: dict[str, ScheduledRequest] = {}
        self._numbers = itertools.count()
        self._ranks = RoleLoads()
        self._queue = RequestQueue(self._is_short)
        self._moves: dict[str, Move] = {}
        """By request: hand-overs under way."""
        self._moving: Counter[Hashable] = Counter()
        """By rank: those that it is the source or the target of."""
        self._prefixes = PrefixIndex()
        self._served: dict[Hashable, dict[str, ScheduledRequest]] = {}
        """By rank: its requests, in the order in which it got them."""
        self._choices: dict[str, dict[str, ScheduledRequest]] = {}
        """By ``siblings``: the choices of a prompt that has several."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, id: str) -> bool:
        return id in self._entries

    @property
    def queued(self) -> int:
        """Requests that wait for a rank."""
        return len(self._queue)

    def served_by(self, worker: Hashable) -> list[ScheduledRequest]:
        """A rank's requests."""
        return list(self._served.get(worker, {}).values())

    def worker_of(self, id: str) -> Hashable | None:
        """The rank that serves a request; None if none does."""
        entry = self._entries.get(id)
        return None if entry is None or entry.ending else entry.worker

    def busy(self, workers: Iterable[Hashable]) -> bool:
        """Whether any of these ranks has a request that makes steps: one that is handed over, after its prompt, doesn't."""
        served = (item for worker in workers for item in self._served.get(worker, {}).items())
        return any(not entry.began or id not in self._moves for id, entry in served)

    def longest_wait_s(self, now_s: float) -> float:
        """The longest time that a request is without its first token, wherever it waits; 0 if all have one."""
        without = [entry.arrived_s for entry in self._entries.values() if not entry.tokens and not entry.ending]
        return now_s - min(without, default=now_s)

    # Ranks.

    def serve(self, capacities: Mapping[Hashable, RankCapacity]) -> None:
        """A group's ranks take requests from now on. Of equally loaded ones, the first of each group come first."""
        divided = self._ranks.divided
        for place, (worker, capacity) in enumerate(capacities.items()):
            self._ranks.serve(worker, capacity, place)
        if self._ranks.divided and not divided:
            self._queue.divide()

    def pause(self, workers: Iterable[Hashable], *, soon: bool = False) -> None:
        """These ranks take no further requests until they serve again, which is expected ``soon`` or isn't."""
        for worker in workers:
            self._ranks.pause(worker, soon=soon)

    def release(self, worker: Hashable, *, blame: bool = True) -> tuple[list[ScheduledRequest], list[ScheduledRequest]]:
        """A rank is lost: its requests return to the queue.

        Args:
            blame: they may be the reason.

        Returns:
            The requests that return to the queue; and those that are given up, after too many losses.
        """
        requeued, given_up = [], []
        for entry in self._served.pop(worker, {}).values():
            self._drop_move(entry.request.id)
            if entry.ending:
                self._forget(entry)
                continue
            entry.losses += blame
            if entry.losses >= MOST_LOSSES:
                self._forget(entry)
                given_up.append(entry)
            else:
                entry.worker = None
                requeued.append(entry)
                self._queue.add(entry)
        self._ranks.remove(worker)
        self._prefixes.forget(worker)
        return requeued, given_up

    # Requests.

    def add(self, choices: Sequence[Request], now_s: float = 0.0) -> None:
        """Queue the choices of one prompt, whose ids must be new."""
        blocks = block_hashes(choices[0].prompt)
        for request in choices:
            assert request.id not in self._entries
            entry = ScheduledRequest(request, choices[0].id, next(self._numbers), now_s, blocks=blocks)
            self._entries[request.id] = entry
            if len(choices) > 1:
                self._choices.setdefault(entry.siblings, {})[request.id] = entry
            self._queue.add(entry)

    def _is_short(self, entry: ScheduledRequest) -> bool:
        return self._ranks.divided and self._ranks.may_stay(entry, self._reused_by(*self._prefixes.longest(entry.blocks)))

    def _forget(self, entry: ScheduledRequest) -> None:
        del self._entries[entry.request.id]
        if (choices := self._choices.get(entry.siblings)) is not None:
            del choices[entry.request.id]
            if not choices:
                del self._choices[entry.siblings]

    def assign(self) -> list[tuple[Hashable, Request]]:
        """Assign queued requests to ranks with room; returns pairs of rank and request.

        Each role has its turns: no request overtakes one that waits for a rank of the same role, or requests of little room
        would overtake it for ever. Requests for other roles don't wait for it.
        """
        assigned, full = [], set[RankLoads]()
        lines = self._queue.lines()
        while (found := next_in_turn(lines)) is not None:
            line, entry = found
            reused, holders = self._prefixes.longest(entry.blocks)
            loads = self._ranks.for_prompt(entry, self._reused_by(reused, holders))
            worker = None if loads in full else self._choose(entry, loads, reused, holders)
            if worker is None:
                full.add(loads)
                lines.remove(line)
                continue
            entry.reused = reused if worker in holders else 0
            self._give(worker, entry)
            assigned.append((worker, entry.rest()))
        return assigned

    def _reused_by(self, reused: int, holders: Collection[Hashable]) -> Callable[[RankLoads], int]:
        return lambda ranks: reused if any(holder in ranks for holder in holders) else 0

    def _choose(
        self, entry: ScheduledRequest, loads: RankLoads, reused: int, holders: Collection[Hashable]
    ) -> Hashable | None:
        """The rank for a request, among those with room; None if there is none.

        Args:
            loads: of the ranks that may take it.
            reused, holders: tokens of its prompt that these ranks needn't compute.
        """
        siblings = (sibling.worker for sibling in self._choices.get(entry.siblings, {}).values())
        for worker in siblings:
            if worker is not None and loads.fits(worker, entry):
                return worker
        if (least_loaded := loads.least_loaded(entry)) is None:
            return None
        those = (*(holder for holder in holders if loads.fits(holder, entry)), least_loaded)
        return min(those, key=lambda worker: loads.cost(worker, -reused if worker in holders else 0))

    def _give(self, worker: Hashable, entry: ScheduledRequest) -> None:
        entry.began, entry.computed = False, 0
        self._queue.discard(entry)
        self._place(worker, entry)
        capacity = self._ranks.of(worker).capacity(worker)
        if capacity.shares_prefixes:
            self._prefixes.enter(worker, entry.blocks, capacity.kv_tokens // BLOCK)

    def _place(self, worker: Hashable, entry: ScheduledRequest) -> None:
        entry.worker, entry.leaves = worker, self._ranks.hands_over(worker)
        entry.assignment += 1
        self._ranks.of(worker).add(worker, entry)
        self._served.setdefault(worker, {})[entry.request.id] = entry

    def count(self, worker: Hashable, output: Output) -> ScheduledRequest | None:
        """Enter a rank's output; returns its request, or None if no caller needs the output.

        An output of an earlier assignment is refused: that of a rank that was taken for lost, or from before a hand-over, even
        if the request has come back to that rank since.
        """
        entry = self._entries.get(output.id)
        if entry is None or not entry.is_at(worker, output.assignment):
            return None
        loads = self._ranks.of(worker)
        if output.finished:
            loads.drop(worker, entry)
            del self._served[worker][output.id]
            self._forget(entry)
        if entry.ending:
            return None
        if not output.finished:
            loads.drop(worker, entry)
        entry.tokens += output.tokens
        entry.prompt_logprobs += len(output.prompt_logprobs)
        if output.tokens:
            entry.began = True
            entry.losses = 0  # it isn't the reason: that would end every rank at the same token
        if not output.finished:
            loads.add(worker, entry)
        return entry

    def end(self, id: str) -> Hashable | None:
        """End a request for its user; returns the rank that has to cancel it, or None."""
        entry = self._entries.get(id)
        if entry is None or entry.ending:
            return None
        if entry.worker is None:
            self._forget(entry)
            self._queue.discard(entry)
            return None
        entry.ending = True
        return entry.worker

    # Hand-overs.

    def begin_move(self, id: str) -> Move | None:
        """Begin a request's hand-over to a decode rank; None if it is to go on where it is.

        Its rank has just sent an output of it, after which it makes no steps until ``end_move``.
        """
        entry = self._entries[id]
        if not entry.began or len(entry.tokens) < entry.move_at or self._moving[entry.worker] >= MOST_MOVES:
            return None
        return self._begin_move(entry)

    def begin_early_move(self, worker: Hashable, prompt: PromptProgress) -> Move | None:
        """Begin a request's hand-over while its prompt is computed, if that pays now.

        At most one a rank, and one try a request: others have their first token, and stand still until they are moved.

        Args:
            worker: the rank that computes the prompt.
        """
        entry = self._entries.get(prompt.id)
        if entry is None or not entry.is_at(worker, prompt.assignment) or entry.began:
            return None
        chunk, entry.computed = prompt.computed - entry.computed, prompt.computed
        if entry.failed_moves or self._moving[worker]:
            return None
        return self._begin_move(entry, lambda near: self._ranks.costs.begins_early(prompt.computed, prompt.left, chunk, near))

    def _begin_move(self, entry: ScheduledRequest, early: Callable[[bool], bool] | None = None) -> Move | None:
        """Begin a hand-over, unless there is no way or no reason.

        Args:
            early: whether it begins before the prompt is computed, to a rank with which memory is shared or isn't; None = the
                prompt is computed.
        """
        id = entry.request.id
        if entry.worker is None or entry.ending or entry.alone or id in self._moves:
            return None
        if not self._ranks.costs.is_worth(entry.left_tokens) or not self._ranks.hands_over(entry.worker):
            return None
        claim = MoveClaim(entry.held_tokens + BLOCK, entry.left_tokens)
        if (target := self._ranks.for_decoding(claim)) is None or self._moving[target] >= MOST_MOVES:
            return None
        near = self._ranks.share_memory(entry.worker, target)
        if early is not None and not early(near):
            return None
        move = self._moves[id] = Move(entry, entry.worker, target, claim, near, early=early is not None)
        self._ranks.of(target).add(target, claim)
        self._moving.update((entry.worker, target))
        return move

    def end_move(self, move: Move, *, done: bool) -> Literal["moved", "stays", "gone"]:
        """A hand-over has ended; returns whether its request is now the target's, the source's, or neither's.

        Args:
            done: the target has its cache.
        """
        entry, id = move.entry, move.entry.request.id
        if self._moves.get(id) is not move:
            return "gone"
        self._drop_move(id)
        if self._entries.get(id) is not entry or entry.ending:
            return "gone"
        if not done or move.target not in self._ranks:
            if entry.began:  # else it failed early, and the next try is the one after the prompt
                entry.move_at = len(entry.tokens) + RETRY_TOKENS * 2**entry.failed_moves
            entry.failed_moves += 1
            return "stays"
        self._ranks.of(move.source).drop(move.source, entry)
        del self._served[move.source][id]
        self._place(move.target, entry)
        return "moved"

    def _drop_move(self, id: str) -> None:
        if (move := self._moves.pop(id, None)) is not None:
            self._ranks.of(move.target).drop(move.target, move.claim)
            for worker in (move.source, move.target):
                self._moving[worker] -= 1
                if not self._moving[worker]:
                    del self._moving[worker]

    def moves_of(self, worker: Hashable) -> int:
        """Hand-overs under way from or to a rank; any thread may ask."""
        return self._moving[worker]

    def observe_move(self, move: Move, end: HandedOver) -> None:
        """Note the costs of a hand-over that has ended well."""
        costs, near = self._ranks.costs, move.near
        costs.observe(end.tokens, end.copying_s, end.prompt_token_s, end.nbytes, end.step_bytes, near=near)

    def clear(self) -> list[ScheduledRequest]:
        """Drop all requests; returns those that users still wait for."""
        entries = [entry for entry in self._entries.values() if not entry.ending]
        for entry in list(self._entries.values()):
            if entry.worker is not None:
                self._ranks.of(entry.worker).drop(entry.worker, entry)
            self._forget(entry)
        for id in list(self._moves):
            self._drop_move(id)
        self._served.clear()
        self._queue.clear()
        return entries

    def check(self) -> None:
        """Assert that the queue, the ranks' loads and the entries agree."""
        waiting = [entry for entry in self._entries.values() if entry.worker is None]
        assert len(waiting) == len(self._queue)
        assert set(waiting) == set(self._queue)
        assert not any(entry.ending for entry in waiting)
        served = [(worker, entry) for worker, has in self._served.items() for entry in has.values()]
        assert {entry.request.id for _, entry in served} == {
            id for id, entry in self._entries.items() if entry.worker is not None
        }
        assert all(entry.worker == worker for worker, entry in served)
        assert all(move.entry.worker == move.source for move in self._moves.values())
        assert self._moving == Counter(worker for move in self._moves.values() for worker in (move.source, move.target))
        claims = [(move.target, move.claim) for move in self._moves.values() if move.target in self._ranks]
        self._ranks.check([*served, *claims])
