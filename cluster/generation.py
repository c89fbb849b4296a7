"""The objects that users hold of their prompts: ``Generation`` and ``Result``.

prompt and settings -> RequestChecker -> Requests -> RequestRouter -> a rank -> TokenStream -> Generation -> Result
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cluster.errors import RequestFailed, raised_anew
from cluster.token_stream import StreamReader, TokenStream
from epslots.errors import ConfigError
from epslots.generation.portions import Portion, PortionMaker
from epslots.generation.requests import Reason, Request, TokenLogprobs
from epslots.generation.settings import GenerationSettings, Prompt
from epslots.generation.text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Result:
    """One choice of a prompt's continuation, or the error in its place.

    Attributes:
        index: the prompt's position among those of one ``generate`` call; 0 for ``submit``.
        prompt: as given.
        tokens: new token ids, up to the one that ended the text or completed a stop string.
        text: of the new tokens, without special tokens and without the stop string; None if the checkpoint has no tokenizer.
        reason: "stop" (end token, stop string or the grammar's end), "length" (``max_new_tokens``), "cancelled", or "error".
        error: the error's message, for the reason "error".
        choice: its number among the prompt's choices, from 0.
        choices: the number of results that the prompt has: its setting ``n``; 1 for a prompt that was refused.
        logprobs: of each of ``tokens``; None if not asked for.
        prompt_logprobs: of the prompt's tokens from the second on; None if not asked for, and for all choices but the first.
            They end early if the request was cancelled or failed before all were there.
        prompt_tokens: the prompt's token ids; empty for a prompt that was refused.
    """

    index: int
    prompt: Prompt
    tokens: tuple[int, ...]
    text: str | None
    reason: Reason
    error: str | None = None
    choice: int = 0
    choices: int = 1
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class PromptChoice:
    """One choice of a prompt, to be served.

    Attributes:
        index: the prompt's position among those of one call.
        prompt: as the user gave it.
        settings: the prompt's.
        number: of the choice, from 0.
        request: the engine's, for this choice.
    """

    index: int
    prompt: Prompt
    settings: GenerationSettings
    number: int
    request: Request


class Generation:
    """One choice of a prompt that is being continued. Any number of readers read it from the beginning.

    Iterate it for its text, piece by piece; ``portions`` has tokens and log-probabilities beside the text.

    The request is cancelled, and its place in the queue free again, when it has lost its last reader: when the last open
    iterator was closed or dropped (as by leaving a loop over it) and no call waits for the result; or when this object is
    dropped. As a context manager, it is cancelled at the end of the block unless it is done.

    Args:
        stream: the request's tokens.
        cancel: cancels the request; called from anywhere, finalizers included.
        check_process: raises ClusterError in a forked child, which would wait for ever.
    """

    def __init__(
        self,
        choice: PromptChoice,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        stream: TokenStream,
        cancel: Callable[[], None],
        check_process: Callable[[], None],
    ) -> None:
        self._choice, self._tokenizer = choice, tokenizer
        self._stream, self._cancel, self._check_process = stream, cancel, check_process
        weakref.finalize(self, stream.cancel_unless_done, cancel).atexit = False

    @property
    def id(self) -> str:
        """Of its request, unique in the cluster."""
        return self._choice.request.id

    @property
    def index(self) -> int:
        """The prompt's position among those of one ``generate`` call."""
        return self._choice.index

    @property
    def prompt(self) -> Prompt:
        """The prompt as given."""
        return self._choice.prompt

    @property
    def prompt_tokens(self) -> tuple[int, ...]:
        """The prompt's token ids."""
        return self._choice.request.prompt

    @property
    def choice(self) -> int:
        """The number of this choice of the prompt."""
        return self._choice.number

    @property
    def done(self) -> bool:
        """Whether the result is there."""
        return self._stream.done

    def cancel(self) -> None:
        """End the request with the reason "cancelled" and its tokens so far; does nothing if it is done.

        Raises:
            ClusterError: this is a forked child.
        """
        self._check_process()
        self.give_up()

    close = cancel

    def give_up(self) -> None:
        """Cancel the request; allowed in a forked child, where it does nothing."""
        self._stream.cancel_unless_done(self._cancel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()

    def result(self, timeout_s: float | None = None) -> Result:
        """Wait for the result.

        Raises:
            ClusterError: the cluster can't go on; or this is a forked child.
            TimeoutError: it isn't there in time; the request goes on.
        """
        self._check_process()
        stream, this_call = self._stream, object()
        stream.users.add(this_call)
        try:
            with stream.news:
                if not stream.news.wait_for(lambda: stream.done, timeout_s):
                    raise TimeoutError(f"the prompt isn't done after {timeout_s:g} s")
        finally:
            stream.users.discard(this_call)
        if stream.failure is not None:
            raise raised_anew(stream.failure)
        assert stream.reason is not None
        choice, request = self._choice, self._choice.request
        return Result(
            index=choice.index,
            prompt=choice.prompt,
            tokens=tuple(stream.tokens),
            text=self._text(),
            reason=stream.reason,
            error=stream.error,
            choice=choice.number,
            choices=choice.settings.n,
            logprobs=None if request.logprobs is None else tuple(stream.logprobs),
            prompt_logprobs=None if request.prompt_logprobs is None else tuple(stream.prompt_logprobs),
            prompt_tokens=request.prompt,
        )

    def _text(self) -> str | None:
        if self._tokenizer is None:
            return None
        tokens, settings = self._stream.tokens, self._choice.settings
        if settings.stops:
            text_stream = TextStream(self._tokenizer, settings.stops, settings.min_tokens)
            return text_stream.push(tokens) + text_stream.finish()
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def __iter__(self) -> StreamReader[str]:
        """Pieces of text, as soon as they are certain.

        Raises (the iterator, when asked for a piece):
            ConfigError: the checkpoint has no tokenizer.
            ClusterError: the cluster can't go on; the request ended with an error; or this is a forked child.
        """
        return StreamReader(self, self._pieces(), self._stream, self._cancel)

    def portions(self) -> StreamReader[Portion]:
        """The continuation as it comes; the last portion has the reason of its end.

        Raises (the iterator, when asked for a portion):
            ClusterError: the cluster can't go on; the request ended with an error; or this is a forked child.
        """
        return StreamReader(self, _only(self._portions()), self._stream, self._cancel)

    def poll(
        self, on_news: Callable[[bool], None], *, special_tokens: bool = False, whole: bool = False
    ) -> StreamReader[Portion | None]:
        """The continuation without waiting, for one thread that reads many: an iterator over portions, None = no news.

        Args:
            on_news: called from another thread when there is news, with True if these are the first or the last, which
                readers wait for. It returns at once.
            special_tokens: the text has special tokens, too, but for the one that ends it.
            whole: ``on_news`` is called only for the first news and for the end.

        Raises (the iterator):
            RequestFailed: the request ended with an error.
            ClusterError: the cluster can't go on; or this is a forked child.
        """
        self._stream.watch(_teller(on_news, self._stream, whole))
        return StreamReader(self, self._portions(wait=False, special_tokens=special_tokens), self._stream, self._cancel)

    def _pieces(self) -> Iterator[str]:
        if self._tokenizer is None:
            raise ConfigError("the checkpoint has no tokenizer, so there is no text; use portions() or result().tokens")
        for portion in self._portions():
            if portion is not None and portion.text:
                yield portion.text

    def _portions(self, *, wait: bool = True, special_tokens: bool = False) -> Iterator[Portion | None]:
        stream, settings = self._stream, self._choice.settings
        maker = PortionMaker(
            self._tokenizer,
            settings.stops,
            settings.min_tokens,
            special_tokens=special_tokens,
            unsaid=self._choice.request.stop_tokens if special_tokens else frozenset(),
        )
        tokens = prompt_logprobs = 0
        finished = False
        while not finished:
            self._check_process()
            output = stream.after(tokens, prompt_logprobs, wait=wait)
            if output is None:
                yield None
                continue
            tokens += len(output.tokens)
            prompt_logprobs += len(output.prompt_logprobs)
            yield maker.take(output)
            finished = output.finished
        if stream.failure is not None:
            raise raised_anew(stream.failure)
        if stream.reason == "error":
            raise RequestFailed(stream.error)


def _teller(on_news: Callable[[bool], None], stream: TokenStream, whole: bool) -> Callable[[], None]:
    """A function that tells a stream's news as ``poll`` says."""
    first = True

    def tell() -> None:
        nonlocal first
        waited_for = first or stream.done
        first = False
        if waited_for or not whole:
            on_news(waited_for)

    return tell


def _only(portions: Iterator[Portion | None]) -> Iterator[Portion]:
    return (portion for portion in portions if portion is not None)
