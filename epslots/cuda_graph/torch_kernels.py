"""``TorchKernels``: the decisions about slots as torch operations, for the CPU, and as the reference of the Triton kernels.

Legend of shape suffixes: L layers of the pool, E experts, Q slots of a layer, N (token, k) pairs, M misses, F prefetches of a
layer at most, D rows of ``UseHistory.decayed``.
"""

from __future__ import annotations

import torch

from epslots.cache.expert_loader import ExpertLoader
from epslots.cuda_graph.device_slots import SLOWEST, STILL, DeviceLayer, Missing
from epslots.errors import CorruptExpertError
from epslots.planner.prefetch_policy import (
    CERTAIN,
    HALVE_AT,
    LEAST_JUDGED,
    LIKELY,
    START_ABOVE,
    STOP_BELOW,
    WORTH_A_TRY,
)
from epslots.planner.use_history import SCORE_SHIFT, SHIFTS, SNAPSHOT_EVERY, STEP_BITS, USE


class TorchKernels:
    """``Kernels`` by torch. ``decide`` and ``choose`` read no value on the host; copies do, which is free only on the CPU."""

    chunks = 1

    def __init__(self, loader: ExpertLoader) -> None:
        self._loader = loader
        device = loader.pool.device
        self._shift_D1 = torch.tensor([*SHIFTS, 63], device=device)[:, None]  # nothing is lost by a shift of 63
        self._use_D1 = torch.tensor([*[USE] * len(SHIFTS), 0], device=device)[:, None]

    def decide(self, layer: DeviceLayer, ids_N: torch.Tensor, missing: Missing) -> None:
        experts, most = layer.slot_of_E.shape[0], ids_N.shape[0]
        needed_E = torch.zeros(experts + 1, dtype=torch.bool, device=ids_N.device)
        needed_E = needed_E.index_fill_(0, ids_N.clamp(max=experts), True)[:experts]
        self._drop(layer, needed_E)
        self._record(layer, needed_E)

        missing_E = needed_E & (layer.slot_of_E < 0)
        count = missing_E.sum()
        number_E = torch.arange(experts, device=ids_N.device)
        expert_M = torch.where(missing_E, number_E, experts).sort().values[:most]
        slot_M, evictions = self._place(layer, expert_M, count, needed_E)
        layer.tally_3.add_(torch.stack([needed_E.sum() - count, count, evictions]))
        layer.left.sub_(count * self._loader.pool.layout.nbytes)
        missing.count.copy_(count)
        missing.expert_M[:most].copy_(expert_M)
        missing.slot_M[:most].copy_(slot_M)

    def _drop(self, layer: DeviceLayer, needed_E: torch.Tensor) -> None:
        """Empty the slots of prefetches that haven't arrived and aren't needed."""
        ahead, experts, slots = layer.ahead, layer.slot_of_E.shape[0], layer.expert_of_Q.shape[0]
        listed_F = torch.arange(len(ahead.expert_F), device=needed_E.device) < ahead.count
        late_F = (ahead.arrived_F < self.chunks) & (layer.slot_of_E[ahead.expert_F] == ahead.slot_F)
        dropped_F = listed_F & late_F & ~needed_E[ahead.expert_F]
        ahead.dropped_F.copy_(dropped_F)
        place_F = torch.where(dropped_F, ahead.slot_F - layer.start, slots)
        after_E = torch.nn.functional.pad(layer.slot_of_E, (0, 1))
        after_Q = torch.nn.functional.pad(layer.expert_of_Q, (0, 1))
        layer.slot_of_E.copy_(after_E.index_fill_(0, torch.where(dropped_F, ahead.expert_F, experts), -1)[:experts])
        layer.expert_of_Q.copy_(after_Q.index_fill_(0, place_F, -1)[:slots])

    def _record(self, layer: DeviceLayer, needed_E: torch.Tensor) -> None:
        """Update the history like the host's ``note_use``."""
        step, decayed_DE = layer.step.add_(1), layer.decayed_DE
        decayed_DE.sub_(decayed_DE >> self._shift_D1).add_(self._use_D1 * needed_E)
        still = (step % SNAPSHOT_EVERY == 0) | (step & (step - 1) == 0)
        decayed_DE[STILL].copy_(torch.where(still, decayed_DE[SLOWEST], decayed_DE[STILL]))
        layer.last_use_E.copy_(torch.where(needed_E, step, layer.last_use_E))

    def _place(
        self, layer: DeviceLayer, expert_M: torch.Tensor, count: torch.Tensor, kept_E: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Enter absent experts in the tables: in empty slots by position, then in those of the lowest scores.

        Args:
            expert_M: of which the first ``count`` are valid.
            kept_E: residents that stay.

        Returns:
            Their slots, int64 [M], and the number of evicted experts.
        """
        experts, slots, most = layer.slot_of_E.shape[0], layer.expert_of_Q.shape[0], expert_M.shape[0]
        uses_E = (layer.decayed_DE * layer.factors_D[:, None]).sum(0)
        order_E = (((uses_E >> SCORE_SHIFT) << STEP_BITS) + layer.last_use_E).sort(stable=True).indices
        rank_E = torch.empty_like(order_E).index_copy_(0, order_E, torch.arange(experts, device=order_E.device))
        number_Q = torch.arange(slots, device=order_E.device)
        occupant_Q = layer.expert_of_Q
        sitting_Q = occupant_Q.clamp(min=0)
        turn_Q = torch.where(kept_E[sitting_Q], experts, rank_E[sitting_Q])
        turn_Q = torch.where(occupant_Q < 0, number_Q - slots, turn_Q)
        position_M = turn_Q.sort(stable=True).indices[:most]
        displaced_M = occupant_Q[position_M]

        # Invalid entries go to one place past the end.
        valid_M = number_Q[:most] < count
        gone_M = torch.where(valid_M & (displaced_M >= 0), displaced_M, experts)
        come_M = torch.where(valid_M, expert_M, experts)
        slot_M = layer.start + position_M
        after_E = torch.nn.functional.pad(layer.slot_of_E, (0, 1)).index_fill_(0, gone_M, -1).index_copy_(0, come_M, slot_M)
        after_Q = torch.nn.functional.pad(occupant_Q, (0, 1))
        after_Q = after_Q.index_copy_(0, torch.where(valid_M, position_M, slots), expert_M)
        layer.slot_of_E.copy_(after_E[:experts])
        layer.expert_of_Q.copy_(after_Q[:slots])
        return slot_M, (valid_M & (displaced_M >= 0)).sum()

    def choose(self, layer: DeviceLayer, usage_E: torch.Tensor, running: torch.Tensor) -> None:
        ahead, most = layer.ahead, layer.ahead.expert_F.shape[0]
        self._judge(layer)
        usage_E, absent_E = usage_E.long(), layer.slot_of_E < 0
        ahead.expected_E.copy_(torch.where(absent_E & (usage_E >= WORTH_A_TRY), usage_E, 0))
        likely_E = usage_E >= torch.where(running > 0, LIKELY, WORTH_A_TRY)
        kept_E, candidate_E = likely_E & ~absent_E, likely_E & absent_E
        affordable = layer.left[0].clamp(min=0) // self._loader.pool.layout.nbytes
        room = layer.expert_of_Q.shape[0] - kept_E.sum()
        bounds = torch.stack([candidate_E.sum(), affordable, room]).min().clamp(max=most)
        count = bounds * ahead.verdict_3[0]
        expert_F = torch.where(candidate_E, -usage_E, 1).sort(stable=True).indices[:most]
        slot_F, evictions = self._place(layer, expert_F, count, kept_E)
        layer.tally_3[2:].add_(evictions)
        layer.left.sub_(count * self._loader.pool.layout.nbytes)
        ahead.fetched.add_(count)
        ahead.count.copy_(count)
        ahead.expert_F.copy_(expert_F)
        ahead.slot_F.copy_(slot_F)
        ahead.arrived_F.zero_()
        ahead.dropped_F.zero_()

    def _judge(self, layer: DeviceLayer) -> None:
        """Hold the last prediction against the step that followed it, as ``PrefetchPolicy.judge`` does."""
        ahead = layer.ahead
        hit_E = (ahead.expected_E > 0) & (layer.last_use_E == layer.step)
        active, predicted, used = ahead.verdict_3.unbind()
        predicted, used = predicted + ahead.expected_E.sum(), used + CERTAIN * hit_E.sum()
        goes_on, begins = (used * parts >= predicted * least for parts, least in (STOP_BELOW, START_ABOVE))
        expected = ahead.expected_E.sum() > 0
        judged = expected & (predicted >= LEAST_JUDGED)
        active = torch.where(judged, torch.where(active > 0, goes_on, begins), active > 0)
        halved = (expected & (predicted >= HALVE_AT)).long()
        ahead.verdict_3.copy_(torch.stack([active.long(), predicted >> halved, used >> halved]))

    def copy(self, layer: DeviceLayer, missing: Missing) -> None:
        count = int(missing.count)
        experts, slots = missing.expert_M[:count].tolist(), missing.slot_M[:count].tolist()
        done = 0
        try:
            for expert, slot in zip(experts, slots, strict=True):
                self._copy(layer, expert, slot)
                done += 1
        finally:  # a corrupt record is in no slot, and neither are those after it
            layer.slot_of_E[experts[done:]] = -1
            layer.expert_of_Q[[slot - layer.start for slot in slots[done:]]] = -1

    def copy_ahead(self, layer: DeviceLayer) -> None:
        ahead = layer.ahead
        for place in range(int(ahead.count)):
            expert, slot = int(ahead.expert_F[place]), int(ahead.slot_F[place])
            if ahead.dropped_F[place]:
                continue
            try:
                self._copy(layer, expert, slot)
                ahead.arrived_F[place] = self.chunks
            except CorruptExpertError:  # an error when it is needed
                layer.slot_of_E[expert] = layer.expert_of_Q[slot - layer.start] = -1

    def _copy(self, layer: DeviceLayer, expert: int, slot: int) -> None:
        store_layer = self._loader.store_layers[layer.number]
        self._loader.pool.memory[slot].copy_(self._loader.store.record(store_layer, expert))
