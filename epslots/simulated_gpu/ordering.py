"""The order of operations: vector clocks of streams and the host, and the accesses to memory that nothing orders.

Times play no part here: a race is reported although the device happens to be fast enough. The algorithm is that of
``torch.cuda._sanitizer``, with the host as one more stream, and with ranges of bytes instead of whole tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

HOST = 0
"""The host's number among the streams. All its threads count as one."""

_MOST_ACCESSES = 400  # kept of one block of memory


@dataclass(frozen=True)
class Access:
    """One operation's access to a range of one block of memory.

    Attributes:
        start, stop: bytes from the block's start.
        writes: whether it writes.
        stream, step: the operation's stream, and its number there.
        what: the operation's name, with its source line.
    """

    start: int
    stop: int
    writes: bool
    stream: int
    step: int
    what: str


@dataclass(frozen=True)
class Race:
    """Two accesses to the same bytes, at least one of them a write, that no event and no wait orders.

    Attributes:
        kind: "read and write", "two writes", or "freed in use".
        first, second: the operations with their streams and source lines, in the order of queueing.
    """

    kind: str
    first: str
    second: str


class Ordering:
    """The vector clocks. A clock has, for each stream, the number of its last operation that is known to be done before."""

    def __init__(self) -> None:
        self.host: dict[int, int] = {HOST: 0}
        self._clocks: dict[int, dict[int, int]] = {HOST: self.host}

    def begin(self, stream: int) -> int:
        """The next operation on a stream: after what the host knows to be done. Returns its number."""
        clock = self._clocks.setdefault(stream, {})
        if stream != HOST:
            _merge(clock, self.host)
        step = clock.get(stream, 0) + 1
        clock[stream] = step
        return step

    def snapshot(self, stream: int) -> dict[int, int]:
        """The operations that are done when everything queued on a stream so far is."""
        return dict(self._clocks.setdefault(stream, {}))

    def wait(self, stream: int, clock: dict[int, int]) -> None:
        """Later operations on a stream, or of the host, come after those of ``clock``."""
        _merge(self._clocks.setdefault(stream, {}), clock)

    def knows(self, stream: int, access: Access) -> bool:
        """Whether an access is done before what comes next on a stream."""
        return access.stream == stream or self._clocks[stream].get(access.stream, 0) >= access.step

    def enter(self, accesses: list[Access], new: Access) -> list[Race]:
        """Append an access to those of its block; returns the races with earlier ones."""
        races, kept = [], []
        for old in accesses:
            if not (old.start < new.stop and new.start < old.stop):
                kept.append(old)
                continue
            ordered = self.knows(new.stream, old)
            if not ordered and (old.writes or new.writes):
                kind = "two writes" if old.writes and new.writes else "read and write"
                races.append(Race(kind, old.what, new.what))
            covered = new.start <= old.start and old.stop <= new.stop
            # Operations after the new access come after these, too.
            if not (covered and ((ordered and new.writes) or (old.stream == new.stream and old.writes == new.writes))):
                kept.append(old)
        kept.append(new)
        accesses[:] = kept[-_MOST_ACCESSES:]
        return races


def _merge(clock: dict[int, int], other: dict[int, int]) -> None:
    for stream, step in other.items():
        if step > clock.get(stream, 0):
            clock[stream] = step
