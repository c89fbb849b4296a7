"""The ranks of epslots under Ray.

from cluster import Cluster

with Cluster("path/or/id", ranks=8, slots="25%") as cluster:
    for result in cluster.generate(prompts, max_new_tokens=64):
        print(result.text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import epslots  # noqa: F401 - a rank imports it before torch, whose threads read how to wait

if TYPE_CHECKING:
    from cluster.api import Cluster
    from cluster.errors import ClusterError, Overloaded, RankFailed
    from cluster.generation import Generation, Result
    from cluster.messages.controller import Explanation
    from cluster.reports import ClusterStats, PlacementReport
    from epslots.generation.portions import Portion
    from epslots.generation.settings import GenerationSettings

__all__ = [
    "Cluster",
    "ClusterError",
    "ClusterStats",
    "Explanation",
    "Generation",
    "GenerationSettings",
    "Overloaded",
    "PlacementReport",
    "Portion",
    "RankFailed",
    "Result",
]

_HOME = {
    "Cluster": "cluster.api",
    "ClusterStats": "cluster.reports",
    "Explanation": "cluster.messages.controller",
    "Generation": "cluster.generation",
    "GenerationSettings": "epslots.generation.settings",
    "PlacementReport": "cluster.reports",
    "Portion": "epslots.generation.portions",
    "Result": "cluster.generation",
}


def __getattr__(name: str) -> Any:
    """Import on first use: a rank's process needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module 'cluster' has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "cluster.errors")), name)
