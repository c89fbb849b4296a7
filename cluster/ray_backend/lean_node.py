"""Starts a Ray node with the processes that ranks need: half of Ray's own helpers serve a dashboard, logs and an autoscaler.

``ray.init`` has no settings for them, and waits for the dashboard's process though it is to have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray._private.utils as ray_utils
from ray._private.node import Node


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _left_out() -> ImportError:
    """What Ray takes for a lack of its dashboard's dependencies: the node's agent then serves nothing."""
    return ImportError("left out")


_REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (Node, "start_api_server", _nothing),  # the dashboard's process: without a dashboard, too
    (Node, "start_monitor", _nothing),  # of the autoscaler
    (Node, "start_log_monitor", _nothing),
    (ray_utils, "get_dashboard_dependency_error", _left_out),
)


@contextmanager
def lean_nodes() -> Iterator[None]:
    """Within the context, nodes that this process starts have a head, a raylet and its two agents alone."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in _REPLACED]
    for owner, name, value in _REPLACED:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
