"""The controller's process: the Ray actor around a ``Controller``. It imports no torch."""

from __future__ import annotations

import time

import msgspec
import ray

from cluster.actor_process import ActorProcess, die_with_parent
from cluster.controller.controller import Controller
from cluster.messages.controller import decode_order, encode


class ControllerActor:
    """The actor. Ray calls its methods one after the other."""

    def __init__(self) -> None:
        die_with_parent()
        self._controller = Controller(time.perf_counter)

    def process(self) -> bytes:
        """The ``ActorProcess``, as msgpack; the first call."""
        return msgspec.msgpack.encode(ActorProcess.of_this(ray.util.get_node_ip_address()))

    def call(self, message: bytes) -> bytes:
        """Carry out an order; returns the ``Reply``."""
        return encode(self._controller.answer(decode_order(message)))
