"""Shared by the cluster's benches: the example model on two ranks, prompts of Python, and the ranks' processes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.api import Cluster
from cluster.generation import Result
from epslots.bench.models import LARGE_EXPERTS
from epslots.example import example_model

RANKS = 2
SLOTS = 8  # a quarter of the example model's 32 experts a layer
# In fp32, where batches don't change tokens. In bf16, the example's own dtype, they do, also in plain transformers.
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "slots": SLOTS,
    "kv_tokens": 16384,
    "device": "cpu",
    "costs": LARGE_EXPERTS,
    "progress": False,
}

_BEGINNINGS = (
    "def read_{}(path):\n",
    "class {}:\n    def __init__(self, ",
    "import os\n\n{} = ",
    "    for name, {} in self.items():\n        if ",
)
_NOUNS = [
    "config",
    "lines",
    "table",
    "tree",
    "point",
    "user",
    "token",
    "image",
    "graph",
    "queue",
    "date",
    "file",
    "row",
    "key",
]


def prompts(count: int) -> list[str]:
    """Beginnings of Python files."""
    return [
        _BEGINNINGS[n % len(_BEGINNINGS)].format(_NOUNS[n // len(_BEGINNINGS) % len(_NOUNS)] + "s" * (n // 56))
        for n in range(count)
    ]


def open_cluster(cache_dir: Path, ranks: int = RANKS, *, path: Path | None = None, **settings: Any) -> Cluster:
    """A cluster with a local Ray. It plans with the costs of large experts, so that tokens travel.

    Args:
        path: of the model; None = the example.
    """
    return Cluster(path or example_model(), ranks=ranks, cache_dir=cache_dir, **(SETTINGS | settings))


def pids(cluster: Cluster, group: int = 0) -> list[int]:
    """Process ids of a group's ranks, by rank."""
    found = [re.search(r"pid (\d+)", place) for place in cluster.placement(group).ranks]
    return [int(match[1]) for match in found if match is not None]


def compare(results: Sequence[Result], undisturbed: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """Requests lost, and tokens of the others that differ from the undisturbed run's."""
    lost = sum(result.reason not in ("length", "stop") for result in results)
    differing = 0
    for result in results:
        right = undisturbed[result.index]
        if result.reason in ("length", "stop") and result.tokens != right:
            pairs = zip(result.tokens, right, strict=False)
            differing += sum(a != b for a, b in pairs) + abs(len(result.tokens) - len(right))
    return lost, differing
