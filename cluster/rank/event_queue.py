"""``EventQueue``: a rank's events on their way to the driver, in batches, at the pace of ``event_pace.py``."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cluster.messages.placement import LoadReport
from cluster.messages.rank import Event, LoadProgress, encode
from cluster.rank.event_pace import EventPace

_PROGRESS_EVERY_S = 0.2


class EventQueue:
    """Events of one rank, for any thread.

    Args:
        news: notified of every event.
        clock: seconds, from any origin.

    Attributes:
        term: of the driver that gets the events.
    """

    def __init__(self, news: threading.Condition, clock: Callable[[], float]) -> None:
        self._news, self._clock = news, clock
        self._events: list[Event] = []
        self._pace = EventPace()
        self._progress_s = 0.0
        self.term = 0

    def expect(self, id: str) -> None:
        """Note a request whose first token is yet to come."""
        with self._news:
            self._pace.expect(id)

    def send(self, event: Event) -> None:
        """Add an event to the next batch."""
        with self._news:
            self._events.append(event)
            self._pace.note(event)
            self._news.notify_all()

    def send_progress(self, title: str, done_bytes: int, total_bytes: int) -> None:
        """Send how much is loaded: the beginning, the end, and five times a second."""
        now_s = self._clock()
        if done_bytes in (0, total_bytes) or now_s - self._progress_s >= _PROGRESS_EVERY_S:
            self._progress_s = now_s
            self.send(LoadProgress(title, done_bytes, total_bytes))

    def clear(self) -> None:
        """Drop the events that wait: they are of no use to the driver."""
        with self._news:
            self._events.clear()

    def begin_term(self, term: int) -> None:
        """Drop the events that wait, and give later ones to another driver."""
        with self._news:
            self.term = term
            self._events.clear()
            self._news.notify_all()

    @property
    def holds_load_report(self) -> bool:
        """Whether a load report waits."""
        with self._news:
            return any(isinstance(event, LoadReport) for event in self._events)

    def take(self, term: int) -> bytes | None:
        """Wait for events, and take all of them when it is time; returns None once a newer term has begun."""
        with self._news:
            self._news.wait_for(lambda: self._events or self.term > term)
            while self.term <= term and (wait_s := self._pace.wait_s(self._clock())) > 0:
                self._news.wait(wait_s)
            if self.term > term:
                return None
            self._pace.sent(self._clock())
            events, self._events = self._events, []
        return encode(events)
