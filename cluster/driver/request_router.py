"""``RequestRouter``: carries requests from callers to ranks, and ranks' outputs back to callers.

It runs in the supervisor's thread, sends commands and takes outputs, and knows nothing of processes and groups.
``scheduler.py`` decides which rank gets which request.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cluster.driver.hand_overs import HandOvers
from cluster.driver.idle_tracker import IdleTracker
from cluster.driver.rank_loads import RankCapacity
from cluster.driver.scheduler import Scheduler
from cluster.driver.workers import Deadlines
from cluster.errors import ClusterError
from cluster.messages.hand_over import HandedOver, HandOverContact, PromptProgress
from cluster.messages.rank import Cancel, Command, Submit, Wake
from epslots.generation.portions import push_until_stop
from epslots.generation.requests import Output, Request
from epslots.generation.text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NUMBER_BITS = 48  # of a driver's first hand-over: no two drivers of the same ranks use one number
# A request waits this long for others: ranks that get many in one message need fewer steps than if each began one more.
TOGETHER_S = 0.005
SOON_S = 2.0
"""A group that broke serves again so soon, mostly in a tenth of it. Prompts that only it is to compute wait for so long."""


class Caller(Protocol):
    """The receiver of a request's outputs. Called from the supervisor's thread, and returns at once."""

    def arrive(self, output: Output) -> None:
        """Take the next output; the last one has a reason."""

    def fail(self, error: ClusterError) -> None:
        """Take the cluster's failure as the end."""


@dataclass(eq=False)
class _Call:
    """A request's receiver, and the stream that finds stop strings, if the request has some."""

    caller: Caller
    stop_stream: TextStream | None


class RequestRouter:
    """Sends requests to ranks, and outputs to callers.

    Args:
        send: sends a command to a rank, in the background and in order.
        tokenizer: returns the tokenizer; called for requests with stop strings.
        deadlines: of hand-overs; None = the default ones.

    Attributes:
        hand_overs: from the ranks that compute prompts to those that decode.
    """

    def __init__(
        self,
        send: Callable[[Hashable, Command], None],
        tokenizer: Callable[[], PreTrainedTokenizerBase | None],
        deadlines: Deadlines | None = None,
    ) -> None:
        self._send = send
        self._tokenizer = tokenizer
        self._scheduler = Scheduler()
        times = deadlines or Deadlines()
        self.hand_overs = HandOvers(
            self._scheduler, send, form_s=times.form_s, deadline_s=times.operation_s, first=secrets.randbits(_NUMBER_BITS)
        )
        self._groups: list[GroupRouter] = []
        self._calls: dict[str, _Call] = {}
        self._assignment_due = False

    @property
    def queued(self) -> int:
        """Requests that wait for a rank."""
        return self._scheduler.queued

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._scheduler)

    @property
    def longest_wait_s(self) -> float:
        """The longest time that a request is without its first token. In the loop's thread."""
        return self._scheduler.longest_wait_s(asyncio.get_running_loop().time())

    def count_served(self, worker: Hashable) -> int:
        """The number of a rank's requests."""
        return len(self._scheduler.served_by(worker))

    def worker_of(self, id: str) -> Hashable | None:
        """The rank that serves a request; None if none does."""
        return self._scheduler.worker_of(id)

    # Requests.

    def submit(self, choices: Sequence[tuple[Request, Caller]], stop: Sequence[str]) -> None:
        """Take the choices of one checked prompt, with the strings that end their texts."""
        for request, caller in choices:
            stop_stream = None
            if stop:
                tokenizer = self._tokenizer()
                assert tokenizer is not None, "the request was checked"
                stop_stream = TextStream(tokenizer, stop, request.sampling.min_tokens)
            self._calls[request.id] = _Call(caller, stop_stream)
        self._scheduler.add([request for request, _ in choices], asyncio.get_running_loop().time())
        self._assign_soon()

    def cancel(self, id: str) -> None:
        """End a request for its caller; does nothing if it is done."""
        call = self._calls.pop(id, None)
        if call is not None:
            self._cancel_on_rank(id)
            call.caller.arrive(Output(id, (), True, "cancelled"))

    def _cancel_on_rank(self, id: str) -> None:
        worker = self._scheduler.end(id)
        if worker is not None:
            self._send(worker, Cancel((id,)))

    def fail(self, error: ClusterError) -> None:
        """End all requests with an error."""
        self._scheduler.clear()
        self.hand_overs.clear()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.caller.fail(error)

    # Groups of ranks.

    def open_group(self) -> GroupRouter:
        """A further group of ranks; it serves none yet."""
        self._groups.append(group := GroupRouter(self._scheduler, self._send, self._assign_soon, self._stop_waiting))
        return group

    def _stop_waiting(self, ranks: Sequence[Hashable]) -> None:
        """A group hasn't come back in time: its requests are others' now."""
        self._scheduler.pause(ranks)
        self.hand_overs.give_up(ranks)
        self._assign_soon()

    def close_group(self, group: GroupRouter) -> None:
        """A group is no more; its ranks are lost already."""
        self._groups.remove(group)

    def pause(self) -> None:
        """Assign no request to any rank until its group serves again."""
        for group in self._groups:
            group.pause()

    def lose(self, worker: Hashable, *, blame: bool, cause: str) -> int:
        """A rank is lost; returns the number of its requests that return to the queue.

        Args:
            blame: its requests may be the reason.
            cause: why it is lost, for people.
        """
        requeued, given_up = self._scheduler.release(worker, blame=blame)
        self.hand_overs.lose(worker)
        for entry in given_up:
            call = self._calls.pop(entry.request.id)
            message = (
                f"given up after {entry.losses} ranks in a row were lost while they served this request, without a token in "
                f"between; it may be the reason. The last loss: {cause}"
            )
            call.caller.arrive(Output(entry.request.id, (), True, "error", message))
        self._assign_soon()
        return len(requeued)

    # Events of ranks.

    def take(self, worker: Hashable, outputs: Sequence[Output]) -> None:
        """Take a rank's outputs."""
        for output in outputs:
            entry, call = self._scheduler.count(worker, output), self._calls.get(output.id)
            if entry is not None and call is not None:
                self._deliver(call, output)
                if not output.finished:
                    self.hand_overs.consider(output.id)
        if any(output.finished for output in outputs):
            self._assign_soon()

    def take_hand_over(self, worker: Hashable, event: HandedOver | HandOverContact | PromptProgress) -> None:
        """Take a rank's news of a hand-over, or of a prompt before one."""
        match event:
            case PromptProgress():
                self.hand_overs.consider_early(worker, event)
            case HandOverContact():
                self.hand_overs.pass_on(worker, event)
            case HandedOver():
                self.hand_overs.take(worker, event)
                self._assign_soon()  # it wakes the request's group, too

    def _deliver(self, call: _Call, output: Output) -> None:
        """Pass an output on to the caller, up to a stop string."""
        told = output
        if call.stop_stream is not None:
            _, told = push_until_stop(call.stop_stream, output)
            if told.finished and not output.finished:
                self._cancel_on_rank(output.id)
        if told.finished:
            del self._calls[output.id]
        elif not told.tokens and not told.prompt_logprobs:
            return
        call.caller.arrive(told)

    # Assignment.

    def _assign_soon(self) -> None:
        """Assign waiting requests soon, once for all that come in together."""
        if not self._assignment_due and any(group.serves for group in self._groups):
            self._assignment_due = True
            asyncio.get_running_loop().call_later(TOGETHER_S, self._assign)

    def _assign(self) -> None:
        self._assignment_due = False
        assigned = defaultdict(list)
        for worker, request in self._scheduler.assign():
            assigned[worker].append(request)
        for worker, requests in assigned.items():
            self._send(worker, Submit(tuple(requests)))
        for group in self._groups:
            group.wake()


