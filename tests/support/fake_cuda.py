"""Streams and events of a GPU that isn't there: work is done in any order that events leave open."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any


class FakeCuda:
    """Streams whose work is done when it must be, or by chance: all that an order of events leaves open may happen."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.streams: list[FakeStream] = []
        self.here = self.Stream()

    def Stream(self, *_: Any, **__: Any) -> FakeStream:
        self.streams.append(FakeStream(self))
        return self.streams[-1]

    def Event(self) -> FakeEvent:
        return FakeEvent(self)

    def current_stream(self, _: Any) -> FakeStream:
        return self.here

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.here = self.here, stream
        yield
        self.here = before

    def some(self) -> None:
        """Do a few things that may be done now."""
        for _ in range(self.random.randrange(4)):
            self.random.choice(self.streams).advance()

    def finish(self) -> None:
        while any(stream.advance() for stream in self.streams):
            pass
        assert not any(stream.work for stream in self.streams), "streams wait for each other"


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.done = cuda, False

    def record(self, stream: FakeStream) -> None:
        stream.work.append(lambda: setattr(self, "done", True) or True)

    def query(self) -> bool:
        self.cuda.some()
        return self.done


class FakeStream:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.work: deque[Callable[[], Any]] = deque()

    def advance(self) -> bool:
        """Do the next thing; False if there is none, or it must wait."""
        if not self.work or self.work[0]() is False:
            return False
        self.work.popleft()
        return True

    def wait_event(self, event: FakeEvent) -> None:
        self.work.append(lambda: event.done)

    def wait_stream(self, other: FakeStream) -> None:
        event = self.cuda.Event()
        event.record(other)
        self.wait_event(event)
