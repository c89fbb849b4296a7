"""``TokenStream``: the tokens of one request on their way from the supervisor's thread to any number of readers."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from cluster.errors import ClusterError
from epslots.generation.requests import Output, Reason, TokenLogprobs

T = TypeVar("T")


class TokenStream:
    """The tokens of one request until now, and its end. The supervisor's thread writes, any thread reads.

    Args:
        on_done: called in the supervisor's thread when the end is known.

    Attributes:
        news: guards the rest, and is notified of changes.
        logprobs: of each of ``tokens``, if the request asked for them.
        prompt_logprobs: of the prompt's tokens from the second on, if the request asked for them.
        users: the iterators and waiting calls that want the rest. No lock guards it, because iterators also end in finalizers.
    """

    def __init__(self, on_done: Callable[[], None]) -> None:
        self._on_done = on_done
        self.news = threading.Condition()
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.reason: Reason | None = None
        self.error: str | None = None
        self.failure: ClusterError | None = None
        self.users: set[object] = set()
        self._watchers: tuple[Callable[[], None], ...] = ()

    @property
    def done(self) -> bool:
        """Whether the end is known."""
        return self.reason is not None or self.failure is not None

    def arrive(self, output: Output) -> None:
        """Add the request's next output."""
        with self.news:
            self.tokens += output.tokens
            self.logprobs += output.logprobs
            self.prompt_logprobs += output.prompt_logprobs
            self.reason, self.error = output.reason, output.error
            self.news.notify_all()
        if output.reason is not None:
            self._on_done()
        self._tell_watchers()

    def fail(self, error: ClusterError) -> None:
        """End with the cluster's failure."""
        with self.news:
            self.failure = error
            self.news.notify_all()
        self._on_done()
        self._tell_watchers()

    def watch(self, on_news: Callable[[], None]) -> None:
        """Have a function called after each change from now on, in the supervisor's thread. It returns at once."""
        with self.news:
            self._watchers += (on_news,)

    def _tell_watchers(self) -> None:
        for on_news in self._watchers:
            on_news()

    def after(self, tokens: int, prompt_logprobs: int, *, wait: bool = True) -> Output | None:
        """All that came after so many tokens and log-probabilities of the prompt, as an output without an id.

        Args:
            wait: for more than these, or the end; else None is returned where there is nothing more.
        """
        with self.news:
            while not (len(self.tokens) > tokens or len(self.prompt_logprobs) > prompt_logprobs or self.done):
                if not wait:
                    return None
                self.news.wait()
            return Output(
                id="",
                tokens=tuple(self.tokens[tokens:]),
                finished=self.done,
                reason=self.reason,
                error=self.error,
                logprobs=tuple(self.logprobs[tokens:]),
                prompt_logprobs=tuple(self.prompt_logprobs[prompt_logprobs:]),
            )

    def leave(self, user: object, cancel: Callable[[], None]) -> None:
        """Forget a user; the last one's end cancels the request."""
        self.users.discard(user)
        if not self.users:
            self.cancel_unless_done(cancel)

    def cancel_unless_done(self, cancel: Callable[[], None]) -> None:
        if not self.done:
            cancel()


class StreamReader(Iterator[T], Generic[T]):
    """One reader of a request's stream.

    Args:
        owner: kept until the reader ends, because its own end would cancel the request.
        pieces: of the stream.
        cancel: cancels the request.

    Attributes:
        close: end this reader, from any thread. The request is cancelled if it isn't done and has no other user.
    """

    def __init__(self, owner: object, pieces: Iterator[T], stream: TokenStream, cancel: Callable[[], None]) -> None:
        self._owner, self._pieces = owner, pieces
        this_reader = object()
        stream.users.add(this_reader)
        self.close = weakref.finalize(self, stream.leave, this_reader, cancel)
        self.close.atexit = False

    def __next__(self) -> T:
        if not self.close.alive:
            raise StopIteration
        try:
            return next(self._pieces)
        except BaseException:  # the end, a failure or an interrupt: it has no further piece
            self.close()
            raise
