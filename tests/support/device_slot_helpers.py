"""Slots that a device rules, without a model: a store of random experts and the loader's parts that they need."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from epslots.cache.host_store import HostStore, Manifest
from epslots.cache.node_store import open_node_store
from epslots.cache.slot_pool import SlotPool
from epslots.cuda_graph.device_slots import (
    DEVICE_POLICIES,
    MOST_PREFETCHES,
    UNBOUNDED,
    DeviceCounts,
    DeviceLayer,
    DeviceSlots,
    Missing,
)
from epslots.layout import LayerSpec, RecordLayout
from epslots.planner.cache_policy import POLICIES
from epslots.planner.evictions import plan_evictions
from epslots.planner.prefetch_policy import HALVE_AT, LEAST_JUDGED, LIKELY, WORTH_A_TRY
from epslots.planner.use_history import UseHistory, note_use
from epslots.progress import ProgressDisplay

# Records of several chunks of the copying kernel, the last one not full; on pages of the store with a gap behind each.
LAYOUT = RecordLayout.of([("gate_up_proj", (64, 50), "float32"), ("down_proj", (16, 8), "bfloat16")])


# The layers in the middle are another pool's.
LAYERS = tuple(LayerSpec(f"layers.{i}.experts", experts, LAYOUT) for i, experts in enumerate((12, 5, 9, 16)))


STORE_LAYERS = (0, 2, 3)


CPU = torch.device("cpu")


class RandomExperts:
    def read_expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(100 * layer + expert)
        return {t.name: torch.randn(t.shape, generator=generator) for t in LAYOUT.tensors}


@functools.cache
def store() -> HostStore:
    with TemporaryDirectory() as folder:  # the mapping stays when the file is gone
        return open_node_store(
            Manifest("k3y", "model", LAYERS),
            RandomExperts,  # type: ignore[arg-type]
            kind="file",
            cache_dir=Path(folder),
            start_progress=ProgressDisplay(shown=False),
        )


def make_loader(quotas: tuple[int, ...], *, apart: bool = False) -> Any:
    """The part of a loader that ``DeviceSlots`` needs. ``apart``: the device's tables are memory of their own, as on a GPU."""
    pool = SlotPool([LAYERS[index] for index in STORE_LAYERS], quotas, CPU)
    if apart:
        pool.slot_of_device, pool.expert_of_device = pool.slot_of_device.clone(), pool.expert_of_device.clone()
    waited: list[bool] = []
    return SimpleNamespace(
        pool=pool,
        store=store(),
        store_layers=STORE_LAYERS,
        grouped=False,
        waited=waited,
        wait_all=lambda: waited.append(True),
    )


