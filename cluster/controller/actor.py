"""The controller's process: the Ray actor around a ``Controller``. It imports no torch."""

from __future__ import annotations

import os
import time

import msgspec
import ray

from cluster.controller.controller import Controller
from cluster.messages.controller import decode_order, encode
from cluster.orphans import die_with_parent


class ControllerActor:
    """The actor. Ray calls its methods one after the other."""

    def __init__(self) -> None:
        die_with_parent()
        self._controller = Controller(time.perf_counter)

    def hello(self) -> bytes:
        """Node and process; the first call, which waits until the process is up."""
        return msgspec.msgpack.encode((ray.util.get_node_ip_address(), os.getpid()))

    def call(self, message: bytes) -> bytes:
        """Do as told, and answer."""
        return encode(self._controller.answer(decode_order(message)))
