"""Placements in whole models: followed by all ranks at once, reached while tokens flow, and never seen in an output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import epslots
from epslots.errors import ConfigError, CorruptExpertError, ExchangeError, PeerLost, RankMismatchError
from epslots.group.join import join, start_rank
from epslots.group.rank_group import RankGroup, group_of
from epslots.placement.placement import Placement, default_placement
from epslots.placement.placement_file import write_placement
from epslots.placement.rank_speeds import work_ns
from epslots.planner.cost_model import Costs
from epslots.progress import ProgressDisplay
from epslots.runtime import runtime_of
from epslots.telemetry import WindowMeter
from epslots.transport.local_transport import LocalHub, LocalTransport
from tests.support import zoo
from tests.support.equality import assert_close
from tests.support.grouped_ranks import COPIES_TRAVEL, TOKENS_TRAVEL, Grouped
from tests.support.plan_strategies import random_placement
from tests.support.rank_helpers import run_threads

Checkpoints = Callable[[str], Path]


def groups_of(grouped: Grouped) -> list[RankGroup]:
    groups = [group_of(model) for model in grouped.models]
    assert all(groups)
    return groups  # type: ignore[return-value]


def bytes_of(grouped: Grouped) -> int:
    return max(layer.layout.nbytes for layer in grouped.runtime(0).layers)


def step(grouped: Grouped, seed: int, length: int = 3) -> list[torch.Tensor]:
    """One forward pass on each rank; the last rank has none."""

    def work(rank: int, model: Any) -> torch.Tensor | None:
        if rank == len(grouped.models) - 1 and rank:
            return None
        return model(input_ids=zoo.random_ids(1, length + rank, seed=seed + rank)).logits

    return grouped.run(work)


def compare(grouped: Grouped, reference: Any, seed: int, length: int = 3) -> None:
    for rank, logits in enumerate(step(grouped, seed, length)):
        if logits is not None:
            with torch.no_grad():
                assert_close(logits, reference(input_ids=zoo.random_ids(1, length + rank, seed=seed + rank)).logits)
    grouped.check()


@pytest.mark.parametrize(
    ("name", "costs"), [("qwen3_moe", TOKENS_TRAVEL), ("ernie4_5_vl_moe", TOKENS_TRAVEL), ("gpt_oss", COPIES_TRAVEL)]
)
def test_outputs_stay_and_every_placement_is_reached(name: str, costs: Any, checkpoint: Checkpoints, cache_dir: Path):
    """Of two layouts in two pools (ernie4_5_vl_moe), with biases (gpt_oss); offered to the ranks one after another."""
    folder = checkpoint(name)
    grouped, reference = Grouped(folder, cache_dir, slots=["50%", "25%", "75%"], costs=costs), zoo.reference(folder)
    generator = np.random.default_rng(1)
    groups = groups_of(grouped)
    pools = [loader.store_layers for loader in grouped.runtime(0).loaders]
    for number in range(1, 4):
        target = random_placement(generator, groups[0].placement)
        if len(pools) > 1:  # slots pass between the layers of one pool alone
            target = replace(
                random_placement(generator, replace(target, quota_LR=groups[0].placement.quota_LR)),
                version=target.version,
                quota_LR=groups[0].placement.quota_LR,
                wanted_LRE=np.zeros_like(target.wanted_LRE),
            )
        for late, group in enumerate(groups):
            compare(grouped, reference, seed=10 * late)
            assert group.placement.version == number - 1, "not before all have it"
            group.offer(target, 3 * bytes_of(grouped))
        for seed in range(400):
            compare(grouped, reference, seed=seed) if seed < 6 else step(grouped, seed)
            if not groups[0].pending_migrations:
                break
        for group in groups:
            assert group.placement.version == number and group.pending_migrations == 0
            assert group.placement.home_LE.tolist() == target.home_LE.tolist()
        for rank, model in enumerate(grouped.models):
            slots = [runner.cache.slots for runner in runtime_of(model).runners]
            assert slots == target.quota_LR[:, rank].tolist()
            assert [layer.slots for layer in epslots.stats(model).layers] == slots
        compare(grouped, reference, seed=number, length=30)
    if len(pools) == 1:
        assert sum(layer.migrations for model in grouped.models for layer in epslots.stats(model).layers)


def test_a_misfit_is_refused_and_an_old_version_ignored(checkpoint: Checkpoints, cache_dir: Path):
    grouped = Grouped(checkpoint("qwen3_moe"), cache_dir, slots=[3, 4])
    group, other = groups_of(grouped)
    first = group.placement
    with pytest.raises(ConfigError, match="for 1 ranks, and there are 2"):
        group.offer(replace(default_placement(first.num_experts_L.tolist(), first.quota_LR[:, :1]), version=1), 1)
    with pytest.raises(ConfigError, match="bytes_per_step=0"):
        group.offer(replace(first, version=1), 0)
    target = replace(first, version=5, home_LE=first.home_LE[:, ::-1].copy())
    for each in (group, other):
        each.offer(target, 1000)
        each.offer(replace(first, version=4), 1000)
    step(grouped, 1)
    assert group.placement.version == other.placement.version == 5
    group.offer(replace(first, version=7), 1000)
    other.offer(replace(first, version=6), 1000)

    def errors(transport: LocalTransport) -> Exception | None:
        try:
            with torch.no_grad():
                grouped.models[transport.rank](input_ids=zoo.random_ids(1, 2))
        except (ExchangeError, PeerLost) as error:
            return error
        return None

    found = run_threads(errors, 2, hub=grouped.hub)
    assert any("was offered the placements [7], and another rank 6" in str(error) for error in found), found


@pytest.mark.parametrize("lost", [0, 2])
def test_survivors_of_a_half_made_move_go_on_from_what_they_hold(lost: int, checkpoint: Checkpoints, cache_dir: Path):
    """A rank is lost in the exchange of a move; the others form the next version, with a newcomer, and get there."""
    folder = checkpoint("qwen3_moe")
    grouped, reference = Grouped(folder, cache_dir, slots=[4, 4, 4], costs=COPIES_TRAVEL), zoo.reference(folder)
    for seed in range(3):
        compare(grouped, reference, seed=seed)
    target = random_placement(np.random.default_rng(3), groups_of(grouped)[0].placement)
    for group in groups_of(grouped):
        group.offer(target, bytes_of(grouped))
    compare(grouped, reference, seed=4)
    left = groups_of(grouped)[0].pending_migrations
    assert left, "all is moved already"
    grouped.hub.lose(lost)
    fresh = epslots.load(folder, slots=4, device="cpu", dtype="float32", cache_dir=cache_dir, progress=False)
    survivors = [model for rank, model in enumerate(grouped.models) if rank != lost]
    grouped.models = [*survivors, fresh]
    grouped.hub = LocalHub(3, epoch=1)
    run_threads(lambda t: join(grouped.models[t.rank], t, settings={}, costs=COPIES_TRAVEL), 3, hub=grouped.hub)
    groups = groups_of(grouped)
    assert {group.placement.version for group in groups} == {2}, "it only ever grows"
    new_of_old = {old: new for new, old in enumerate(rank for rank in range(3) if rank != lost)}
    for old, new in new_of_old.items():
        stays = target.home_LE == old
        assert (groups[0].placement.home_LE[stays] == new).all()
    for seed in range(300):
        compare(grouped, reference, seed=seed)
        if not groups[0].pending_migrations:
            break
    assert groups[0].pending_migrations == 0


def test_a_failed_migration_ends_the_step_and_empties_its_slot(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    grouped, reference = Grouped(folder, cache_dir, slots=[4, 4]), zoo.reference(folder)
    compare(grouped, reference, seed=1)
    group = groups_of(grouped)[0]
    absent = int(np.flatnonzero(~group.shared.layers[0].state.holds_RE.any(0))[0])
    wanted = np.zeros_like(group.placement.wanted_LRE)
    wanted[0, 0, absent] = True
    home = group.placement.home_LE.copy()
    home[0, absent] = 0
    for each in groups_of(grouped):
        each.offer(replace(each.placement, version=1, home_LE=home, wanted_LRE=wanted), bytes_of(grouped))
    store = runtime_of(grouped.models[0]).store
    record, copying = store.record, []

    def broken(layer: int, expert: int) -> torch.Tensor:
        if (layer, expert) == (0, absent):
            copying.append(expert)
            raise CorruptExpertError(layer, expert, "flipped")
        return record(layer, expert)

    setattr(store, "record", broken)  # noqa: B010

    def errors(transport: LocalTransport) -> Exception | None:
        try:
            for seed in range(40):
                with torch.no_grad():
                    grouped.models[transport.rank](input_ids=zoo.random_ids(1, 2, seed=seed))
        except (CorruptExpertError, PeerLost) as error:
            return error
        return None

    first, second = run_threads(errors, 2, hub=grouped.hub)
    assert copying and isinstance(first, CorruptExpertError) and isinstance(second, PeerLost)
    setattr(store, "record", record)  # noqa: B010
    grouped.hub = LocalHub(2, epoch=1)
    run_threads(lambda t: join(grouped.models[t.rank], t), 2, hub=grouped.hub)
    for seed in range(20):
        compare(grouped, reference, seed=seed)


def placed(first: Placement) -> Placement:
    """Every rank wants what fits, from the last expert down, and later layers get slots of earlier ones."""
    quota_LR = first.quota_LR.copy()
    quota_LR[0] -= 1
    quota_LR[-1] += 1
    wanted = np.zeros_like(first.wanted_LRE)
    home = first.home_LE.copy()
    for layer, experts in enumerate(first.num_experts_L.tolist()):
        for rank in range(first.ranks):
            mine = (experts - 1 - rank - np.arange(quota_LR[layer, rank])) % experts
            wanted[layer, rank, mine] = True
        copied = wanted[layer].any(0)
        home[layer, copied] = wanted[layer].argmax(0)[copied]
    return Placement(3, first.num_experts_L, home, wanted, quota_LR)


def test_a_placement_from_a_file_is_there_from_the_start(checkpoint: Checkpoints, cache_dir: Path, tmp_path: Path):
    folder = checkpoint("qwen3_moe")
    reference = zoo.reference(folder)
    grouped = Grouped(folder, cache_dir, slots=[4, 4])
    target = placed(groups_of(grouped)[0].placement)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "cache_dir": cache_dir, "progress": False, "slots": 4}
    grouped.models = [epslots.load(folder, **options) for _ in range(2)]
    grouped.hub = LocalHub(2)

    def one(transport: LocalTransport) -> None:
        model, silent = grouped.models[transport.rank], ProgressDisplay(False)
        start_rank(model, transport, settings={}, costs=TOKENS_TRAVEL, display=silent, placement=target)

    run_threads(one, 2, hub=grouped.hub)
    for rank, model in enumerate(grouped.models):
        for layer, runner in enumerate(runtime_of(model).runners):
            wanted_E = target.wanted_LRE[layer, rank, : runner.cache.num_experts]
            assert (runner.cache.resident_E == wanted_E).all(), "all that is wanted, which is as much as fits"
    assert {group.pending_migrations for group in groups_of(grouped)} == {0}
    assert {group.placement.version for group in groups_of(grouped)} == {3}
    for seed in range(4):
        compare(grouped, reference, seed=seed)

    write_placement(target, tmp_path / "two.placement")
    with pytest.raises(ConfigError, match="for 2 ranks, and there are 1"):
        epslots.load(folder, placement=tmp_path / "two.placement", **options)
    alone = Placement(1, target.num_experts_L, np.zeros_like(target.home_LE), target.wanted_LRE[:, :1], target.quota_LR[:, :1])
    homeless = target.wanted_LRE[:, :1]
    model = epslots.load(folder, placement=alone, **options)
    for layer, runner in enumerate(runtime_of(model).runners):
        assert runner.cache.resident_E.tolist() == homeless[layer, 0, : runner.cache.num_experts].tolist()
    ids = zoo.random_ids(1, 12, seed=5)
    with torch.no_grad():
        assert_close(model(input_ids=ids).logits, reference(input_ids=ids).logits)


def test_ranks_with_different_placements_are_refused(checkpoint: Checkpoints, cache_dir: Path):
    grouped = Grouped(checkpoint("qwen3_moe"), cache_dir, slots=[4, 4])
    target = placed(groups_of(grouped)[0].placement)

    def one(transport: LocalTransport) -> Exception | None:
        mine = target if transport.rank else replace(target, version=9)
        try:
            join(grouped.models[transport.rank], transport, settings={}, placement=mine)
        except RankMismatchError as error:
            return error
        return None

    for error in run_threads(one, 2):
        assert "placement is '9 " in str(error)


def test_windows_add_up_to_the_counters(checkpoint: Checkpoints, cache_dir: Path):
    grouped = Grouped(checkpoint("qwen3_moe"), cache_dir, slots=[3, 4])
    telemetry = [runtime_of(model).telemetry for model in grouped.models]
    before = [each.snapshot() for each in telemetry]
    meters = [WindowMeter(each) for each in telemetry]
    windows: list[list[Any]] = [[], []]
    for seed in range(20):
        step(grouped, seed)
        if seed % 7 == 6 or seed == 19:
            for rank, meter in enumerate(meters):
                windows[rank].append(meter.cut(0.5))
    experts_L = np.array([layer.num_experts for layer in grouped.runtime(0).layers])
    shape = len(experts_L), int(experts_L.max())
    for rank, cut in enumerate(windows):
        for window in cut:
            window.check(experts_L)
        assert [window.steps for window in cut] == [7, 7, 6]
        for index, (layer, was) in enumerate(zip(telemetry[rank].snapshot().layers, before[rank].layers, strict=True)):
            tokens = sum(window.tokens_LE(*shape)[index] for window in cut)
            assert tokens.tolist() == [a - b for a, b in zip(layer.tokens_per_expert, was.tokens_per_expert, strict=True)]
            for name in ("hits", "misses", "pairs_sent", "pairs_received"):
                assert sum(getattr(window, name)[index] for window in cut) == getattr(layer, name) - getattr(was, name)
            assert sum(window.compute_s[index] for window in cut) == pytest.approx(layer.compute_s - was.compute_s)
            assert 0 < layer.wait_s < layer.layer_s
            assert 0 < layer.compute_s <= layer.layer_s - layer.wait_s - layer.stall_s + 1e-9
    first, second = windows
    for mine, other in zip(first, second, strict=True):
        assert mine.uses == other.uses and mine.reuse == other.reuse, "what all ranks know is equal"
    total = sum(window.tokens_LE(*shape) for cut in windows for window in cut)
    used = sum(window.uses_LE(*shape) for window in first)
    alone = Costs(1, 1, 1, 1, 1, 1, 1)
    uses = sum(sum(window.hits) + sum(window.misses) for cut in windows for window in cut)
    assert sum(work_ns(window, alone) for cut in windows for window in cut) == total.sum() + uses, "each pair is computed once"
    assert ((total > 0) == (used > 0)).all() and (used <= total).all()
    assert sum(window.reuse_LD(*shape) for window in first).sum() > 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": b"123"}, "tokens has 3 bytes; allowed: 48"),
        ({"tokens": np.array([[1, -1, 0], [0, 0, 0]]).tobytes()}, "tokens has -1"),
        ({"uses": np.array([[9, 0, 0], [0, 0, 0]]).tobytes()}, "uses exceed the 4 steps"),
        ({"uses": np.array([[1, 0, 0], [0, 0, 1]]).tobytes()}, "experts that don't exist"),
        ({"hits": (1,)}, "hits has 1 layers"),
        ({"misses": (1, 2**60)}, "misses has 1152921504606846976"),
        ({"compute_s": (0.1, float("nan"))}, "compute_s is"),
        ({"compute_s": (0.1, -0.1)}, "compute_s is"),
        ({"seconds": float("inf")}, "seconds is inf"),
        ({"steps": -1}, "uses exceed|steps has -1"),
    ],
)
def test_absurd_windows_are_refused(change: dict[str, Any], says: str):
    from msgspec.structs import replace as changed

    from epslots.load_window import LoadWindow

    tokens = np.array([[5, 0, 2], [1, 1, 0]])
    uses = np.array([[4, 0, 2], [1, 1, 0]])
    window = LoadWindow(
        4,
        1.0,
        tokens.tobytes(),
        uses.tobytes(),
        np.zeros((2, 4), int).tobytes(),
        hits=(1, 2),
        misses=(0, 1),
        pairs_sent=(0, 0),
        pairs_received=(0, 0),
        compute_s=(1, 1),
    )
    window.check(np.array([3, 2]))
    with pytest.raises(ConfigError, match=says):
        changed(window, **change).check(np.array([3, 2]))
