"""Requests on their way between those who call and the ranks: who serves what (``scheduler.py``), and what comes back.

Runs in the supervisor's thread. It sends commands and takes outputs, and knows nothing of processes and groups.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from cluster.driver.scheduler import IdleTracker, RankLoad, Scheduler
from cluster.errors import ClusterError
from cluster.messages.rank import Cancel, Command, Submit, Wake
from epslots.engine.requests import Output, Reason, Request
from epslots.engine.text import TextStream

# How long a request waits for others: ranks that get many in one message need fewer steps than if each began one more.
_TOGETHER_S = 0.005


class Caller(Protocol):
    """Whoever waits for a request. Called from the supervisor's thread, and returns at once."""

    def arrive(self, tokens: Sequence[int], reason: Reason | None, error: str | None) -> None:
        """More tokens; and why there will be no others, if so."""

    def fail(self, error: ClusterError) -> None:
        """The cluster can't go on."""


@dataclass(eq=False)
class _Call:
    caller: Caller
    watch: TextStream | None
    """Looks for stop strings, if there are any."""


class RequestRouter:
    """Hands requests to ranks.

    Args:
        send: sends a command to a rank, in the background and in order.
        tokenizer: gives what to find stop strings with; asked when a request has some.
    """

    def __init__(
        self, send: Callable[[Hashable, Command], None], tokenizer: Callable[[], PreTrainedTokenizerBase | None]
    ) -> None:
        self._send = send
        self._tokenizer = tokenizer
        self._ledger = Scheduler()
        self._alarm = IdleTracker()
        self._calls: dict[str, _Call] = {}
        self._rooms: dict[Hashable, RankLoad] = {}
        self._paused = True
        self._planned = False

    @property
    def queued(self) -> int:
        """Requests that wait for a rank."""
        return self._ledger.queued

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._ledger)

    def count_served(self, worker: Hashable) -> int:
        """Requests that a rank has."""
        return len(self._ledger.served_by(worker))

    def submit(self, request: Request, caller: Caller, stop: Sequence[str]) -> None:
        """Take a request, which has been checked."""
        watch = None
        if stop:
            tokenizer = self._tokenizer()
            assert tokenizer is not None, "the request was checked"
            watch = TextStream(tokenizer, stop)
        self._calls[request.id] = _Call(caller, watch)
        self._ledger.add(request)
        self._plan()

    def cancel(self, id: str) -> None:
        """The caller wants no more of a request; one that is done is no error."""
        call = self._calls.pop(id, None)
        if call is not None:
            self._stop(id)
            call.caller.arrive((), "cancelled", None)

    def _stop(self, id: str) -> None:
        worker = self._ledger.end(id)
        if worker is not None:
            self._send(worker, Cancel((id,)))

    def begin(self, epoch: int) -> None:
        """A epoch is about to form. Its ranks may fall asleep before all of them have said that they stand."""
        self._alarm.begin(epoch)

    def serve(self, rooms: dict[Hashable, RankLoad]) -> None:
        """The group stands: these are its ranks, in order."""
        self._rooms = dict(rooms)
        self._paused = False
        self._plan()

    def pause(self) -> None:
        """The group is broken: give nothing away until ``serve``."""
        self._paused = True

    def take(self, worker: Hashable, outputs: Sequence[Output]) -> None:
        """What a rank says of its requests."""
        for output in outputs:
            entry = self._ledger.count(worker, output)
            call = self._calls.get(output.id)
            if entry is None or call is None:
                continue
            tokens, reason = output.tokens, output.reason
            if call.watch is not None:
                call.watch.push(tokens)
                if call.watch.stopped_after is not None:
                    before = len(entry.tokens) - len(tokens)
                    tokens, reason = tuple(entry.tokens[before : call.watch.stopped_after]), "stop"
                    if not output.finished:
                        self._stop(output.id)
            if reason is not None:
                del self._calls[output.id]
            elif not tokens:
                continue
            call.caller.arrive(tokens, reason, output.error)
        if any(output.finished for output in outputs):
            self._plan()

    def fell_asleep(self, worker: Hashable, epoch: int, step: int) -> None:
        """A rank says that nobody had work."""
        self._alarm.fell_asleep(worker, epoch, step)
        self._wake()

    def lose(self, worker: Hashable, *, blame: bool, cause: str) -> int:
        """A rank is gone; returns how many requests are moved."""
        self._rooms.pop(worker, None)
        moved, given_up = self._ledger.release(worker, blame=blame)
        for entry in given_up:
            call = self._calls.pop(entry.request.id)
            message = f"{entry.losses} ranks were lost while they served this request, none got on; the last one: {cause}"
            call.caller.arrive((), "error", message)
        self._plan()
        return len(moved)

    def fail(self, error: ClusterError) -> None:
        """Nothing can be served any more."""
        self._ledger.clear()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.caller.fail(error)

    def _plan(self) -> None:
        """Give requests away soon, once for all that come in together."""
        if not self._planned and not self._paused:
            self._planned = True
            asyncio.get_running_loop().call_later(_TOGETHER_S, self._give)

    def _give(self) -> None:
        self._planned = False
        if self._paused:
            return
        given = defaultdict(list)
        for worker, request in self._ledger.assign(self._rooms):
            given[worker].append(request)
        for worker, requests in given.items():
            self._send(worker, Submit(tuple(requests)))
        self._wake()

    def _wake(self) -> None:
        step, sleepers = self._alarm.ring(self._ledger.outstanding)
        for worker in sleepers:
            self._send(worker, Wake(self._alarm.epoch, step))
