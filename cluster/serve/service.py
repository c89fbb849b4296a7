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
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar
from weakref import WeakSet

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_parsing.response_templates import ResponseTemplate

from cluster.messages.controller import Explanation
from cluster.reports import ClusterState, ClusterStats
from cluster.serve.access_log import AccessLog
from cluster.serve.bridge import ChoiceReader, NewsRelay, PolledGeneration
from cluster.serve.cluster_metrics import ServiceSample
from cluster.serve.config import ServeConfig
from cluster.serve.errors import ApiError, of_cluster, overloaded, refused, unavailable, without_paths
from cluster.serve.latencies import RecentLatencies
from cluster.serve.live_frame import Known
from cluster.serve.metrics import Metrics
from cluster.serve.record import RequestRecord
from cluster.serve.request_settings import API_NAMES, Room
from cluster.serve.response_template import response_template_of
from cluster.serve.sampler import Sampler
from cluster.serve.token_text import TokenTexts
from epslots.errors import ConfigError, EpslotsError
from epslots.generation.chat_template import Chat, find_template
from epslots.generation.request_limits import ModelLimits

logger = logging.getLogger("epslots.serve")
Phase = Literal["starting", "ready", "draining", "failed"]
_EXPLAIN_EVERY_S = 5.0
_GOODBYE_S = 2.0  # for errors to requests that are cut off
_PROMPT_THREADS = 2
"""They tokenize prompts and render templates: processor time, most of it without Python's lock."""

_MOST_CHARS = 2**20
"""Characters of a prompt that needn't fit, or more where contexts are long: half a second."""

Value = TypeVar("Value")


class ServedCluster(Protocol):
    """The part of a ``Cluster`` that a service uses."""

    tokenizer: PreTrainedTokenizerBase | None

    @property
    def limits(self) -> ModelLimits: ...
    @property
    def end_tokens(self) -> frozenset[int]: ...
    def encode(self, prompt: str | Chat, *, special_tokens: bool = True, most_tokens: int | None = None) -> list[int]: ...
    def submit_choices(self, prompt: Sequence[int], **settings: Any) -> Sequence[PolledGeneration]: ...
    def state(self) -> ClusterState: ...
    def stats(self, layers: Sequence[int] = ()) -> ClusterStats: ...
    def explain(self) -> Explanation: ...


@dataclass(frozen=True)
class ServedModel:
    """A model that serves, and what is made of it once.

    Attributes:
        room: tokens that a request may have.
        texts: of tokens.
        chat: whether there is a chat template.
        response_template: finds tool calls and reasoning; None = there is none.
    """

    cluster: ServedCluster
    tokenizer: PreTrainedTokenizerBase
    room: Room
    texts: TokenTexts
    chat: bool
    response_template: ResponseTemplate | None

    @classmethod
    def of(cls, cluster: ServedCluster, config: ServeConfig, model_type: str) -> ServedModel:
        """Make it; takes a moment.

        Raises:
            ConfigError: the checkpoint has no tokenizer, or the given response template is none.
        """
        tokenizer = cluster.tokenizer
        if tokenizer is None:
            raise ConfigError("the checkpoint has no tokenizer, and a service needs one: it answers in text")
        return cls(
            cluster=cluster,
            tokenizer=tokenizer,
            room=Room.of(cluster.limits),
            texts=TokenTexts(tokenizer, cluster.limits.vocabulary),
            chat=config.chat_template is not None or find_template(tokenizer) is not None,
            response_template=response_template_of(tokenizer, model_type, config.response_template),
        )


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
        self.sampler: Sampler[ClusterStats] | None = None
        """The ranks' numbers."""
        self._explanations: Sampler[Explanation] | None = None
        self.latencies = RecentLatencies()
        self.viewed: frozenset[int] = frozenset()
        """Numbers of the MoE layers that open pages show."""
        self.ended = asyncio.Event()
        """The service has drained, or closed."""
        self._relay: NewsRelay | None = None

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
        self._explanations = Sampler(cluster.explain, fresh_s=_EXPLAIN_EVERY_S)
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
        self._threads.shutdown(wait=False, cancel_futures=True)
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
    def admitted(self, choices: int) -> Iterator[ServedModel]:
        """Take a request, if there is room for its choices: before its prompts are read, which costs more than to refuse it.

        Raises:
            ApiError: there is no room now, or never; or the model doesn't serve.
        """
        model = self.model
        state = model.cluster.state()
        if choices > state.places:
            raise refused(f"n: prompts x n is {choices}; allowed: up to {state.places}, which run or wait at once", "n")
        if self._preparing + choices > state.free:
            raise overloaded(f"{state.running + state.queued} requests run or wait, and there is no room for {choices} more")
        self._preparing += choices
        try:
            yield model
        finally:
            self._preparing -= choices
            self._idle.set()

    async def in_thread(self, function: Callable[[], Value], names: Mapping[str, str] = API_NAMES) -> Value:
        """Run a function that takes processor time, in a thread.

        Args:
            names: the API's names of settings, for errors.

        Raises:
            ApiError: for the errors of epslots that it raises.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function)
        except EpslotsError as error:
            raise of_cluster(error, names) from error

    async def encode(self, prompt: str | Chat, field: str, *, special_tokens: bool = True, fits: bool = True) -> list[int]:
        """A prompt's tokens.

        Args:
            prompt: text or a chat.
            field: of the request, for errors.
            special_tokens: as ``Cluster.encode``.
            fits: refuse one that certainly doesn't fit. Else it may be longer than a model's context, within limits.

        Raises:
            ApiError: it isn't allowed.
        """
        model = self.model
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

        return await self.in_thread(encode)

    async def start(
        self,
        prompts: Sequence[tuple[Sequence[int], Mapping[str, Any]]],
        names: Mapping[str, str],
        *,
        special_tokens: bool = False,
        whole: bool = False,
    ) -> ChoiceReader:
        """Start to continue prompts, all or none.

        Args:
            prompts: their tokens, and the settings of each.
            names: the API's names of settings, for errors.
            special_tokens: texts have special tokens, too.
            whole: the answer isn't a stream.

        Raises:
            ApiError: the cluster refuses one.
        """
        model = self.model

        def submit() -> list[PolledGeneration]:
            found: list[PolledGeneration] = []
            for tokens, settings in prompts:  # an error drops the earlier ones, which cancels them
                found += model.cluster.submit_choices(tokens, **settings)
            return found

        generations = await self.in_thread(submit, names)
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

    def done(self, record: RequestRecord) -> None:
        """Count and log a request that has ended."""
        self.metrics.note(record)
        self.latencies.note(record)
        if self._log is not None and self.config.log_requests:
            self._log.log(record)

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
        sample, model = self._sample(), self._model
        explanations = self._explanations
        if explanations is not None and sample.stats is not None and sample.stats.controller is not None:
            explanations.refresh()
        ttft_s, per_token_s = self.latencies.quantiles()
        return Known(
            phase=self.phase,
            model=self.config.names[0],
            chat=model is not None and model.chat,
            state=sample.state,
            stats=sample.stats,
            stats_age_s=None if self.sampler is None else self.sampler.age_s,
            recoveries=sample.recoveries,
            explanation=None if explanations is None else explanations.latest,
            ttft_s=ttft_s,
            per_token_s=per_token_s,
        )


def _chars_of(prompt: str | Chat) -> int:
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(str(message.get("content", ""))) for message in prompt.messages)
