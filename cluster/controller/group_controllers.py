"""``GroupControllers``: a ``Controller`` for each group of the cluster, in one process."""

from __future__ import annotations

from collections.abc import Callable

from cluster.controller.controller import Controller
from cluster.messages.controller import decode_addressed, decode_order, encode


class GroupControllers:
    """Answers orders about any group.

    Args:
        make: makes the controller of a group.
    """

    def __init__(self, make: Callable[[], Controller]) -> None:
        self._make = make
        self.by_group: dict[int, Controller] = {}

    def answer(self, message: bytes) -> bytes:
        """Carry out an addressed order; returns the ``Reply``, as bytes.

        Raises:
            ConfigError: the attached group's state is impossible.
        """
        group, order = decode_addressed(message)
        if group not in self.by_group:
            self.by_group[group] = self._make()
        return encode(self.by_group[group].answer(decode_order(order)))
