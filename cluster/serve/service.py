"""``Service``: the model behind the endpoints, its phases, and the requests that run.

starting -> ready -> draining        the phases; or failed, from any of these
admit -> encode -> start -> read     a request's life (``endpoints.py`` goes through it)
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar
from weakref import WeakSet

from cluster.messages.controller import Explanation
from cluster.queue_room import HeldPlaces
from cluster.reports import ClusterStats
from cluster.serve.access_log import AccessLog
from cluster.serve.bridge import ChoiceReader, NewsRelay, PolledGeneration
from cluster.serve.cluster_metrics import ServiceSample
from cluster.serve.config import ServeConfig
from cluster.serve.errors import ApiError, of_cluster, overloaded, refused, unavailable, without_paths
from cluster.serve.latencies import RecentLatencies
from cluster.serve.live_frame import Known
from cluster.serve.metrics import Metrics
from cluster.serve.request_settings import API_NAMES, GRAMMARS
from cluster.serve.request_summary import RequestSummary
from cluster.serve.sampler import Sampler
from cluster.serve.served_model import ServedCluster, ServedModel
from epslots.errors import ConfigError, EpslotsError
from epslots.generation.chat_template import RENDERERS, Chat

logger = logging.getLogger("epslots.serve")
Phase = Literal["starting", "ready", "draining", "failed"]
_EXPLAIN_EVERY_S = 5.0
_GOODBYE_S = 2.0  # for errors to requests that are cut off
_PROMPT_THREADS = 2
"""They tokenize prompts and check requests: processor time, most of it without Python's lock."""

QUICK = 2048
"""Characters or tokens of a request's prompts that are read in some hundred microseconds, without a thread."""

_CHOICE_COSTS = 16
"""A choice takes as long to start as so many tokens to check."""

_MOST_CHARS = 2**20
"""Characters of a prompt that needn't fit, or more where contexts are long: half a second."""

Value = TypeVar("Value")


