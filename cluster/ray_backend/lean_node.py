"""Starts a Ray node with no more processes than ranks need.

Ray's own helpers serve a dashboard, logs and an autoscaler. ``ray.init`` has no settings for them, and waits for the
dashboard's process though it is to have none. Nor has it one for the time that a node may take to start.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray._private.services as ray_services
from ray._private.node import Node

from cluster.ray_backend import idle_agent

_START_S = 90.0
"""On top of the 30 seconds that Ray gives a node's raylet to come up, which a busy machine can miss."""
_POLL_S = 0.1  # Ray sends no message when a node is known: its own loop asks, too


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _agent_program(agent: str, *_: Any, **__: Any) -> list[str]:
    """The command line of a node's agent, up to the agent's own: Python, and the module that stands in for it."""
    return [sys.executable, "-I", "-S", str(Path(idle_agent.__file__)), agent]


def _patient_get_node(*args: Any, _get_node: Any = ray_services.get_node, **kwargs: Any) -> Any:
    """``get_node``, which a starting node calls until it is known."""
    ends = time.monotonic() + _START_S
    while True:
        try:
            return _get_node(*args, **kwargs)
        except RuntimeError:
            if time.monotonic() > ends:
                raise
        time.sleep(_POLL_S)  # the node's entry comes without an event


_REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (Node, "start_api_server", _nothing),  # the dashboard's process: without a dashboard, too
    (Node, "start_monitor", _nothing),  # of the autoscaler
    (Node, "start_log_monitor", _nothing),
    (ray_services, "_build_python_executable_command_memory_profileable", _agent_program),
    (ray_services, "get_node", _patient_get_node),
)


@contextmanager
def lean_nodes() -> Iterator[None]:
    """Within the context, nodes that this process starts have a head and a raylet alone, until an agent is needed."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in _REPLACED]
    for owner, name, value in _REPLACED:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