class GroupRouter:
    """One group's side of the router: its ranks serve, pause, fall asleep and are woken together.

    Args:
        scheduler: of all groups.
        assign_soon: assigns waiting requests.
        stop_waiting: the group doesn't come back soon; it gets its ranks.

    Attributes:
        serves: the group takes requests.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        send: Callable[[Hashable, Command], None],
        assign_soon: Callable[[], None],
        stop_waiting: Callable[[Sequence[Hashable]], None],
    ) -> None:
        self._scheduler, self._send = scheduler, send
        self._assign_soon, self._stop_waiting = assign_soon, stop_waiting
        self._idle = IdleTracker()
        self._ranks: tuple[Hashable, ...] = ()
        self.serves = False
        self._pauses = 0

    @property
    def handing_over(self) -> int:
        """Hand-overs under way from or to the group's ranks; any thread may ask."""
        return sum(map(self._scheduler.moves_of, self._ranks))

    def begin(self, epoch: int) -> None:
        """A new epoch is about to form. Its ranks may fall asleep before all of them have reported ``Formed``."""
        self._idle.begin(epoch)

    def serve(self, capacities: Mapping[Hashable, RankCapacity]) -> None:
        """The group has formed: assign requests to these ranks, given in the order of their numbers."""
        self._ranks, self.serves = tuple(capacities), True
        self._scheduler.serve(capacities)
        self._assign_soon()

    def pause(self) -> None:
        """The group is broken: assign no request to its ranks until ``serve``. They keep those that they have.

        Again while it forms, it does nothing: prompts wait for the group once.
        """
        if not self.serves:
            return
        self.serves = False
        self._scheduler.pause(self._ranks, soon=True)
        self._pauses += 1
        asyncio.get_running_loop().call_later(SOON_S, self._look, self._pauses)

    def _look(self, pause: int) -> None:
        if not self.serves and pause == self._pauses:
            self._stop_waiting(self._ranks)

    def fell_asleep(self, worker: Hashable, epoch: int, step: int) -> None:
        """A rank reports that no rank of its group had work in this step."""
        self._idle.fell_asleep(worker, epoch, step)
        self.wake()

    def wake(self) -> None:
        """Wake the ranks that sleep while another one of the group has work."""
        self._wake(self._scheduler.busy(self._ranks))

    def wake_others(self, epoch: int) -> None:
        """A rank that slept begins a step by itself: wake all others for it."""
        if epoch == self._idle.epoch:
            self._wake(True)

    def _wake(self, outstanding: bool) -> None:
        step, sleepers = self._idle.wake(outstanding)
        for worker in sleepers:
            self._send(worker, Wake(self._idle.epoch, step))
