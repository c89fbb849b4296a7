"""The slot pool and its loader as a state machine: for any routing, tables, slots and store agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from epslots.cache.slot_pool import SlotPool
from epslots.errors import CorruptExpertError
from epslots.planner.cache_policy import POLICIES
from epslots.planner.evictions import plan_evictions
from epslots.planner.expert_passes import plan_passes
from epslots.planner.use_history import UseHistory, note_use
from tests.support.slot_pools import LAYOUT, make


class PoolMachine(RuleBasedStateMachine):
    """Steps of random layers with random needs, sometimes hitting a corrupt record, under a random policy."""

    @initialize(experts=st.integers(1, 12), layers=st.integers(1, 3), policy=st.sampled_from(sorted(POLICIES)), data=st.data())
    def begin(self, experts: int, layers: int, policy: str, data: st.DataObject) -> None:
        quotas = data.draw(st.lists(st.integers(1, experts), min_size=layers, max_size=layers))
        self.pool, self.loader, self.store, self.telemetry = make(quotas, experts)
        self.policy = POLICIES[policy]
        self.experts, self.steps = experts, 0
        self.history = UseHistory.empty(layers, experts)
        self.address = self.pool.memory.data_ptr()

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """Load, hit, evict, run in passes: protected experts are never displaced before their pass."""
        layer = data.draw(st.integers(0, len(self.pool.quotas) - 1))
        counts = np.array(data.draw(st.lists(st.integers(0, 2), min_size=self.experts, max_size=self.experts)))
        history = self.history.layer(layer, self.experts)
        self.steps += 1
        note_use(history, counts > 0, self.steps)
        slot_range = self.pool.slot_range(layer)
        row = self.pool.slot_of[layer, : self.experts]
        score_E = self.policy(history)
        change = plan_evictions((row >= 0)[None], (counts > 0)[None], np.array([self.pool.quotas[layer]]), score_E)
        expert_Q, evicted_E = self.pool.expert_of[slot_range], change.evicted_RE[0]
        passes = plan_passes(counts, row, expert_Q, score_E, evicted_E, row < 0, start=slot_range.start)
        computed: set[int] = set()
        for one in passes:
            if len(one.fetch_experts):
                self.loader.fetch(layer, one.fetch_experts, one.fetch_slots, one.evicted)
            for expert, slot in zip(one.experts.tolist(), one.slots.tolist(), strict=True):
                assert torch.equal(self.pool.memory[slot], self.store.record(layer, expert)), "the wrong expert computes"
                assert int(self.pool.slot_of_device[layer, expert]) == slot
                computed.add(expert)
        assert computed == set(np.flatnonzero(counts).tolist())

    @rule(data=st.data())
    def hit_a_corrupt_record(self, data: st.DataObject) -> None:
        """The fetch fails by name; what it displaced is gone, nothing wrong came in, and serving goes on."""
        layer = data.draw(st.integers(0, len(self.pool.quotas) - 1))
        slot_range = self.pool.slot_range(layer)
        absent = np.flatnonzero(self.pool.slot_of[layer, : self.experts] < 0)
        if not len(absent):
            return
        victim_slot = data.draw(st.integers(slot_range.start, slot_range.stop - 1))
        expert = data.draw(st.sampled_from(absent.tolist()))
        self.store.corrupt.add((layer, expert))
        evicted = self.pool.expert_of[[victim_slot]].copy()
        with pytest.raises(CorruptExpertError, match=f"expert {expert} of layer {layer}"):
            self.loader.fetch(layer, np.array([expert]), np.array([victim_slot]), evicted)
        assert self.pool.slot_of[layer, expert] == -1
        assert self.pool.expert_of[victim_slot] == -1
        self.store.corrupt.clear()

    @invariant()
    def tables_slots_and_store_agree(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity()
            self.loader.check_content()
            assert self.pool.memory.data_ptr() == self.address, "slots are allocated once"


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_the_pool_takes_exactly_its_slots_bytes():
    pool, *_ = make([2, 3], 4)
    assert pool.memory.nbytes == pool.nbytes == 5 * LAYOUT.nbytes


def test_weights_are_views_of_the_slots():
    pool, loader, store, _ = make([2, 3], 4)
    loader.fetch(1, np.array([3]), np.array([4]), np.array([-1]))
    weights = pool.weights(1)
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        "gate_up_proj": (3, 4, 8),
        "down_proj": (3, 8, 2),
        "bias": (3, 3),
    }
    assert weights["bias"].dtype == torch.bfloat16
    expected = store.record(1, 3)[: 4 * 8 * 4].view(torch.float32).view(4, 8)
    assert torch.equal(weights["gate_up_proj"][2].view(torch.int32), expected.view(torch.int32))
    assert weights["gate_up_proj"].untyped_storage().data_ptr() == pool.memory.untyped_storage().data_ptr()


def broken(change: str) -> SlotPool:
    pool, loader, *_ = make([2, 2], 4)
    loader.fetch(0, np.array([3]), np.array([0]), np.array([-1]))
    if change == "two experts in one slot":
        pool.slot_of[0, 2] = 0
    elif change == "a slot of another layer":
        pool.slot_of[0, 3] = 2
    elif change == "a slot that forgot":
        pool.expert_of[0] = -1
    elif change == "an unknown slot":
        pool.expert_of[1] = 1
    return pool


@pytest.mark.parametrize(
    "change", ["two experts in one slot", "a slot of another layer", "a slot that forgot", "an unknown slot"]
)
def test_check_integrity_finds(change: str):
    with pytest.raises(AssertionError, match="layer 0"):
        broken(change).check_integrity()


def test_check_content_finds_a_changed_slot():
    pool, loader, *_ = make([2], 4)
    loader.fetch(0, np.array([3]), np.array([1]), np.array([-1]))
    pool.memory[1, 7] ^= 1
    with pytest.raises(AssertionError, match="slot 1 isn't expert 3"):
        loader.check_content()


def test_what_a_failed_fetch_did_not_bring_is_not_counted():
    pool, loader, store, telemetry = make([3], 4)
    store.corrupt.add((0, 2))
    with pytest.raises(CorruptExpertError):
        loader.fetch(0, np.array([1, 2, 3]), np.array([0, 1, 2]), np.array([-1, -1, -1]))
    assert telemetry.snapshot().layers[0].bytes_fetched == LAYOUT.nbytes
    assert pool.slot_of[0].tolist() == [-1, 0, -1, -1]


def test_fetches_and_evictions_are_counted():
    _, loader, _, telemetry = make([1], 4)
    loader.fetch(0, np.array([3]), np.array([0]), np.array([-1]))
    loader.fetch(0, np.array([1]), np.array([0]), np.array([3]))
    (layer,) = telemetry.snapshot().layers
    assert (layer.bytes_fetched, layer.evictions) == (2 * LAYOUT.nbytes, 1)
