"""The controller's process: the Ray actor around the groups' controllers. It imports no torch."""

from __future__ import annotations

import time

import msgspec
import ray

from cluster.actor_process import ActorProcess, die_with_parent
from cluster.controller.controller import Controller
from cluster.controller.group_controllers import GroupControllers


class ControllerActor:
    """The actor. Ray calls its methods one after the other."""

    def __init__(self) -> None:
        die_with_parent()
        self._controllers = GroupControllers(lambda forecast: Controller(time.perf_counter, forecast=forecast))

    def process(self) -> bytes:
        """The ``ActorProcess``, as msgpack; the first call."""
        return msgspec.msgpack.encode(ActorProcess.of_this(ray.util.get_node_ip_address()))

    def call(self, message: bytes) -> bytes:
        """Carry out an order about a group; returns the ``Reply``."""
        return self._controllers.answer(message)
