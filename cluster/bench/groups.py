"""Several groups of ranks: routing, long prompts beside streams, killed ranks, hand-overs, and groups against one group.

The bench has parts, which can be chosen: ``PARTS``. All but "routing" run real ranks of this machine, with a Ray of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cluster.bench.group_bursts import measure_bursts
from cluster.bench.group_division import measure_division
from cluster.bench.group_hand_overs import measure_hand_overs
from cluster.bench.group_kills import measure_kills
from cluster.bench.group_routing import measure_routing
from epslots.bench.report import BenchReport
from epslots.errors import ConfigError

PARTS: dict[str, Callable[[BenchReport, Path, int], None]] = {
    "routing": measure_routing,
    "bursts": measure_bursts,
    "kills": measure_kills,
    "hand-over": measure_hand_overs,
    "division": measure_division,
}
"""Each takes the report, a folder for host stores, and the rounds."""


def bench_groups(report: BenchReport, cache_dir: Path, *, rounds: int = 3, parts: str = ",".join(PARTS)) -> None:
    """Routing, bursts of prompts, kills, hand-overs, and the division of ranks into groups.

    Args:
        rounds: of each figure; and ten kills of each kind for three rounds.
        parts: names in ``PARTS``, with commas between them.

    Raises:
        ConfigError: there is no such part.
        AssertionError: a request was lost, or has other tokens than without a kill.
    """
    chosen = parts.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        raise ConfigError(f"--parts {unknown[0]!r}: allowed: {', '.join(PARTS)}")
    for name in chosen:
        PARTS[name](report, cache_dir, rounds)