class Service:
    """One model for any number of clients. Methods are for the loop's thread, but for ``attach`` and ``fail``.

    Args:
        config: its settings.
        log: the access log; None = none.
    """

    def __init__(self, config: ServeConfig, log: AccessLog | None = None) -> None:
        self.config, self._log = config, log
        self.metrics = Metrics(config.names[0], self._sample)
        self._model: ServedModel | None = None
        self._phase: Phase = "starting"
        self._first_epoch = 0
        self._preparing = 0
        self._readers: WeakSet[ChoiceReader] = WeakSet()
        self._idle = asyncio.Event()
        self._threads = ThreadPoolExecutor(_PROMPT_THREADS, "epslots-prompts")
        # Of their own: they wait for templates, which may take seconds, and no other request is to wait with them.
        self._chat_threads = ThreadPoolExecutor(RENDERERS, "epslots-chats")
        self.sampler: Sampler[ClusterStats] | None = None
        """The ranks' numbers."""
        self._explanations: Sampler[tuple[Explanation | None, ...]] | None = None
        """The controller's reasons, by group."""
        self.latencies = RecentLatencies()
        self.viewed: frozenset[int] = frozenset()
        """Numbers of the MoE layers that open pages show."""
        self.ended = asyncio.Event()
        """The service has drained, or closed."""
        self._relay: NewsRelay | None = None

    def view(self, layers: frozenset[int]) -> None:
        """Open pages show these layers from now on."""
        self.viewed = layers

    # Phases.

    def attach(self, cluster: ServedCluster, model_type: str = "") -> None:
        """The cluster serves from now on. From any thread.

        Args:
            cluster: it has started.
            model_type: the checkpoint's, as transformers calls it.

        Raises:
            ConfigError: the model can't be served.
        """
        model = ServedModel.of(cluster, self.config, model_type)
        self._first_epoch = cluster.state().epoch
        self.sampler = Sampler(lambda: cluster.stats(sorted(self.viewed)))
        self._explanations = Sampler(lambda: _explained(cluster), fresh_s=_EXPLAIN_EVERY_S)
        self._model = model
        if self._phase == "starting":
            self._phase = "ready"

    @property
    def phase(self) -> Phase:
        """Where the service is in its life."""
        if self._model is not None and self._model.cluster.state().failure is not None:
            return "failed"
        return self._phase

    @property
    def ranks(self) -> int:
        """Ranks that serve."""
        return 0 if self._model is None else self._model.cluster.state().ranks

    @property
    def model(self) -> ServedModel:
        """The model.

        Raises:
            ApiError: it doesn't serve now.
        """
        match self.phase:
            case "starting":
                raise unavailable("the model is being loaded; try again later")
            case "draining":
                raise unavailable("the service is shutting down", close=True)
            case "failed":
                raise unavailable("the model's ranks have failed")
        assert self._model is not None
        return self._model

    @property
    def chats(self) -> bool:
        """Whether there is a model, with a chat template."""
        return self._model is not None and self._model.chat

    @property
    def running(self) -> int:
        """API requests that run now."""
        return len(self._readers)

    async def drain(self, seconds: float | None = None) -> int:
        """Take no new requests, and let the running ones end; returns the number of those that were cut off.

        Args:
            seconds: time for that; the configured one by default.
        """
        self._phase = "draining"
        await self._until_idle(self.config.drain_s if seconds is None else seconds)
        cut = len(self._readers)
        for reader in list(self._readers):
            reader.fail(unavailable("the service is shutting down; try again"))
        await self._until_idle(_GOODBYE_S)  # each tells its client
        self.ended.set()
        return cut

    async def _until_idle(self, seconds: float) -> None:
        """Wait until no request runs, but no longer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._readers or self._preparing:
                    self._idle.clear()
                    await self._idle.wait()

    def close(self) -> None:
        """End the service's own threads."""
        for threads in (self._threads, self._chat_threads):
            threads.shutdown(wait=False, cancel_futures=True)
        self.ended.set()
        for sampler in (self.sampler, self._explanations):
            if sampler is not None:
                sampler.close()
        if self._log is not None:
            self._log.close()

    # Requests.

    def name_of(self, given: str | None) -> str:
        """The name of the model that a request asks for.

        Raises:
            ApiError: there is no such model.
        """
        if given is None or given in self.config.names:
            return given or self.config.names[0]
        raise ApiError(
            404,
            f"model: there is no {given[:200]!r}; allowed: {', '.join(self.config.names)}",
            param="model",
            code="model_not_found",
        )

    @contextmanager
    def admitted(self, choices: int) -> Iterator[tuple[ServedModel, HeldPlaces]]:
        """Within the context, a request's choices have their place in the service.

        It is taken before prompts are read, which costs more than a refusal.

        Raises:
            ApiError: there is no room now, or never; or the model doesn't serve.
        """
        model = self.model
        state = model.cluster.state()
        if choices > state.places:
            raise refused(f"n: prompts x n is {choices}; allowed: up to {state.places}, which run or wait at once", "n")
        try:
            places = model.cluster.hold(choices)
        except EpslotsError as error:  # it has failed just now
            raise of_cluster(error, API_NAMES) from error
        if places is None:
            raise overloaded(f"{state.places - state.free} requests run or wait, and there is no room for {choices} more")
        self._preparing += 1
        try:
            yield model, places
        finally:
            places.close()
            self._preparing -= 1
            self._idle.set()

    async def in_thread(
        self, function: Callable[[], Value], names: Mapping[str, str] = API_NAMES, *, chat: bool = False, quick: bool = False
    ) -> Value:
        """Run a function that takes processor time, in a thread.

        Args:
            names: the API's names of settings, for errors.
            chat: it renders a chat template.
            quick: it takes less time than the ways to a thread and back, and is run in this one.

        Raises:
            ApiError: for the errors of epslots that it raises.
        """
        try:
            if quick:
                return function()
            threads = self._chat_threads if chat else self._threads
            return await asyncio.get_running_loop().run_in_executor(threads, function)
        except EpslotsError as error:
            raise of_cluster(error, names) from error

    async def encode(
        self, prompt: str | Chat, field: str, *, special_tokens: bool = True, fits: bool = True, quick: bool = False
    ) -> list[int]:
        """A prompt's tokens.

        Args:
            prompt: text or a chat.
            field: of the request, for errors.
            quick: a text that is short, as are all others of the request together.
            special_tokens: as ``Cluster.encode``.
            fits: refuse one that certainly doesn't fit. Else it may be longer than a model's context, within limits.

        Raises:
            ApiError: it isn't allowed.
        """
        model = self.model
        quick = quick and model.tokenizer.is_fast  # others have a lock, and it may be another thread's for long
        most = model.room.most if fits else None
        chars, most_chars = _chars_of(prompt), max(_MOST_CHARS, 16 * model.room.most)
        if not fits and chars > most_chars:  # reading it would hold up others' prompts for seconds
            raise refused(f"{field}: {chars:,} characters; allowed: up to {most_chars:,}", field)

        def encode() -> list[int]:
            try:
                return model.cluster.encode(prompt, special_tokens=special_tokens, most_tokens=most)
            except ConfigError as error:
                code = "context_length_exceeded" if "fit" in str(error) else None
                why = without_paths(str(error)).partition("; allowed without it")[0]
                raise refused(f"{field}: {why}", field, code) from error

        return await self.in_thread(encode, chat=isinstance(prompt, Chat), quick=quick)

    async def start(
        self,
        prompts: Sequence[tuple[Sequence[int], Mapping[str, Any]]],
        names: Mapping[str, str],
        places: HeldPlaces,
        *,
        special_tokens: bool = False,
        whole: bool = False,
    ) -> ChoiceReader:
        """Start to continue prompts, all or none.

        Args:
            prompts: their tokens, and the settings of each.
            names: the API's names of settings, for errors.
            places: of ``admitted``.
            special_tokens: texts have special tokens, too.
            whole: the answer isn't a stream.

        Raises:
            ApiError: the cluster refuses one.
        """
        model = self.model

        def submit() -> list[PolledGeneration]:
            found: list[PolledGeneration] = []
            for tokens, settings in prompts:  # an error drops the earlier ones, which cancels them
                found += model.cluster.submit_choices(tokens, places=places, **settings)
            return found

        size = sum(len(tokens) + _CHOICE_COSTS * own["n"] for tokens, own in prompts)
        quick = size <= QUICK and not any(name in own for _, own in prompts for name in GRAMMARS)
        generations = await self.in_thread(submit, names, quick=quick)
        if self._relay is None:
            self._relay = NewsRelay(asyncio.get_running_loop())
        reader = ChoiceReader(
            self._relay,
            generations,
            special_tokens=special_tokens,
            whole=whole,
            timeout_s=self.config.request_timeout_s,
        )
        self._readers.add(reader)
        return reader

    def forget(self, reader: ChoiceReader) -> None:
        """A request has ended."""
        reader.close()
        self._readers.discard(reader)
        self._idle.set()

    def drawn_seed(self) -> int:
        """A seed for a request without one."""
        return secrets.randbits(63)

    def done(self, summary: RequestSummary) -> None:
        """Count and log a request that has ended."""
        self.metrics.note(summary)
        self.latencies.note(summary)
        if self._log is not None and self.config.log_requests:
            self._log.log(summary)

    # Metrics.

    async def sampled(self) -> ServiceSample:
        """The numbers of now, as far as the ranks answer."""
        if self.sampler is not None:
            await self.sampler.sample()
        return self._sample()

    def _sample(self) -> ServiceSample:
        state = None if self._model is None else self._model.cluster.state()
        return ServiceSample(
            state=state,
            stats=None if self.sampler is None else self.sampler.latest,
            recoveries=0 if state is None else max(0, state.epoch - self._first_epoch),
            log_lines_lost=0 if self._log is None else self._log.lost,
        )

    def known(self) -> Known:
        """The live page's figures, as far as they are known; the controller is asked for its reasons meanwhile."""
        sample = self._sample()
        explanations = self._explanations
        if explanations is not None and sample.stats is not None and sample.stats.controller is not None:
            explanations.refresh()
        ttft_s, per_token_s = self.latencies.quantiles()
        return Known(
            phase=self.phase,
            model=self.config.names[0],
            chat=self.chats,
            state=sample.state,
            stats=sample.stats,
            stats_age_s=None if self.sampler is None else self.sampler.age_s,
            recoveries=sample.recoveries,
            explanations=() if explanations is None else explanations.latest or (),
            ttft_s=ttft_s,
            per_token_s=per_token_s,
        )


def _explained(cluster: ServedCluster) -> tuple[Explanation | None, ...]:
    """The controller's reasons for each group's placement; None for a group whose controller doesn't answer."""
    found: list[Explanation | None] = []
    for group in cluster.state().groups:
        try:
            found.append(cluster.explain(group.number))
        except EpslotsError:  # the group came or went just now, or there is no controller
            found.append(None)
    return tuple(found)


def _chars_of(prompt: str | Chat) -> int:
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(str(message.get("content", ""))) for message in prompt.messages)