class HostRule:
    """The same by the host's rule: ``note_use``, ``plan_evictions``, and slots in the order of ``plan_passes``."""

    def __init__(self, quotas: tuple[int, ...], policy: str) -> None:
        self.quotas, self.policy = quotas, POLICIES[policy]
        self.starts = np.concatenate([[0], np.cumsum(quotas)])
        self.experts = [LAYERS[index].num_experts for index in STORE_LAYERS]
        self.rows = [UseHistory.empty(1, experts).layer(0, experts) for experts in self.experts]
        self.slot_of = [np.full(experts, -1) for experts in self.experts]
        self.expert_of = [np.full(quota, -1) for quota in quotas]
        self.steps = [0] * len(quotas)
        self.tallies = np.zeros((len(quotas), len(DeviceCounts._fields)), np.int64)

    def step(self, layer: int, ids: list[int]) -> None:
        experts, slot_of, expert_of = self.experts[layer], self.slot_of[layer], self.expert_of[layer]
        needed = np.zeros(experts, bool)
        needed[[i for i in ids if i < experts]] = True
        self.steps[layer] += 1
        note_use(self.rows[layer], needed, self.steps[layer])
        score = self.policy(self.rows[layer])
        change = plan_evictions((slot_of >= 0)[None], needed[None], np.array([self.quotas[layer]]), score)
        misses = np.flatnonzero(needed & (slot_of < 0))
        going = sorted(np.flatnonzero(change.evicted_RE[0]).tolist(), key=lambda expert: (score[expert], expert))
        slots = [*(self.starts[layer] + np.flatnonzero(expert_of < 0)).tolist(), *slot_of[going].tolist()][: len(misses)]
        self.tallies[layer] += [1, needed.sum() - len(misses), len(misses), len(going), 0]
        expert_of[slot_of[going] - self.starts[layer]] = -1
        slot_of[going] = -1
        slot_of[misses] = slots
        expert_of[np.array(slots, int) - self.starts[layer]] = misses
        assert np.array_equal(slot_of >= 0, change.after_RE[0])


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Quotas, a policy, and steps of random layers; pairs never outnumber slots where something may be missing."""
    experts = [LAYERS[index].num_experts for index in STORE_LAYERS]
    quotas = tuple(draw(st.integers(1, e - 1)) for e in experts)
    pairs = draw(st.integers(1, min(quotas)))
    steps = []
    for _ in range(draw(st.integers(1, 25))):
        layer = draw(st.integers(0, len(experts) - 1))
        # An id of E stands for an expert without weights.
        ids = draw(st.lists(st.integers(0, experts[layer]), min_size=1, max_size=pairs))
        steps.append((layer, ids))
    return {
        "quotas": quotas,
        "policy": draw(st.sampled_from(DEVICE_POLICIES)),
        "pairs": pairs,
        "steps": steps,
        "turns": draw(st.sets(st.integers(1, 25))),
    }


def assert_slots_hold_what_tables_say(loader: Any) -> None:
    pool = loader.pool
    for layer in range(len(STORE_LAYERS)):
        slot_range = pool.slot_range(layer)
        for slot, expert in enumerate(pool.expert_of_device[slot_range].tolist(), slot_range.start):
            if expert >= 0:
                assert torch.equal(pool.memory[slot], loader.store.record(STORE_LAYERS[layer], expert)), (slot, expert)


def assert_as_the_host_decides(problem: dict[str, Any], loader: Any, kernels: Any) -> None:
    """Runs a problem both ways. The host takes over and gives back after each step in ``turns``."""
    host = HostRule(problem["quotas"], problem["policy"])
    rows = [UseHistory.empty(1, e).layer(0, e) for e in host.experts]
    steps: list[int] = [0] * len(rows)
    tallies = np.zeros_like(host.tallies)
    slots = DeviceSlots(loader, kernels, problem["pairs"], policy=problem["policy"])
    slots.enter(rows, steps)
    for number, (layer, ids) in enumerate([*problem["steps"], (-1, [])], 1):
        if layer >= 0:
            host.step(layer, ids)
            slots.prepare(layer, torch.tensor(ids))
            assert_slots_hold_what_tables_say(loader)
        if layer < 0 or number in problem["turns"]:
            steps, counted, _ = slots.leave(rows)
            tallies += counted
            assert steps == host.steps
            assert np.array_equal(tallies, host.tallies)
            for layer, quota in enumerate(host.quotas):
                assert np.array_equal(loader.pool.slot_of[layer, : host.experts[layer]], host.slot_of[layer])
                assert np.array_equal(loader.pool.expert_of[loader.pool.slot_range(layer)], host.expert_of[layer]), quota
                for name in ("last_use", "decayed"):
                    assert np.array_equal(getattr(rows[layer], name), getattr(host.rows[layer], name)), name
            loader.pool.check_integrity()
            slots.enter(rows, steps)
    assert len(loader.waited) == 1 + len(problem["turns"] & set(range(1, number))) + 1


@st.composite
def states(draw: st.DrawFn) -> dict[str, Any]:
    """One layer in any state that its tables may be in, and any step that it may get."""
    layer = draw(st.integers(0, len(STORE_LAYERS) - 1))
    experts = LAYERS[STORE_LAYERS[layer]].num_experts
    quota = draw(st.integers(1, experts - 1))
    residents = draw(st.permutations(range(experts)))[:quota]
    empty = draw(st.sets(st.integers(0, quota - 1))) if draw(st.booleans()) else ()
    ids = st.integers(0, experts + 2) | st.sampled_from(residents)  # hits beside misses
    # Few values, so that scores tie; and large ones, where a sum of 32 bits would overflow.
    values = st.sampled_from([0, 1, 1 << 15, 1 << 20, (1 << 25) - 1])
    return {
        "layer": layer,
        "quota": quota,
        "expert_of_Q": [-1 if number in empty else expert for number, expert in enumerate(residents)],
        "uses": draw(st.lists(values, min_size=60, max_size=60)),
        "step": draw(st.sampled_from([0, 1, 6, 7, 511, (1 << 31) - 1, (1 << 31) + 5])),
        "policy": draw(st.sampled_from(DEVICE_POLICIES)),
        "ids": draw(st.lists(ids, min_size=draw(st.integers(1, quota)), max_size=quota)),
    }


def put_in_state(state: dict[str, Any], make: Any) -> tuple[Any, DeviceSlots, HostRule]:
    """A pool in the state, with ``make(loader)`` as kernels, and the host's rule in the same one."""
    layer, quota = state["layer"], state["quota"]
    loader = make_loader(tuple(quota if number == layer else 1 for number in range(len(STORE_LAYERS))))
    host = HostRule(loader.pool.quotas, state["policy"])
    start = loader.pool.slot_range(layer).start
    for position, expert in enumerate(state["expert_of_Q"]):
        if expert >= 0:
            loader.pool.occupy(layer, np.array([expert]), np.array([start + position]))
            host.slot_of[layer][expert], host.expert_of[layer][position] = start + position, expert
    row = host.rows[layer]
    row.last_use[:] = state["uses"][: len(row.last_use)]
    row.decayed[:] = np.resize(state["uses"], row.decayed.size + 11)[11:].reshape(row.decayed.shape)
    host.steps[layer] = state["step"]
    slots = DeviceSlots(loader, make(loader), quota, policy=state["policy"])
    slots.enter(host.rows, host.steps)
    return loader, slots, host


