"""A model on one rank, in this process: a ``Launched`` model (``launchers.py``) as those on many ranks are."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import epslots
from epslots.config import LoadConfig
from epslots.errors import RequestError
from epslots.generation.engine import Engine
from epslots.generation.engine_stats import EngineStats
from epslots.generation.portions import Portion, PortionMaker
from epslots.generation.request_checker import RequestChecker, model_limits
from epslots.generation.requests import Output
from epslots.generation.settings import read_settings
from epslots.telemetry import Stats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoneRankStats:
    """Counters of the one rank; its own sums."""

    stats: Stats
    engine: EngineStats
    rank: int = 0
    where: str = "here"

    @property
    def ranks(self) -> tuple[LoneRankStats]:
        return (self,)

    @property
    def total(self) -> Stats:
        return self.stats


class OneRank:
    """A model in this process. Requests run together: reading one makes steps for all.

    Args:
        tokenizer: turns tokens into text.
        placement: file of the experts' first placement.
    """

    def __init__(
        self, path_or_id: str, tokenizer: PreTrainedTokenizerBase, config: LoadConfig, placement: Path | None = None
    ) -> None:
        self._model = epslots.load(path_or_id, placement=placement, **config.keywords())
        self._tokenizer = tokenizer
        self._engine = Engine(self._model)
        self._checker = RequestChecker(model_limits(self._model, self._engine.batcher.capacity), tokenizer)
        self._running: dict[str, _RunningText] = {}

    def submit_choices(self, prompt: Sequence[int], **settings: Any) -> list[_RunningText]:
        """Start to continue a prompt of token ids; returns its choices.

        Raises:
            ConfigError: the prompt or a setting is not allowed.
        """
        read = read_settings(settings)
        choices = {}
        for request in self._checker.requests(prompt, read):
            self._engine.batcher.add(request)
            choices[request.id] = _RunningText(self, PortionMaker(self._tokenizer, read.stops, read.min_tokens))
        self._running |= choices
        return list(choices.values())

    def step(self) -> None:
        """Make a step, and hand its outputs to their readers."""
        self._engine.step()
        for output in self._engine.batcher.outputs():
            running = self._running.get(output.id)
            if running is None:
                continue  # it ended at a stop string before
            running.take(output)
            if running.ended:
                del self._running[output.id]
                if not output.finished:
                    self._engine.batcher.cancel(output.id)

    def stats(self) -> LoneRankStats:
        """Counters of each layer, and of the prompts."""
        return LoneRankStats(epslots.stats(self._model), self._engine.batcher.stats())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.batcher.close()


class _RunningText:
    """One choice of a prompt: the portions that weren't read yet.

    Args:
        rank: makes steps while they are awaited.
        maker: turns the request's outputs into portions.
    """

    def __init__(self, rank: OneRank, maker: PortionMaker) -> None:
        self._rank, self._maker = rank, maker
        self._unread: deque[Portion] = deque()
        self._error: str | None = None
        self.ended = False

    def take(self, output: Output) -> None:
        """Take the request's next output."""
        portion = self._maker.take(output)
        self._unread.append(portion)
        self.ended = portion.reason is not None
        self._error = output.error if portion.reason == "error" else None

    def portions(self) -> Iterator[Portion]:
        """The continuation as it comes. It is read once.

        Raises (the iterator):
            RequestError: the request ended with an error.
        """
        while self._unread or not self.ended:
            if self._unread:
                yield self._unread.popleft()
            else:
                self._rank.step()
        if self._error is not None:
            raise RequestError(self._error)
