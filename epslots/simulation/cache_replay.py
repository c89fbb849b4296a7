"""Hits of caches with few slots, replayed from a routing trace by the model's own eviction rule and policies.

``epslots trace replay`` and the benchmarks call ``replay``, ``belady`` and ``reuse_histogram``. ``belady`` is the optimum,
which needs the future: it evicts the expert whose next use is farthest away (Belady, IBM Systems Journal 1966).

Pure. Legend of shape suffixes: T steps, L layers, N choices of a step (tokens x k), E experts of the layer, C caches that are
compared, D = E + 1 stack distances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from epslots.arrays import BoolArray, IntArray
from epslots.planner.cache_policy import Policy, learns, lru
from epslots.planner.evictions import plan_evictions
from epslots.planner.reuse_distance import count_distances, stack_distances
from epslots.planner.use_history import UseHistory, note_use

IdArray = NDArray[np.integer]
Advance = Callable[[int], object]
"""Called with the number of steps of a layer that were done."""
# Steps between two calls of it.
_CHUNK = 256


@dataclass(frozen=True)
class Replayed:
    """Hits and misses of caches, int64 [C, L]. A step uses an expert once, however many of its tokens choose it."""

    hits_CL: IntArray
    misses_CL: IntArray

    @property
    def hit_rates(self) -> list[float]:
        """Hits per use over all layers, of each cache."""
        hits_C, misses_C = self.hits_CL.sum(1), self.misses_CL.sum(1)
        return [float(rate) for rate in hits_C / np.maximum(1, hits_C + misses_C)]


def steps_of(expert_ids: IdArray, row_SB: IntArray) -> IdArray:
    """The choices of each step of a batch, [T, L, N]; -1 where a lane is idle.

    Args:
        expert_ids: [rows, layers, k].
        row_SB: the rows that each step computes (``lanes.py``).
    """
    ids_SBLK = np.where((row_SB >= 0)[:, :, None, None], expert_ids[row_SB], -1).astype(expert_ids.dtype)
    return ids_SBLK.swapaxes(1, 2).reshape(len(row_SB), expert_ids.shape[1], -1)


def replay(
    ids_TLN: IdArray, num_experts_L: IntArray, quota_CL: IntArray, policy: Policy, advance: Advance = lambda steps: None
) -> Replayed:
    """Run a trace through caches.

    Args:
        ids_TLN: the experts chosen in each step; ids outside of the layer's experts are skipped.
        num_experts_L: experts of each layer.
        quota_CL: slots of each layer, of each cache; at most the layer's experts count.
        policy: an eviction policy.
        advance: called with the number of steps done, for a progress bar.
    """
    hits_CL, misses_CL = np.zeros(quota_CL.shape, np.int64), np.zeros(quota_CL.shape, np.int64)
    for layer, experts in enumerate(num_experts_L.tolist()):
        quota_C = np.minimum(quota_CL[:, layer], experts)
        if learns(policy):  # from the number of slots, too: each cache has its own history
            parts = [(slice(c, c + 1), slots) for c, slots in enumerate(quota_C.tolist())]
        else:
            parts = [(slice(0, len(quota_C)), None)]
        histories = [UseHistory.empty(1, experts).layer(0, experts) for _ in parts]
        holds_CE = np.zeros((len(quota_C), experts), bool)
        for step, used_E in enumerate(_used(ids_TLN[:, layer], experts, advance), start=1):
            misses_C = np.count_nonzero(used_E & ~holds_CE, axis=1)
            misses_CL[:, layer] += misses_C
            hits_CL[:, layer] += np.count_nonzero(used_E) - misses_C
            for history, (part, slots) in zip(histories, parts, strict=True):
                note_use(history, used_E, step, slots)
                if misses_C[part].any():
                    needed_CE = np.tile(used_E, (len(holds_CE[part]), 1))
                    holds_CE[part] = plan_evictions(holds_CE[part], needed_CE, quota_C[part], policy(history)).after_RE
    return Replayed(hits_CL, misses_CL)


def belady(ids_TLN: IdArray, num_experts_L: IntArray, quota_CL: IntArray, advance: Advance = lambda steps: None) -> Replayed:
    """Hits and misses of optimal caches.

    In a step that uses more experts than there are slots, it keeps the best of them, which no order of passes can always do:
    there it is a bound; elsewhere a cache could reach it.

    Args:
        ids_TLN: the experts chosen in each step; ids outside of the layer's experts are skipped.
        num_experts_L: experts of each layer.
        quota_CL: slots of each layer, of each cache; at most the layer's experts count.
        advance: called with the number of steps done, for a progress bar.
    """
    hits_CL, misses_CL = np.zeros(quota_CL.shape, np.int64), np.zeros(quota_CL.shape, np.int64)
    for layer, experts in enumerate(num_experts_L.tolist()):
        quota_C1 = np.minimum(quota_CL[:, layer], experts)[:, None]
        used_TE = np.array(list(_used(ids_TLN[:, layer], experts, advance)), bool).reshape(-1, experts)
        next_use_TE = _next_uses(used_TE)
        holds_CE = np.zeros((len(quota_C1), experts), bool)
        for used_E, next_use_E in zip(used_TE, next_use_TE, strict=True):
            hits_C = np.count_nonzero(used_E & holds_CE, axis=1)
            uses = int(np.count_nonzero(used_E))
            hits_CL[:, layer] += hits_C
            misses_CL[:, layer] += uses - hits_C
            if (hits_C < uses).any():
                order = np.argsort(next_use_E, kind="stable")
                used, candidates = used_E[order], (used_E | holds_CE)[:, order]
                # After a step whose experts fit, all of them are resident.
                first = candidates & used & (uses <= quota_C1)
                rest = candidates & ~first
                holds_CE[:, order] = first | (rest & (rest.cumsum(1) <= quota_C1 - first.sum(1, keepdims=True)))
    return Replayed(hits_CL, misses_CL)


def reuse_histogram(
    ids_TLN: IdArray, num_experts_L: IntArray, policy: Policy = lru, advance: Advance = lambda steps: None
) -> IntArray:
    """Uses by stack distance under the policy's scores, int64 [L, D of the largest layer].

    Args:
        ids_TLN: the experts chosen in each step; ids outside of the layer's experts are skipped.
        num_experts_L: experts of each layer.
    """
    histogram_LD = np.zeros((len(num_experts_L), int(num_experts_L.max()) + 1), np.int64)
    for layer, experts in enumerate(num_experts_L.tolist()):
        history = UseHistory.empty(1, experts).layer(0, experts)
        for step, used_E in enumerate(_used(ids_TLN[:, layer], experts, advance), start=1):
            count_distances(histogram_LD[layer], stack_distances(history.last_use, used_E, policy(history)))
            note_use(history, used_E, step)
    return histogram_LD


def _used(ids_TN: IdArray, experts: int, advance: Advance) -> Iterator[BoolArray]:
    """The experts that each step uses, bool [E]."""
    for start in range(0, len(ids_TN), _CHUNK):
        ids_CN = ids_TN[start : start + _CHUNK]
        used_CE = np.zeros((len(ids_CN), experts), bool)
        steps, choices = np.nonzero((ids_CN >= 0) & (ids_CN < experts))
        used_CE[steps, ids_CN[steps, choices]] = True
        yield from used_CE
        advance(len(ids_CN))


def _next_uses(used_TE: BoolArray) -> IntArray:
    """The step of each expert's next use after each step, int64 [T, E]; T if there is none."""
    steps, experts = used_TE.shape
    following_E = np.full(experts, steps)
    next_use_TE = np.empty((steps, experts), np.int64)
    for step in range(steps - 1, -1, -1):
        next_use_TE[step] = following_E
        following_E[used_TE[step]] = step
    return next_use_TE
