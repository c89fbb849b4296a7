"""``HandOverThreads``: a rank's hand-overs under way, as source and as target, each in a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from cluster.messages.hand_over import ConnectionOrder, HandedOver, HandOver, HandOverContact, HandOverContacts, TakeOver
from cluster.messages.rank import Contact
from cluster.rank.cache_exchange import BetweenSteps, HandOverRefused, send_cache, take_cache
from cluster.rank.command_queue import NotYet
from cluster.rank.contact_store import ContactStore
from cluster.rank.copy_budget import CopyBudget
from epslots.errors import EpslotsError
from epslots.generation.batcher import Batcher
from epslots.generation.cache_image import CacheImage
from epslots.generation.cache_layout import CacheLayout
from epslots.transport import background
from epslots.transport.gloo_connection import open_gloo_connection
from epslots.transport.memory_connection import open_source, open_target
from epslots.transport.pair_connection import PairConnection

logger = logging.getLogger("epslots.cluster")


class Connect(Protocol):
    """Connects this rank with the other one of a hand-over; raises PeerLost if that doesn't come in time."""

    def __call__(self, order: ConnectionOrder, contacts: ContactStore, *, source: bool) -> PairConnection: ...


def connect(order: ConnectionOrder, contacts: ContactStore, *, source: bool) -> PairConnection:
    """Connect this rank with the other one of a hand-over.

    Args:
        contacts: the way to the other rank's address.

    Raises:
        PeerLost: it didn't come in time, or another process did.
    """
    if order.kind == "memory":
        return (open_source if source else open_target)(order.number, order.secret, order.form_s, order.deadline_s)
    return open_gloo_connection(
        contacts, order.number, order.secret, order.form_s, order.deadline_s, source=source, stop=contacts.stop
    )


class HandOverThreads:
    """The hand-overs of one rank.

    Args:
        batcher: returns the rank's batcher; it is touched only between steps.
        between_steps: has the stepping thread call a function.
        send: sends an event to the driver.
        connect: connects two ranks.

    Attributes:
        budget: of what is copied between two steps.
    """

    def __init__(
        self,
        batcher: Callable[[], Batcher],
        between_steps: BetweenSteps,
        send: Callable[[HandedOver | HandOverContact], None],
        connect: Connect = connect,
    ) -> None:
        self._batcher, self._between_steps, self._send, self._connect = batcher, between_steps, send, connect
        self.budget = CopyBudget()
        self._lock = threading.Lock()
        self._contacts: dict[int, ContactStore] = {}
        """Of hand-overs under way, by number."""
        self._connections: dict[int, PairConnection] = {}
        self._ended = ""
        self._drivers = 0
        """Number of drivers whose hand-overs were forgotten."""

    def give(self, order: HandOver) -> None:
        """Begin a hand-over as its source."""
        driver = self._drivers
        self._begin(order.connection, lambda: self._give(order, driver))

    def take(self, order: TakeOver) -> None:
        """Begin a hand-over as its target."""
        self._begin(order.connection, lambda: self._take(order))

    def meet(self, contacts: HandOverContacts) -> None:
        """The other rank's entries have come."""
        with self._lock:
            store = self._contacts.get(contacts.number)
        if store is not None:
            store.take(contacts.entries)

    def abort_all(self, reason: str, *, end: bool = False, forget: bool = False) -> None:
        """Break all hand-overs off; requests that are handed over from here go on here. From any thread.

        Args:
            end: none begins any more.
            forget: their requests are gone, and another driver's may have the same ids.
        """
        with self._lock:
            self._drivers += forget
            self._ended = reason if end else self._ended
            stores, connections = list(self._contacts.values()), list(self._connections.values())
        for store in stores:
            store.end(reason)
        for connection in connections:
            connection.abort()

    def _begin(self, order: ConnectionOrder, work: Callable[[], None]) -> None:
        def publish(contact: Contact) -> None:
            self._send(HandOverContact(contact.epoch, contact.key, contact.value))

        with self._lock:
            if self._ended:
                return
            self._contacts[order.number] = ContactStore(order.number, publish, order.form_s)
        background.start(work, name="epslots-hand-over", stop=lambda: self.abort_all("the process ends", end=True))

    @contextmanager
    def _connection(self, order: ConnectionOrder, *, source: bool) -> Iterator[PairConnection]:
        """The connection of a hand-over, for as long as the context lasts."""
        connection: PairConnection | None = None
        try:
            connection = self._connect(order, self._contacts[order.number], source=source)
            with self._lock:
                self._connections[order.number] = connection
                stopped = self._contacts[order.number].stop
            if stopped.done():
                connection.abort()
            yield connection
        finally:
            with self._lock:
                del self._contacts[order.number]
                self._connections.pop(order.number, None)
            if connection is not None:
                connection.abort()

    def _give(self, order: HandOver, driver: int) -> None:
        done = HandedOver(number=order.connection.number, failure="")
        try:
            with self._connection(order.connection, source=True) as connection:
                image: CacheImage | None = self._between_steps(lambda: self._batcher().hold(order.id))
                if image is None:
                    raise HandOverRefused("the request has no cache that could be read now")
                times, layout = send_cache(connection, image, self._between_steps, self.budget), image.layout
            done = HandedOver(
                number=order.connection.number,
                failure=None,
                seconds=times.held_s,
                copying_s=times.copying_s,
                nbytes=layout.nbytes,
                tokens=layout.tokens,
                prompt_token_s=self._batcher().prompt_token_s,
                step_bytes=self.budget.step_bytes,
            )
        except Exception as error:
            done = HandedOver(number=order.connection.number, failure=_in_words(error))
            if driver == self._drivers:
                self._let_go(lambda: self._batcher().resume(order.id))
        if driver == self._drivers:
            self._send(done)

    def _take(self, order: TakeOver) -> None:
        place: list[CacheImage] = []

        def reserve(layout: CacheLayout) -> CacheImage | None:
            self._batcher().release(order.id)  # of an earlier hand-over of this request, which has failed
            batcher = self._batcher()
            if (image := batcher.reserve(order.id, layout)) is not None:
                place.append(image)
            elif batcher.waits_for_room:
                raise NotYet  # experts cede slots with the group's next step
            return image

        def drop() -> None:
            if place and not place[0].gone:
                self._batcher().release(order.id)

        try:
            with self._connection(order.connection, source=False) as connection:
                take_cache(connection, reserve, self._between_steps, self.budget)
        except Exception as error:
            logger.debug("hand-over %d isn't taken: %s", order.connection.number, _in_words(error))
            self._let_go(drop)

    def _let_go(self, function: Callable[[], None]) -> None:
        """Give a request's place back, unless the rank has ended, and all places with it."""
        try:
            self._between_steps(function)
        except EpslotsError as error:
            logger.debug("nothing to give back: %s", error)


def _in_words(error: Exception) -> str:
    if not isinstance(error, EpslotsError):
        logger.warning("a hand-over failed", exc_info=error)
        return f"{type(error).__name__}: {error}"
    return str(error)
