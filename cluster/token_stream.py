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

    def fail(self, error: ClusterError) -> None:
        """End with the cluster's failure."""
        with self.news:
            self.failure = error
            self.news.notify_all()
        self._on_done()

    def wait_after(self, tokens: int, prompt_logprobs: int) -> Output:
        """Wait for more than so many tokens or log-probabilities of the prompt, or the end.

        Returns:
            All that came after them, as an output without an id.
        """
        with self.news:
            self.news.wait_for(lambda: len(self.tokens) > tokens or len(self.prompt_logprobs) > prompt_logprobs or self.done)
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
