"""``TokenStream``: the tokens of one request on their way from the supervisor's thread to any number of readers."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

from cluster.errors import ClusterError
from epslots.generation.requests import Reason


class TokenStream:
    """The tokens of one request until now, and its end. The supervisor's thread writes, any thread reads.

    Args:
        on_done: called in the supervisor's thread when the end is known.

    Attributes:
        news: guards the rest, and is notified of changes.
        users: the iterators and waiting calls that want the rest. No lock guards it, because iterators also end in finalizers.
    """

    def __init__(self, on_done: Callable[[], None]) -> None:
        self._on_done = on_done
        self.news = threading.Condition()
        self.tokens: list[int] = []
        self.reason: Reason | None = None
        self.error: str | None = None
        self.failure: ClusterError | None = None
        self.users: set[object] = set()

    @property
    def done(self) -> bool:
        """Whether the end is known."""
        return self.reason is not None or self.failure is not None

    def arrive(self, tokens: Sequence[int], reason: Reason | None, error: str | None) -> None:
        """Add new tokens, and at the end the reason for it."""
        with self.news:
            self.tokens += tokens
            self.reason, self.error = reason, error
            self.news.notify_all()
        if reason is not None:
            self._on_done()

    def fail(self, error: ClusterError) -> None:
        """End with the cluster's failure."""
        with self.news:
            self.failure = error
            self.news.notify_all()
        self._on_done()

    def leave(self, user: object, cancel: Callable[[], None]) -> None:
        """Forget a user; the last one's end cancels the request."""
        self.users.discard(user)
        if not self.users:
            self.cancel_unless_done(cancel)

    def cancel_unless_done(self, cancel: Callable[[], None]) -> None:
        if not self.done:
            cancel()


class TextPieces(Iterator[str]):
    """One reader of a request's text.

    Args:
        owner: kept until the reader ends, because its own end would cancel the request.
        pieces: the text.
        cancel: cancels the request.

    Attributes:
        close: end this reader, from any thread. The request is cancelled if it isn't done and has no other user.
    """

    def __init__(self, owner: object, pieces: Iterator[str], stream: TokenStream, cancel: Callable[[], None]) -> None:
        self._owner, self._pieces = owner, pieces
        this_reader = object()
        stream.users.add(this_reader)
        self.close = weakref.finalize(self, stream.leave, this_reader, cancel)
        self.close.atexit = False

    def __next__(self) -> str:
        if not self.close.alive:
            raise StopIteration
        try:
            return next(self._pieces)
        except BaseException:  # the end, a failure or an interrupt: it has no further piece
            self.close()
            raise
