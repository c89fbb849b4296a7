"""A model on one rank, in this process: to ``epslots generate`` the same as one on many."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import epslots
from epslots.engine.end_tokens import end_tokens, tokenizer_end_tokens
from epslots.engine.engine import Engine
from epslots.engine.requests import Output, Request
from epslots.engine.sampling import Sampling
from epslots.engine.text import TextStream
from epslots.errors import EpslotsError
from epslots.telemetry import Stats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class _Text:
    """What came of a prompt, and wasn't taken yet."""

    stream: TextStream
    pieces: deque[str] = field(default_factory=deque)
    finished: bool = False
    error: str | None = None


class OneRank:
    """Prompts that are submitted run together; whoever waits for a text advances them all.

    Args:
        tokenizer: makes text of tokens.
        others: as ``epslots.load`` has them.
    """

    def __init__(
        self,
        path_or_id: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        slots: int | str,
        device: str | None,
        dtype: str,
        policy: str,
        host_store: str | None,
        cache_dir: Path | None,
        kv_tokens: int,
        placement: Path | None,
        link: str | None,
        prefetch: str,
        predictor: Path | None,
        execute_predicted: bool,
        host_compute: str,
        batch_invariant: bool,
    ) -> None:
        self._model = epslots.load(
            path_or_id,
            slots=slots,
            device=device,
            dtype=dtype,
            policy=policy,
            host_store=host_store,
            cache_dir=cache_dir,
            kv_tokens=kv_tokens,
            placement=placement,
            link=link,
            prefetch=prefetch,
            predictor=predictor,
            execute_predicted=execute_predicted,
            host_compute=host_compute,
            batch_invariant=batch_invariant,
        )
        self._tokenizer = tokenizer
        self._engine = Engine(self._model, kv_tokens=kv_tokens)
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
            return  # cancelled at a stop string
        pieces = [text.stream.push(output.tokens)]
        if text.stream.stopped and not output.finished:
            self._engine.batcher.cancel(output.id)
        if output.finished or text.stream.stopped:
            text.finished, text.error = True, output.error
            pieces.append(text.stream.finish())
        text.pieces.extend(filter(None, pieces))

    def stats(self) -> Stats:
        """Counters of each layer."""
        return epslots.stats(self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.batcher.close()
