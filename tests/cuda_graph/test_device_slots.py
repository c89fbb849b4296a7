"""The device's decision about slots, on the CPU: the host's own rule to the slot, without asking for a single value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epslots.cuda_graph.device_slots import (
    DeviceSlots,
    Missing,
    read_device_tables,
    slots_obstacle,
)
from epslots.cuda_graph.torch_kernels import TorchKernels
from epslots.errors import ConfigError, CorruptExpertError
from epslots.planner.prefetch_policy import PrefetchBudget, PrefetchPolicy, PrefetchVerdict
from epslots.planner.use_history import UseHistory
from tests.support.device_slot_helpers import (
    NoValues,
    assert_as_the_host_decides,
    assert_slots_hold_what_tables_say,
    make_loader,
    predictions,
    problems,
    put_in_state,
    run_predictions,
    states,
    store,
)


@settings(deadline=None, max_examples=80)
@given(problem=problems(), apart=st.booleans())
def test_the_device_decides_as_the_host_does(problem: dict[str, Any], apart: bool):
    loader = make_loader(problem["quotas"], apart=apart)
    assert_as_the_host_decides(problem, loader, TorchKernels(loader))


@settings(deadline=None, max_examples=150)
@given(state=states())
def test_the_device_decides_as_the_host_does_in_any_state(state: dict[str, Any]):
    loader, slots, host = put_in_state(state, TorchKernels)
    layer, pool = state["layer"], loader.pool
    slots.prepare(layer, torch.tensor(state["ids"]))
    host.step(layer, state["ids"])
    found = [UseHistory.empty(1, experts).layer(0, experts) for experts in host.experts]
    steps, tallies, _ = slots.leave(found)
    assert steps == host.steps
    assert list(tallies[layer])[1:] == host.tallies[layer].tolist()[1:]
    assert np.array_equal(pool.slot_of[layer, : host.experts[layer]], host.slot_of[layer])
    assert np.array_equal(pool.expert_of[pool.slot_range(layer)], host.expert_of[layer])
    assert np.array_equal(found[layer].last_use, host.rows[layer].last_use)
    assert np.array_equal(found[layer].decayed, host.rows[layer].decayed)
    pool.check_integrity()


@settings(deadline=None, max_examples=60)
@given(state=states(), given_=predictions())
def test_prefetches_are_the_hosts(state: dict[str, Any], given_: dict[str, Any]):
    """In their order, with the same evictions, budget and verdict; two predictions, and a step after each."""
    loader, slots, host = put_in_state(state, TorchKernels)
    kernels, view, row = TorchKernels(loader), slots.layers[state["layer"]], host.rows[state["layer"]]
    ids, experts, nbytes = torch.tensor(state["ids"]), len(view.slot_of_E), loader.pool.layout.nbytes
    missing = Missing(*(torch.zeros(n, dtype=torch.int64) for n in (len(ids), len(ids), 1)))
    view.left.fill_(given_["left"])
    view.last_use_E.clamp_(max=state["step"])
    view.ahead.verdict_3.copy_(torch.tensor(given_["verdict"]))
    policy, budget = PrefetchPolicy(), PrefetchBudget(1, given_["left"])
    policy.set_verdict(PrefetchVerdict(*given_["verdict"]))
    for usage in given_["usage"]:
        row.last_use[:], row.decayed[:] = view.last_use_E, view.decayed_DE
        holds, scores, busy = view.slot_of_E.numpy() >= 0, host.policy(row), np.array([given_["running"] > 0])
        chosen = policy.plan(
            np.array([usage[:experts]]),
            holds[None],
            np.array([state["quota"]]),
            np.zeros(experts, np.int64),
            lambda scores=scores: scores,
            busy,
            budget,
            nbytes,
        )
        kernels.choose(view, torch.tensor(usage[:experts], dtype=torch.int32), torch.tensor([given_["running"]]))
        count = int(view.ahead.count)
        assert view.ahead.expert_F[:count].tolist() == ([] if chosen is None else chosen.experts.tolist())
        assert ((view.slot_of_E >= 0).numpy() == (holds if chosen is None else chosen.after_RE[0])).all()
        verdict = view.ahead.verdict_3.tolist()
        assert [bool(verdict[0]), *verdict[1:]] == list(policy.verdict)
        view.ahead.arrived_F.fill_(kernels.chunks)
        kernels.decide(view, ids, missing)
        policy.judge(np.isin(np.arange(experts), state["ids"]))
        budget.spend(np.zeros(int(missing.count), np.int64), nbytes)
        assert max(0, int(view.left)) // nbytes == budget.experts(nbytes)[0]


@settings(deadline=None, max_examples=60)
@given(state=states(), given_=predictions())
def test_late_prefetches_are_dropped_or_needed(state: dict[str, Any], given_: dict[str, Any]):
    """After a step each needed expert is in a slot, whole; nothing that was dropped is in the tables."""
    loader, slots, _ = put_in_state(state, TorchKernels)
    view = slots.layers[state["layer"]]
    kernels = TorchKernels(loader)
    for number, _ in enumerate(run_predictions(loader, slots, kernels, state, given_)):
        if number % 3 == 2:
            for expert in state["ids"]:
                assert expert >= len(view.slot_of_E) or view.slot_of_E[expert] >= 0
            dropped = [s for s, gone in zip(view.ahead.slot_F.tolist(), view.ahead.dropped_F.tolist(), strict=True) if gone]
            listed = dict(zip(view.ahead.slot_F.tolist(), view.ahead.expert_F.tolist(), strict=True))
            assert all(view.expert_of_Q[slot - view.start] != listed[slot] for slot in dropped)


def test_the_decision_asks_for_no_value():
    loader = make_loader((4, 3, 6))
    slots = DeviceSlots(loader, TorchKernels(loader), 3)
    missing = Missing(*(torch.zeros(n, dtype=torch.int64) for n in (3, 3, 1)))
    with NoValues():
        TorchKernels(loader).choose(slots.layers[1], torch.full((9,), 200, dtype=torch.int32), slots.misses)
        TorchKernels(loader).decide(slots.layers[1], torch.tensor([8, 2, 8]), missing)
    assert (int(missing.count), missing.expert_M[:2].tolist()) == (2, [2, 8])
    with pytest.raises(AssertionError, match="asks for values"), NoValues():
        int(missing.count)


def test_a_corrupt_record_enters_no_slot(monkeypatch: pytest.MonkeyPatch):
    loader = make_loader((4, 3, 6))
    slots = DeviceSlots(loader, TorchKernels(loader), 3)
    right = store().record

    def record(layer: int, expert: int) -> torch.Tensor:
        if expert == 5:
            raise CorruptExpertError("layers.0.experts", 5, "a test")
        return right(layer, expert)

    monkeypatch.setattr(store(), "record", record)
    with pytest.raises(CorruptExpertError):
        slots.prepare(0, torch.tensor([7, 5, 2]))
    assert loader.pool.slot_of[0].tolist()[:8] == [-1, -1, 0, -1, -1, -1, -1, -1]
    loader.pool.check_integrity()
    slots.prepare(0, torch.tensor([7, 2]))
    assert_slots_hold_what_tables_say(loader)


def test_more_pairs_than_agreed_are_refused():
    loader = make_loader((4, 3, 6))
    slots = DeviceSlots(loader, TorchKernels(loader), 3)
    with pytest.raises(ConfigError, match=r"a step of 4 .* of 3 at most"):
        slots.prepare(0, torch.tensor([1, 1, 1, 1]))


def test_tables_of_the_device_are_read():
    loader = make_loader((4, 3, 6), apart=True)
    loader.pool.slot_of_device[2, 15] = 8
    loader.pool.expert_of_device[8] = 15
    read_device_tables(loader.pool)
    assert (loader.pool.slot_of[2, 15], loader.pool.expert_of[8]) == (8, 15)
    loader.pool.check_integrity()


def test_obstacles():
    loader = make_loader((4, 9, 6))
    assert slots_obstacle(loader, 4) is None
    assert slots_obstacle(loader, 5) == "layers.0.experts has 4 slots, and a step may need 5 experts"
    assert slots_obstacle(make_loader((12, 9, 16)), 100) is None, "what never misses takes any step"
    loader.pool.device = torch.device("cuda")
    assert "isn't pinned" in str(slots_obstacle(loader, 4))
    loader.grouped = True
    assert "each other's counts" in str(slots_obstacle(loader, 4))
