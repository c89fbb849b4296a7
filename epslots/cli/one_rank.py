"""A model on one rank, in this process: a ``Launched`` model (``launchers.py``) as those on many ranks are."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import epslots
from epslots.config import LoadConfig
from epslots.errors import EpslotsError
from epslots.generation.end_tokens import end_tokens, tokenizer_end_tokens
from epslots.generation.engine import Engine
from epslots.generation.engine_stats import EngineStats
from epslots.generation.requests import Output, Request
from epslots.generation.sampling import Sampling
from epslots.generation.text import TextStream
from epslots.telemetry import Stats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class _Text:
    """A prompt's text so far, and the pieces of it that weren't read yet."""

    stream: TextStream
    pieces: deque[str] = field(default_factory=deque)
    finished: bool = False
    error: str | None = None


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
    """A model in this process. Prompts run together: reading the text of one makes steps for all.

    Args:
        tokenizer: turns tokens into text.
        placement: file of the experts' first placement.
    """

    def __init__(
        self, path_or_id: str, tokenizer: PreTrainedTokenizerBase, config: LoadConfig, placement: Path | None = None
    ) -> None:
        self._model = epslots.load(path_or_id, placement=placement, **config.keywords())
        self._tokenizer = tokenizer
        self._engine = Engine(self._model, kv_tokens=config.kv_tokens)
        self._ends = end_tokens(self._model, ignore_tokenizer_eos=True)
        self._tokenizer_ends = tokenizer_end_tokens(tokenizer, self._model.config.get_text_config().vocab_size)
        self._texts: dict[str, _Text] = {}

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        stop: tuple[str, ...],
        ignore_tokenizer_eos: bool,
    ) -> Iterator[str]:
        """Start to continue a prompt of token ids; returns its text, in pieces as they come.

        Raises:
            ConfigError: the prompt or a setting is not allowed.
        """
        id = str(len(self._texts))
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        ends = self._ends if ignore_tokenizer_eos else self._ends | self._tokenizer_ends
        self._engine.batcher.add(Request(id, tuple(prompt), max_new_tokens, stop_tokens=ends, sampling=sampling))
        self._texts[id] = _Text(TextStream(self._tokenizer, stop))
        return self._pieces(self._texts[id])

    def _pieces(self, text: _Text) -> Iterator[str]:
        while True:
            while text.pieces:
                yield text.pieces.popleft()
            if text.error is not None:
                raise EpslotsError(text.error)
            if text.finished:
                return
            self._engine.step()
            for output in self._engine.batcher.outputs():
                self._take(output)

    def _take(self, output: Output) -> None:
        text = self._texts[output.id]
        if text.finished:
            return  # it ended at a stop string before
        pieces = [text.stream.push(output.tokens)]
        if text.stream.stopped and not output.finished:
            self._engine.batcher.cancel(output.id)
        if output.finished or text.stream.stopped:
            text.finished, text.error = True, output.error
            pieces.append(text.stream.finish())
        text.pieces.extend(filter(None, pieces))

    def stats(self) -> LoneRankStats:
        """Counters of each layer, and of the prompts."""
        return LoneRankStats(epslots.stats(self._model), self._engine.batcher.stats())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.batcher.close()
