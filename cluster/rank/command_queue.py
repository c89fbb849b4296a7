"""``CommandQueue``: other threads' orders to a rank's stepping thread. Only that touches the engine.

Commands are the driver's. An ``Errand`` is a function of a thread of this process, which waits for its result.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cluster.messages.rank import Command, Form
from cluster.rank.contact_store import ContactStore
from epslots.errors import PeerLost
from epslots.placement.placement import Placement

T = TypeVar("T")


@dataclass(frozen=True)
class Forming:
    """A ``Form``, with the store for its contacts."""

    form: Form
    contacts: ContactStore


@dataclass(frozen=True)
class Placing:
    """A ``SetPlacement``, with its placement unpacked."""

    epoch: int
    placement: Placement
    bytes_per_step: int


class NotYet(Exception):
    """Raised by an errand's function that has to be called again, after the next step."""


class Errand(Generic[T]):
    """A call of a function by the stepping thread.

    Attributes:
        result: of the function; done when it has returned or raised, or the rank has ended.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self.result: Future[T] = Future()

    def run(self) -> bool:
        """Call the function; returns whether that was its last call. Its exceptions go to the asking thread."""
        try:
            self.result.set_result(self._function())
        except NotYet:
            return False
        except Exception as error:
            self.result.set_exception(error)
        return True


Queued = Command | Forming | Placing | Errand[Any]


class CommandQueue:
    """Commands and errands of one rank.

    Args:
        news: guards them, and is notified of each.
    """

    def __init__(self, news: threading.Condition) -> None:
        self._news = news
        self._commands: list[Queued] = []
        self._again: list[Errand[Any]] = []
        """Errands that are taken with the next commands, or before the next step."""
        self._open: set[Errand[Any]] = set()
        """Errands whose results are awaited."""
        self._ended = False

    def __len__(self) -> int:
        return len(self._commands)

    def put(self, command: Queued) -> None:
        """Add a command."""
        with self._news:
            self._commands.append(command)
            self._news.notify_all()

    def put_again(self, errand: Errand[Any]) -> None:
        """Have an errand taken once more, after another step or command, whose effects it waits for."""
        with self._news:
            self._again.append(errand)

    def take(self, has_steps: Callable[[], bool]) -> list[Queued]:
        """All commands; waits for one unless there is a step to make."""
        with self._news:
            self._news.wait_for(lambda: self._commands or has_steps())
            commands: list[Queued] = [*self._commands, *self._again]
            self._commands, self._again = [], []
        return commands

    def between_steps(self, function: Callable[[], T]) -> T:
        """Have the stepping thread call a function, once more after each step in which it raises ``NotYet``.

        For any other thread. Returns the function's result, or raises what it raises.

        Raises:
            PeerLost: the rank has ended.
        """
        errand = Errand(function)
        with self._news:
            if self._ended:
                raise PeerLost("the rank has ended")
            self._open.add(errand)
            self._commands.append(errand)
            self._news.notify_all()
        try:
            return errand.result.result()
        finally:
            with self._news:
                self._open.discard(errand)

    def end(self) -> None:
        """End the queue: errands that wait, or were taken and not run, fail. For the stepping thread."""
        with self._news:
            self._ended = True
            left = [errand for errand in self._open if not errand.result.done()]
            self._commands, self._again = [], []
        for errand in left:
            errand.result.set_exception(PeerLost("the rank has ended"))
