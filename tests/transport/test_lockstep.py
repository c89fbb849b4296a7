"""Ranks that don't fit together, or fall out of step, find out on all ranks, by name, before anything else moves."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import epslots
from epslots.errors import ConfigError, ExchangeError, GroupError, PeerLost, RankMismatchError, StaleEpoch
from epslots.group.join import announce_failure, join
from epslots.group.rank_group import group_of
from epslots.runtime import runtime_of
from epslots.transport.local_transport import LocalHub, LocalTransport
from epslots.transport.lockstep import Header, LinkState, LockStep, pack_link, unpack_links
from tests.support import zoo
from tests.support.grouped_ranks import COPIES_TRAVEL, TOKENS_TRAVEL, Grouped
from tests.support.rank_helpers import run_threads

Checkpoints = Callable[[str], Path]


@pytest.fixture
def pair(checkpoint: Checkpoints, cache_dir: Path) -> Grouped:
    return Grouped(checkpoint("qwen3_moe"), cache_dir, slots=[4, 5])


def errors_of(size: int, work: Callable[[LocalTransport], Any], hub: LocalHub | None = None) -> list[GroupError | None]:
    """The error of each rank."""

    def one(transport: LocalTransport) -> GroupError | None:
        try:
            work(transport)
        except GroupError as error:
            return error
        return None

    return run_threads(one, size, hub=hub)


def forward(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=zoo.random_ids(1, 4, seed=1)).logits


def test_a_word_has_the_links_state_and_the_parts():
    links, parts = [LinkState(False, 0), LinkState(True, 3), LinkState(False, 1023), LinkState(True, 5000)], [1, 7, 2, 100]
    words = np.array([pack_link(*each) for each in zip(links, parts, strict=True)], np.int32)
    busy_R, unbegun_R, most_parts = unpack_links(words)
    assert (busy_R.tolist(), unbegun_R.tolist(), most_parts) == ([False, True, False, True], [0, 3, 1023, 1023], 100)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"settings": {"policy": "lru"}}, "policy is 'lrfu' on rank 0 and 'lru' on rank 1"),
        ({"settings": {"policy": "lrfu", "dtype": "bf16"}}, "dtype is None on rank 0 and 'bf16' on rank 1"),
        ({"settings": {"policy": "lrfu"}, "costs": None}, "costs is .* and 'measured' on rank 1"),
    ],
)
def test_settings_that_differ_are_named_on_both(pair: Grouped, other: dict[str, Any], named: str):
    mine = {"settings": {"policy": "lrfu"}, "costs": TOKENS_TRAVEL}

    def work(transport: LocalTransport) -> None:
        join(pair.models[transport.rank], transport, **(mine | (other if transport.rank else {})))

    for error in errors_of(2, work):
        assert isinstance(error, RankMismatchError)
        assert re.search(named, str(error)), error


def test_other_checkpoints_and_versions_are_refused(pair: Grouped, checkpoint: Checkpoints, cache_dir: Path, monkeypatch: Any):
    other = epslots.load(checkpoint("mixtral"), slots=2, device="cpu", dtype="float32", cache_dir=cache_dir, progress=False)
    models = [pair.models[0], other]
    for error in errors_of(2, lambda t: join(models[t.rank], t, settings={}, costs=TOKENS_TRAVEL)):
        assert isinstance(error, RankMismatchError) and "checkpoint is" in str(error)

    def with_version(transport: LocalTransport) -> None:
        settings = {} if transport.rank else {"transformers": "4.0"}
        join(pair.models[transport.rank], transport, settings=settings, costs=TOKENS_TRAVEL)

    for error in errors_of(2, with_version):
        assert isinstance(error, RankMismatchError) and "transformers is '4.0' on rank 0" in str(error)


def test_an_old_epoch_is_refused_when_it_greets(pair: Grouped):
    def work(transport: LocalTransport) -> None:
        transport.epoch = 7 - transport.rank
        join(pair.models[transport.rank], transport, settings={}, costs=TOKENS_TRAVEL)

    for error in errors_of(2, work):
        assert isinstance(error, StaleEpoch) and "[7, 6]" in str(error)


def test_an_old_epoch_is_refused_at_a_steps_header(pair: Grouped):
    def work(transport: LocalTransport) -> None:
        group = group_of(pair.models[transport.rank])
        group.transport.epoch = 3 - transport.rank
        forward(pair.models[transport.rank])

    for error in errors_of(2, work, pair.hub):
        assert isinstance(error, StaleEpoch) and "ranks [1] belong to an older epoch" in str(error)


def test_a_rank_that_cannot_load_tells_those_that_wait(pair: Grouped):
    def work(transport: LocalTransport) -> None:
        if transport.rank:
            announce_failure(transport, FileNotFoundError("no such folder"))
        else:
            from epslots.group.join import start_rank
            from epslots.progress import ProgressDisplay

            start_rank(pair.models[0], transport, settings={}, costs=None, display=ProgressDisplay(False))

    first, second = errors_of(2, work)
    assert second is None
    assert isinstance(first, PeerLost) and "rank 1 could not load" in str(first) and "no such folder" in str(first)


def test_a_diverged_table_names_layer_and_slot(pair: Grouped):
    """Rank 1 loses an expert behind everybody's back."""
    pair.run(lambda rank, model: forward(model))
    runtime = runtime_of(pair.models[1])
    loader, layer = runtime.loaders[0], 1
    expert = int(np.flatnonzero(loader.pool.slot_of[layer] >= 0)[0])
    slot = int(loader.pool.slot_of[layer, expert])
    loader.pool.vacate(layer, np.array([expert]))
    for error in errors_of(2, lambda t: forward(pair.models[t.rank]), pair.hub):
        assert isinstance(error, ExchangeError)
        assert runtime.layers[layer].name in str(error) and f"expert {expert} on rank 1: it is in no slot there" in str(error)
    loader.pool.occupy(layer, np.array([expert]), np.array([slot]))


