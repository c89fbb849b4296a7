"""``EventPace``: when a rank's events are sent. Pure decisions; ``rank_loop.py`` waits accordingly."""

from __future__ import annotations

from cluster.messages.hand_over import HandedOver, HandOverContact
from cluster.messages.rank import Event, Outputs

EVENTS_EVERY_S = 0.02
"""Between batches of events. A message costs some milliseconds of processor time in Ray, at both ends: events that come soon
after one another share it. Readers of a stream see its tokens at most this much later."""


class EventPace:
    """Sends a request's first tokens and the news of a hand-over at once, because a reader waits; others in batches."""

    def __init__(self) -> None:
        self._due_s = 0.0
        self._urgent = False
        self._silent: set[str] = set()
        """Requests without a token so far."""

    def expect(self, id: str) -> None:
        """Note a request whose first token is yet to come."""
        self._silent.add(id)

    def note(self, event: Event) -> None:
        """Note an event that is to be sent."""
        self._urgent |= isinstance(event, HandedOver | HandOverContact)  # a stream stands still until then
        if isinstance(event, Outputs):
            for output in event.outputs:
                if (output.tokens or output.finished) and output.id in self._silent:
                    self._silent.discard(output.id)
                    self._urgent = True

    def wait_s(self, now_s: float) -> float:
        """Seconds until the noted events are to be sent; 0 = now."""
        return 0.0 if self._urgent else max(0.0, self._due_s - now_s)

    def sent(self, now_s: float) -> None:
        """All noted events were sent."""
        self._urgent, self._due_s = False, now_s + EVENTS_EVERY_S
