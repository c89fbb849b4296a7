"""Starts a Ray node with no more processes than ranks need.

Half of Ray's own helpers serve a dashboard, logs and an autoscaler.

``ray.init`` has no settings for them, and waits for the dashboard's process though it is to have none. Nor has it one for the
time that a node may take to start.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray._private.services as ray_services
import ray._private.utils as ray_utils
from ray._private.node import Node

_START_S = 90.0
"""On top of the 30 seconds that Ray gives a node's raylet to come up, which a busy machine can miss."""
_POLL_S = 0.1  # Ray sends no message when a node is known: its own loop asks, too


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _left_out() -> ImportError:
    """Ray takes this for a lack of its dashboard's dependencies: the node's agent then serves nothing."""
    return ImportError("left out")


def _patient_get_node(*args: Any, _get_node: Any = ray_services.get_node, **kwargs: Any) -> Any:
    """``get_node``, which a starting node calls until it is known."""
    ends = time.monotonic() + _START_S
    while True:
        try:
            return _get_node(*args, **kwargs)
        except RuntimeError:
            if time.monotonic() > ends:
                raise
        time.sleep(_POLL_S)


_REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (Node, "start_api_server", _nothing),  # the dashboard's process: without a dashboard, too
    (Node, "start_monitor", _nothing),  # of the autoscaler
    (Node, "start_log_monitor", _nothing),
    (ray_utils, "get_dashboard_dependency_error", _left_out),
    (ray_services, "get_node", _patient_get_node),
)


@contextmanager
def lean_nodes() -> Iterator[None]:
    """Within the context, nodes that this process starts have only a head, a raylet and its two agents."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in _REPLACED]
    for owner, name, value in _REPLACED:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
