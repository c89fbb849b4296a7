"""Prepares requests' grammars beside the steps: reading a tokenizer takes seconds, compiling a grammar milliseconds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Generic, TypeVar

from epslots.errors import ConfigError
from epslots.generation.end_tokens import end_tokens, tokenizer_end_tokens
from epslots.generation.grammar import GrammarCompiler, GrammarState
from epslots.generation.requests import Request
from epslots.generation.text import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_THREADS = 2

T = TypeVar("T")


class GrammarQueue(Generic[T]):
    """Items whose requests' grammars are being compiled, in threads of its own. Used by the thread that makes steps.

    Args:
        open_compiler: called once, in one of these threads, when the first grammar comes: it reads the tokenizer.
        executor: runs the work; by default some threads, started when the first grammar comes.
    """

    def __init__(self, open_compiler: Callable[[], GrammarCompiler], executor: Executor | None = None) -> None:
        self._open, self._executor = open_compiler, executor
        self._compiler: GrammarCompiler | None = None
        self._opening = threading.Lock()
        self._waiting: list[tuple[T, Future[GrammarState]]] = []

    def put(self, item: T, request: Request) -> None:
        """Prepare the state of a request with a grammar; ``take`` returns it with ``item``."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(_THREADS, "epslots-grammars")
        self._waiting.append((item, self._executor.submit(self._start, request)))

    def _start(self, request: Request) -> GrammarState:
        with self._opening:
            if self._compiler is None:
                self._compiler = self._open()
        assert request.grammar is not None
        so_far = request.prompt[len(request.prompt) - request.resumed :]
        return self._compiler.start(request.grammar, request.stop_tokens, so_far)

    def take(self) -> list[tuple[T, GrammarState | ConfigError]]:
        """The items whose states are ready or can't be made, in the order of ``put``; none is returned twice."""
        ready = [entry for entry in self._waiting if entry[1].done()]
        self._waiting = [entry for entry in self._waiting if entry not in ready]
        return [(item, _outcome(future)) for item, future in ready]

    def wait(self, timeout_s: float) -> None:
        """Wait until ``take`` would return an item, but not longer than this."""
        wait([future for _, future in self._waiting], timeout_s, FIRST_COMPLETED)

    def __len__(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        """Drop all items."""
        self._waiting = []
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)


def _outcome(future: Future[GrammarState]) -> GrammarState | ConfigError:
    try:
        return future.result()
    except ConfigError as error:
        return error


def compiler_for(model: PreTrainedModel) -> GrammarCompiler:
    """The compiler of a model's grammars, by the tokenizer of its checkpoint.

    Raises:
        ConfigError: the checkpoint has no tokenizer, or the bytes of its tokens aren't known.
    """
    try:
        tokenizer = load_tokenizer(model.name_or_path)
        vocabulary = int(model.config.get_text_config().vocab_size)
        ends = end_tokens(model, ignore_tokenizer_eos=True) | tokenizer_end_tokens(tokenizer, vocabulary)
        return GrammarCompiler(tokenizer, vocabulary, ends)
    except ConfigError as error:
        raise ConfigError(f"a request with a grammar can't be served: {error}") from error
