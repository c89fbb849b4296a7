"""A cluster for the HTTP service, without a model: its one rank says what a test tells it. Requests and streams are real."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

from cluster.driver.loop_thread import LoopThread
from cluster.driver.rank_loads import RankCapacity
from cluster.driver.request_router import RequestRouter
from cluster.errors import ClusterError, Overloaded
from cluster.generation import Generation, PromptChoice
from cluster.messages.controller import Explanation
from cluster.messages.rank import Cancel, Command, Submit
from cluster.queue_room import HeldPlaces, QueueRoom
from cluster.reports import ClusterState, ClusterStats
from cluster.token_stream import TokenStream
from epslots.errors import ConfigError
from epslots.generation.chat_template import Chat
from epslots.generation.engine_stats import EngineStats
from epslots.generation.request_checker import RequestChecker
from epslots.generation.request_limits import ModelLimits
from epslots.generation.requests import Output, Request, TokenLogprobs
from epslots.generation.settings import read_settings
from epslots.telemetry import Stats
from tests.support.tokenizers import TOKENIZERS

LIMITS = ModelLimits(capacity=600, vocabulary=2048, context=512, end_tokens=(0,))
SAYS = "one two three four five"


def scored(token: int, top: int) -> TokenLogprobs:
    """A log-probability that says which token it is of."""
    logprob = -1 - token / 1000
    return TokenLogprobs(token, logprob, tuple((token + number, logprob - number) for number in range(top)))


@lru_cache
def tokens_of(text: str) -> tuple[int, ...]:
    """A text's tokens."""
    return tuple(TOKENIZERS["bytes"].encode(text, add_special_tokens=False))


class ScriptedCluster:
    """A ``ServedCluster``.

    Args:
        says: the text of every answer, cut by ``max_new_tokens``; or a function of the request.
        held: answers wait for ``go_on``.
        places: room in the queue.
    """

    def __init__(self, says: str | Callable[[Request], str] = SAYS, *, held: bool = False, places: int = 64) -> None:
        self.tokenizer: Any = TOKENIZERS["bytes"]
        self.says, self.held = says, held
        self._room = QueueRoom(places)
        self.limits = LIMITS
        self.timeline = {"model loaded": 1.0}
        self.failure: str | None = None
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.fails: str | None = None
        """Why every request fails."""
        self.asked_stats = 0
        self._checker = RequestChecker(LIMITS, self.tokenizer)
        self._answers: dict[str, list[Output]] = {}
        self._changed = threading.Condition()
        self._thread = LoopThread("scripted-cluster")
        self._router = RequestRouter(self._send, lambda: self.tokenizer)
        self._thread.call(self._begin())

    async def _begin(self) -> None:
        group = self._router.open_group()
        group.begin(1)
        group.serve({"rank": RankCapacity(kv_tokens=10**9, max_requests=10**6)})

    def __enter__(self) -> ScriptedCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._thread.end()

    # The rank.

    def _send(self, worker: object, command: Command) -> None:
        match command:
            case Submit(requests):
                for request in requests:
                    self.requests.append(request)
                    self._answers[request.id] = self._outputs(request)
                    if not self.held:
                        self._thread.tell(self._say, request.id, 10**9)
            case Cancel(ids):
                self.cancelled += ids
                for id in ids:
                    self._answers.pop(id, None)
                self._router.take("rank", [Output(id, (), True, "cancelled") for id in ids])
        with self._changed:
            self._changed.notify_all()

    def _outputs(self, request: Request) -> list[Output]:
        if self.fails is not None:
            return [Output(request.id, (), True, "error", self.fails)]
        text = self.says if isinstance(self.says, str) else self.says(request)
        tokens = list(tokens_of(text))[: request.max_new_tokens]
        ended = len(tokens) < request.max_new_tokens
        if ended and 0 in request.stop_tokens:
            tokens.append(0)
        outputs = []
        if request.prompt_logprobs is not None:
            of_prompt = tuple(scored(token, request.prompt_logprobs) for token in request.prompt[1:])
            half = len(of_prompt) // 2
            outputs += [Output(request.id, (), prompt_logprobs=part) for part in (of_prompt[:half], of_prompt[half:]) if part]
        for token in tokens:
            logprobs = () if request.logprobs is None else (scored(token, request.logprobs),)
            outputs.append(Output(request.id, (token,), logprobs=logprobs))
        return [*outputs, Output(request.id, (), True, "stop" if ended else "length")]

    def _say(self, id: str, count: int) -> None:
        outputs = self._answers.get(id, [])
        now, self._answers[id] = outputs[:count], outputs[count:]
        if now:
            self._router.take("rank", now)

    def go_on(self, count: int = 10**9) -> None:
        """Let every held answer go on by so many outputs. The last ones may let a draining service close this cluster."""
        for id in list(self._answers):
            self._thread.tell(self._say, id, count)
        with suppress(ClusterError):
            self._thread.flush()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait for what the rank is told."""
        with self._changed:
            assert self._changed.wait_for(condition, seconds)

    # The driver.

    @property
    def end_tokens(self) -> frozenset[int]:
        return self._checker.end_tokens

    def encode(self, prompt: str | Chat, *, special_tokens: bool = True, most_tokens: int | None = None) -> list[int]:
        return self._checker.encode(prompt, special_tokens=special_tokens, most_tokens=most_tokens)

    def hold(self, requests: int) -> HeldPlaces | None:
        return self._room.hold(requests)

    def submit_choices(self, prompt: Sequence[int], *, places: HeldPlaces | None = None, **settings: Any) -> list[Generation]:
        if self.failure is not None:
            raise ClusterError(self.failure)
        read = read_settings(settings)
        requests = self._checker.requests(prompt, read)
        if not (self._room.take(read.n, wait=False) if places is None else places.use(read.n)):
            raise Overloaded("full, says the test")
        streams = [TokenStream(self._room.give) for _ in requests]
        made = [
            Generation(
                PromptChoice(0, prompt, read, number, request),
                tokenizer=self.tokenizer,
                stream=stream,
                cancel=partial(self._thread.hint, self._router.cancel, request.id),
                check_process=lambda: None,
            )
            for number, request, stream in zip(itertools.count(), requests, streams, strict=False)
        ]
        self._thread.tell(self._router.submit, list(zip(requests, streams, strict=True)), read.stops)
        return made

    def state(self) -> ClusterState:
        return ClusterState(
            ranks=0 if self.failure else 2,
            epoch=3,
            queued=0,
            running=self._router.unfinished,
            free=self._room.free,
            places=self._room.places,
            failure=self.failure,
        )

    def explain(self, group: int = 0) -> Explanation:
        raise ConfigError("window_steps=0, says the test")

    def stats(self, layers: Sequence[int] = ()) -> ClusterStats:
        self.asked_stats += 1
        if self.failure is not None:
            raise ConfigError(self.failure)
        engine = EngineStats(
            steps=5,
            replayed_steps=0,
            crowded_steps=0,
            ragged_steps=0,
            graph_bytes=0,
            prompt_tokens=30,
            new_tokens=9,
            reused_tokens=10,
            preempted=1,
            running=2,
            waiting=0,
            kv_used=25,
            kv_tokens=100,
        )
        return ClusterStats(
            epoch=3,
            queued=0,
            ranks=(),
            total=Stats((), steps=8, zero_miss_steps=6),
            engine=engine,
            controllers=(),
            missing=("rank 2 is being replaced",),
            longest_wait_s=2.5,
        )

    def break_down(self, reason: str) -> None:
        """The cluster can't go on."""
        self.failure = reason
        self._thread.tell(self._router.fail, ClusterError(reason))
