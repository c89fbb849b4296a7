"""What a cache of few slots would have hit, from a routing trace alone: the very plan and policies that the model runs.

``belady`` is the optimum that no policy can beat: it gives up the expert whose next use is farthest away (Belady, IBM Systems
Journal 1966), which takes knowing the future.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from epslots.eviction import Policy, UseHistory, record_use
from epslots.residency import settle
from epslots.waves import plan_waves


@dataclass(frozen=True)
class Replayed:
    """Hits and misses of one replay, int64 [layers]."""

    hits: NDArray[np.int64]
    misses: NDArray[np.int64]

    @property
    def hit_rate(self) -> float:
        """Hits per use over all layers."""
        return float(self.hits.sum() / max(1, self.hits.sum() + self.misses.sum()))


def replay(expert_ids: NDArray[np.int16], num_experts: NDArray[np.int64], slots: int, policy: Policy) -> Replayed:
    """Run a trace through caches of ``slots`` slots a layer, a token a step.

    Args:
        expert_ids: int16 [steps, layers, k]; ids outside the layer's experts are passed over.
        num_experts: int64 [layers].
        slots: slots of each layer.
        policy: an eviction policy.
    """
    hits, misses = np.zeros(len(num_experts), np.int64), np.zeros(len(num_experts), np.int64)
    for layer, experts in enumerate(num_experts.tolist()):
        history = UseHistory.empty(1, experts).layer(0, experts)
        position_E, expert_Q = np.full(experts, -1), np.full(min(slots, experts), -1)
        quota = np.array([len(expert_Q)])
        counts_E = np.zeros(experts, np.int64)
        for step, chosen in enumerate(expert_ids[:, layer], start=1):
            counts_E[:] = 0
            counts_E[chosen[(chosen >= 0) & (chosen < experts)]] = 1
            record_use(history, counts_E > 0, step)
            missing = int(np.count_nonzero((counts_E > 0) & (position_E < 0)))
            hits[layer] += int(counts_E.sum()) - missing
            misses[layer] += missing
            if missing:
                needed_E, score_E = counts_E > 0, policy(history)
                change = settle((position_E >= 0)[None], needed_E[None], quota, score_E)
                for wave in plan_waves(needed_E, position_E, expert_Q, score_E, change.evicted_RE[0]):
                    position_E[wave.evicted[wave.evicted >= 0]] = -1
                    expert_Q[wave.fetch_positions] = wave.fetch_experts
                    position_E[wave.fetch_experts] = wave.fetch_positions
    return Replayed(hits, misses)


def belady(expert_ids: NDArray[np.int16], num_experts: NDArray[np.int64], slots: int) -> Replayed:
    """The optimum for the same caches. Arguments as ``replay``."""
    hits, misses = np.zeros(len(num_experts), np.int64), np.zeros(len(num_experts), np.int64)
    steps = len(expert_ids)
    for layer, experts in enumerate(num_experts.tolist()):
        next_use = _next_uses(expert_ids[:, layer], experts)
        held: set[int] = set()
        farthest = np.full(experts, steps + 1)
        for step, chosen in enumerate(expert_ids[:, layer].tolist()):
            wanted = {e for e in chosen if 0 <= e < experts}
            hits[layer] += len(wanted & held)
            misses[layer] += len(wanted - held)
            for expert in wanted:
                farthest[expert] = next_use[step, expert]
            held |= wanted
            spare = sorted(held - wanted, key=lambda e: farthest[e])
            held = wanted | set(spare[: max(0, min(slots, experts) - len(wanted))])
    return Replayed(hits, misses)


def _next_uses(chosen_SK: NDArray[np.int16], experts: int) -> NDArray[np.int64]:
    """int64 [steps, experts]: the step of each expert's next use after this one, ``steps + 1`` if there is none."""
    steps = len(chosen_SK)
    following = np.full(experts, steps + 1, np.int64)
    table = np.empty((steps, experts), np.int64)
    for step in range(steps - 1, -1, -1):
        table[step] = following
        chosen = chosen_SK[step]
        following[chosen[(chosen >= 0) & (chosen < experts)]] = step
    return table
