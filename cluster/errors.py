"""The errors of a cluster, beyond epslots' own.

    epslots.EpslotsError
    └── ClusterError       the cluster can't start, or can't go on
        ├── Overloaded     too many requests wait already
        ├── RequestFailed  one request ended with an error; the cluster goes on
        ├── RankFailed     a rank failed with an error of its own, on a node that the message names
        └── Superseded     another driver has adopted the ranks of this cluster

A request with a wrong prompt or setting is refused with ``epslots.ConfigError``.
"""

from __future__ import annotations

from epslots.errors import EpslotsError, RequestError


class ClusterError(EpslotsError):
    """The cluster can't start, or can't go on."""


def raised_anew(error: ClusterError) -> ClusterError:
    """A copy to raise: each caller gets its own, with its own traceback."""
    copy = type(error)(*error.args)
    copy.__cause__ = error
    return copy


class Overloaded(ClusterError):
    """The queue is full: try again when results have come, or give the cluster a larger ``max_queue``."""


class RequestFailed(ClusterError, RequestError):
    """A request ended with an error: its computation failed, or it was lost too often. The cluster goes on."""


class Superseded(ClusterError):
    """Another driver has adopted the ranks of this cluster, which stood still for too long. The ranks go on without it."""


class RankFailed(ClusterError):
    """A rank failed with an error of its own; the message names the rank, its node and the error.

    Attributes:
        kind: name of the error's class; empty if the rank didn't report it.
    """

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message, kind)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[0])
