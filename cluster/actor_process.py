"""For the processes of both Ray actors: where they run (``ActorProcess``), and their end with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import msgspec

_PR_SET_PDEATHSIG = 1


class ActorProcess(msgspec.Struct, frozen=True):
    """Where an actor runs; the answer to the first call, once the process is up.

    Attributes:
        host: the address by which Ray knows the node.
    """

    host: str
    pid: int

    @classmethod
    def of_this(cls, host: str) -> ActorProcess:
        """This process, on the node with this address."""
        return cls(host, os.getpid())

    def __str__(self) -> str:
        return f"node {self.host}, pid {self.pid}"


def die_with_parent() -> None:
    """Have the system end this process with Ray's process on this node, even while this one is stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