def test_a_table_that_differs_in_belief_names_the_slot(pair: Grouped):
    pair.run(lambda rank, model: forward(model))
    shared = group_of(pair.models[0]).shared.layers[2].state
    expert = int(np.flatnonzero(shared.holds_RE[1])[0])
    slot = int(runtime_of(pair.models[1]).loaders[0].pool.slot_of[2, expert])
    shared.holds_RE[1, expert] = False
    shared.holds_changed()
    for error in errors_of(2, lambda t: forward(pair.models[t.rank]), pair.hub):
        assert isinstance(error, ExchangeError) and f"it is in slot {slot} there; ranks [1] of 2" in str(error)


@pytest.mark.parametrize("work", [True, False])
def test_digests_that_differ_are_refused_at_the_header(work: bool):
    """Also in a step that computes nothing: no layer's guard would notice."""
    begun: list[Header] = []

    def begin(transport: LocalTransport) -> None:
        lockstep = LockStep(
            transport,
            model=1,
            most_experts=2,
            idle_layers=[],
            offered=lambda: 0,
            digest=lambda: 2**40 + transport.rank,
            explain_divergence=lambda: "expert 3 on rank 0",
            on_header=begun.append,
        )
        lockstep.begin(work=work)

    for error in errors_of(2, begin):
        assert isinstance(error, ExchangeError) and str(error) == "ranks no longer agree: expert 3 on rank 0"
    assert not begun


def test_a_rank_that_fails_in_a_step_ends_it_for_all(pair: Grouped):
    """Rank 0's model fails in the middle of a step; no rank waits for it, and it can't go on as before."""
    model = pair.models[0]

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    def work(transport: LocalTransport) -> None:
        if transport.rank:
            forward(pair.models[1])
            return
        model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            forward(model)
        forward(model)

    for error in errors_of(2, work, pair.hub):
        assert isinstance(error, PeerLost) and "rank 0 failed in a step: ZeroDivisionError" in str(error)