@st.composite
def predictions(draw: st.DrawFn) -> dict[str, Any]:
    """Two predictions of a layer, and the circumstances in which they are made."""
    # Few values, so that likeliest experts tie.
    usage = st.lists(st.sampled_from([0, WORTH_A_TRY - 1, WORTH_A_TRY, LIKELY, 200, 255]), min_size=16, max_size=16)
    return {
        "usage": [draw(usage), draw(usage)],
        "running": draw(st.integers(0, 1)),
        "left": draw(st.sampled_from([UNBOUNDED, 3 * LAYOUT.nbytes + 1, LAYOUT.nbytes - 1, -LAYOUT.nbytes])),
        "verdict": draw(
            st.tuples(st.booleans(), st.sampled_from([0, LEAST_JUDGED - 1, HALVE_AT]), st.sampled_from([0, LEAST_JUDGED]))
        ),
        "arrived": draw(st.lists(st.booleans(), min_size=MOST_PREFETCHES, max_size=MOST_PREFETCHES)),
    }


def run_predictions(
    loader: Any, slots: DeviceSlots, kernels: Any, state: dict[str, Any], given: dict[str, Any]
) -> Iterator[list[Any]]:
    """Predict, decide a step and predict again; yields all state after each.

    Of the first prefetches some haven't arrived when the step is decided, and are copied to the end then.
    """
    view = slots.layers[state["layer"]]
    ahead, experts = view.ahead, len(view.slot_of_E)
    missing = Missing(*(torch.zeros(n, dtype=torch.int64) for n in (len(state["ids"]), len(state["ids"]), 1)))
    view.left.fill_(given["left"])
    ahead.verdict_3.copy_(torch.tensor(given["verdict"]))
    for usage in given["usage"]:
        running = torch.tensor([given["running"]])
        kernels.choose(view, torch.tensor(usage[:experts], dtype=torch.int32), running)
        count = int(ahead.count)
        yield [*_state(view), ahead.expert_F[:count].tolist(), ahead.slot_F[:count].tolist()]
        loader.pool.check_integrity()
        ahead.arrived_F.copy_(torch.tensor(given["arrived"])[: len(ahead.arrived_F)] * kernels.chunks)
        kernels.decide(view, torch.tensor(state["ids"]), missing)
        yield [*_state(view), ahead.dropped_F[:count].tolist()]
        loader.pool.check_integrity()
        ahead.arrived_F.zero_()
        kernels.copy_ahead(view)
        kernels.copy(view, missing)
        yield [(ahead.arrived_F == kernels.chunks).tolist()[:count], *_state(view)]
        come = [*ahead.slot_F[:count][ahead.dropped_F[:count] == 0].tolist(), *missing.slot_M[: int(missing.count)].tolist()]
        for slot in come:
            expert = int(view.expert_of_Q[slot - view.start])
            assert expert < 0 or torch.equal(loader.pool.memory[slot], store().record(STORE_LAYERS[state["layer"]], expert))


def _state(view: DeviceLayer) -> list[Any]:
    ahead = view.ahead
    tensors = [view.slot_of_E, view.expert_of_Q, view.last_use_E, view.decayed_DE, view.step, view.tally_3, view.left]
    return [t.tolist() for t in (*tensors, ahead.expected_E, ahead.verdict_3, ahead.count, ahead.fetched)]


class NoValues(TorchDispatchMode):
    """Refuses operations whose result depends on a tensor's values in its shape, or brings them to the host."""

    VALUES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not func.name().partition("::")[2].startswith(self.VALUES), f"{func.name()} asks for values"
        return func(*args, **(kwargs or {}))