def test_ranks_in_different_places_are_told_where_each_is(pair: Grouped):
    def work(transport: LocalTransport) -> None:
        group = group_of(pair.models[transport.rank])
        assert group is not None
        group.lockstep.begin()
        if transport.rank:
            group.lockstep.begin()
        else:
            group.lockstep.end()

    for error in errors_of(2, work, pair.hub):
        assert isinstance(error, ExchangeError)
        assert "rank 1 begins step" in str(error) and "rank 0 is in MoE layer 0 of step" in str(error)


def test_homes_that_differ_are_an_error_before_anything_moves(pair: Grouped):
    """Swapped on one rank only: it would plan otherwise than the other, from the next layer's counts on."""
    pair.run(lambda rank, model: forward(model))

    def swap_homes(*_: object) -> None:
        shared = group_of(pair.models[1]).shared.layers[1].state
        shared.follow(shared.home_E[::-1].copy(), shared.wanted_RE)

    pair.models[1].model.layers[1].register_forward_pre_hook(swap_homes)
    for error in errors_of(2, lambda t: forward(pair.models[t.rank]), pair.hub):
        assert isinstance(error, ExchangeError) and "placements or earlier plans differ" in str(error)


def test_parts_of_the_model_alone_are_refused(pair: Grouped):
    with pytest.raises(ConfigError, match="the whole model is called"):
        pair.models[0].model.layers[0].mlp(torch.zeros(1, 2, zoo.HIDDEN))


def test_a_lost_rank_is_an_error_and_the_next_epoch_goes_on(checkpoint: Checkpoints, cache_dir: Path):
    """Rank 2 dies in the middle of a step. The others form the next epoch, retry, and answer as before."""
    folder = checkpoint("qwen3_moe")
    grouped = Grouped(folder, cache_dir, slots=[3, 4, 5])
    expected = grouped.run(lambda rank, model: forward(model))

    def die(*_: object) -> None:
        grouped.hub.lose(2)

    handle = grouped.models[2].model.layers[1].register_forward_pre_hook(die)
    for error in errors_of(3, lambda t: forward(grouped.models[t.rank]), grouped.hub):
        assert isinstance(error, PeerLost) and "rank 2 is lost" in str(error)
    handle.remove()
    grouped.models = grouped.models[:2]
    grouped.hub = LocalHub(2, epoch=1)
    run_threads(lambda t: join(grouped.models[t.rank], t, settings={}, costs=TOKENS_TRAVEL), 2, hub=grouped.hub)
    for rank, logits in enumerate(grouped.run(lambda rank, model: forward(model))):
        assert torch.allclose(logits, expected[rank], atol=1e-5)
    grouped.check()


def test_uneven_work_ends_when_nobody_has_any(pair: Grouped):
    def work(rank: int, model: Any) -> int:
        steps = 0
        for _ in range(5 * rank):
            forward(model)
            steps += 1
        return steps

    assert pair.run(work) == [0, 5]
    assert {layer.steps for model in pair.models for layer in epslots.stats(model).layers} == {5}
    idle = epslots.stats(pair.models[0]).layers[0]
    assert sum(idle.tokens_per_expert) == 0 and idle.pairs_received


def test_sync_ranks_on_one_rank_does_nothing(checkpoint: Checkpoints, cache_dir: Path):
    model = epslots.load(checkpoint("mixtral"), slots=2, device="cpu", cache_dir=cache_dir, progress=False)
    with epslots.sync_ranks(model):
        forward(model)
    with pytest.raises(ConfigError, match=r"epslots\.load"), epslots.sync_ranks(torch.nn.Linear(1, 1)):
        pass


def test_a_rank_that_is_new_takes_over_the_past_of_the_others(checkpoint: Checkpoints, cache_dir: Path):
    """A survivor and a replacement: the uses that evictions follow must be the same, or their tables part."""
    folder = checkpoint("qwen3_moe")
    grouped = Grouped(folder, cache_dir, slots=[3, 4])
    for seed in range(4):
        grouped.run(lambda rank, model, seed=seed: model(input_ids=zoo.random_ids(1, 3, seed=seed)).logits)
    fresh = epslots.load(folder, slots=4, device="cpu", dtype="float32", cache_dir=cache_dir, progress=False)
    grouped.models[0] = fresh
    grouped.hub = LocalHub(2, epoch=1)
    run_threads(lambda t: join(grouped.models[t.rank], t, settings={}, costs=TOKENS_TRAVEL), 2, hub=grouped.hub)
    for mine, other in zip(*(runtime_of(model).runners for model in grouped.models), strict=True):
        assert mine.steps == other.steps > 0
        assert mine.history.last_use.tolist() == other.history.last_use.tolist()
        assert mine.history.recent.tolist() == other.history.recent.tolist()
    for seed in range(12):
        grouped.run(lambda rank, model, seed=seed: model(input_ids=zoo.random_ids(1, 2, seed=seed + rank)).logits)
        grouped.check()


def test_the_only_survivor_goes_on_alone(pair: Grouped):
    expected = pair.run(lambda rank, model: forward(model))
    hub = LocalHub(1, epoch=1)
    run_threads(lambda t: join(pair.models[0], t), 1, hub=hub)
    assert torch.allclose(forward(pair.models[0]), expected[0], atol=1e-5)


def test_copies_that_may_not_have_arrived_are_given_up(checkpoint: Checkpoints, cache_dir: Path, monkeypatch: Any):
    """On CUDA an exchange is only queued: if the group breaks before the next counts, its slots hold anything."""
    grouped = Grouped(checkpoint("qwen3_moe"), cache_dir, slots=["75%", "75%"], costs=COPIES_TRAVEL)
    spoiled = []

    def lazy(self: LocalTransport, sends: Any, receives: Any, *, agreed: bool = False) -> None:
        if receives and not spoiled:
            for _, tensor in receives:
                tensor.fill_(77)
            spoiled.append(self.rank)
            self.hub.lose(self.rank)
        elif not spoiled:
            exchange(self, sends, receives, agreed=agreed)

    exchange = LocalTransport.exchange
    monkeypatch.setattr(LocalTransport, "exchange", lazy)

    def work(transport: LocalTransport) -> None:
        model = grouped.models[transport.rank]
        for seed in range(20):
            with torch.no_grad():
                model(input_ids=zoo.random_ids(1, 3, seed=seed))

    assert all(isinstance(error, PeerLost) for error in errors_of(2, work, grouped.hub))
    assert spoiled
    monkeypatch.undo()
    grouped.hub = LocalHub(2, epoch=1)
    run_threads(lambda t: join(grouped.models[t.rank], t), 2, hub=grouped.hub)
    grouped.check()


def test_copies_of_a_checkpoint_are_the_same_checkpoint(checkpoint: Checkpoints, cache_dir: Path, tmp_path: Path):
    """Nodes may each have their own."""
    folder = checkpoint("mixtral")
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    options = {"slots": 2, "device": "cpu", "dtype": "float32", "cache_dir": cache_dir, "progress": False}
    models = [epslots.load(path, **options) for path in (folder, copy)]
    run_threads(lambda t: join(models[t.rank], t, costs=TOKENS_TRAVEL), 2)
    assert group_of(models[0]) is not None


def test_sizes_are_compared_in_the_first_step_of_an_epoch(pair: Grouped, monkeypatch: pytest.MonkeyPatch):
    seen: list[bool] = []
    all_to_all = LocalTransport.all_to_all

    def watch(self: LocalTransport, *sizes: Any, agreed: bool = False) -> torch.Tensor:
        seen.append(agreed)
        return all_to_all(self, *sizes, agreed=agreed)

    monkeypatch.setattr(LocalTransport, "all_to_all", watch)
    run_threads(lambda t: forward(pair.models[t.rank]), 2, hub=pair.hub)
    first = len(seen)
    run_threads(lambda t: forward(pair.models[t.rank]), 2, hub=pair.hub)
    assert first and not any(seen[:first]) and len(seen) > first and all(seen[first:])
