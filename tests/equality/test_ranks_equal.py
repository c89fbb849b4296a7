"""Invariant 1 on many ranks, beside the matrix: any costs, copies from slot to slot, more ranks than experts, precisions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import epslots
from epslots.moe.token_room import TokenRoom
from epslots.transport.lockstep import LockStep
from tests.support import zoo
from tests.support.equality import assert_close, batch_of, compare
from tests.support.grouped_ranks import ALL_COSTS, COPIES_TRAVEL, GATHER, TOKENS_TRAVEL, Grouped
from tests.support.late_link import LateLink
from tests.support.remembered import Reference

TOLERANCE = 2e-5
Checkpoints = Callable[[str], Path]


EVEN, UNEVEN = ["50%", "50%"], [2, 7, 3, 1]


@pytest.mark.parametrize(
    ("costs", "slots"),
    [*((costs, UNEVEN) for costs in ALL_COSTS), ("tokens travel", [1, 1]), ("work spreads", [3, 5]), ("copies travel", EVEN)],
)
def test_any_costs(costs: str, slots: list[int | str], checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    grouped = Grouped(folder, cache_dir, slots=slots, costs=ALL_COSTS[costs])
    compare(grouped, Reference(folder))
    sent = sum(layer.pairs_sent for model in grouped.models for layer in epslots.stats(model).layers)
    assert bool(sent) == (costs not in ("nothing travels", "copies travel"))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "ernie4_5_vl_moe"])
def test_copies_from_slot_to_slot(name: str, checkpoint: Checkpoints, cache_dir: Path):
    """Every record has bytes of its own, and ``check`` holds each slot against the record that the tables name."""
    folder = checkpoint(name)
    grouped = Grouped(folder, cache_dir, slots=["75%", "75%"], costs=COPIES_TRAVEL)
    compare(grouped, Reference(folder))
    stats = [layer for model in grouped.models for layer in epslots.stats(model).layers]
    size = grouped.runtime(0).layers[0].layout.nbytes
    assert sum(layer.peer_bytes for layer in stats) >= size


@pytest.mark.parametrize("costs", [TOKENS_TRAVEL, GATHER])
@pytest.mark.parametrize("name", ["mixtral", "longcat_flash"])
def test_more_ranks_than_experts(name: str, costs: epslots.Costs, checkpoint: Checkpoints, cache_dir: Path):
    """mixtral has 8 experts."""
    folder = checkpoint(name)
    grouped = Grouped(folder, cache_dir, slots=[1] * 9, costs=costs)
    reference = zoo.reference(folder)

    def work(rank: int, model: PreTrainedModel) -> torch.Tensor:
        return model(input_ids=zoo.random_ids(1, 5 + rank, seed=rank)).logits

    for rank, logits in enumerate(grouped.run(work)):
        with torch.no_grad():
            assert_close(logits, reference(input_ids=zoo.random_ids(1, 5 + rank, seed=rank)).logits)
    grouped.check()


@pytest.mark.parametrize("link", [None, "20MB/s,200us"])
def test_ranks_that_hold_everything_exchange_headers_alone(
    link: str | None, checkpoint: Checkpoints, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where one of them lacks an expert of any layer, they plan each of its layers."""
    gathered: list[int] = []
    gather = LockStep.gather_counts
    monkeypatch.setattr(
        LockStep, "gather_counts", lambda self, layer, *a, **k: gathered.append(layer) or gather(self, layer, *a, **k)
    )
    folder = checkpoint("qwen3_moe")
    whole = Grouped(folder, cache_dir, slots=["100%", "100%"], link=link)
    compare(whole, Reference(folder))
    assert not gathered
    assert all(layer.misses == 0 and layer.steps > 0 for model in whole.models for layer in epslots.stats(model).layers)
    compare(Grouped(folder, cache_dir, slots=["100%", 3]), Reference(folder))
    assert gathered


def test_ranks_that_hold_everything_wait_for_fetches_in_flight(checkpoint: Checkpoints, cache_dir: Path):
    """They look at no counts; but a slot may be in flight when they become a group, and holds nonsense until it has landed."""
    folder = checkpoint("qwen3_moe")
    grouped = Grouped(folder, cache_dir, slots=["100%", "100%"])
    for rank in range(2):
        for loader in grouped.runtime(rank).loaders:
            loader.link = LateLink()
            first = loader.pool.expert_of[loader.pool.slot_range(0)][:2].copy()
            slots = loader.pool.slot_of[0, first].copy()
            loader.fetch(0, first, slots, first, urgent=False)
            assert loader.in_flight[slots].all()
    grouped.form()
    compare(grouped, Reference(folder))


@pytest.mark.parametrize("slots", ["50%", "100%"])
def test_ranks_divide_a_long_step_alike(slots: str, checkpoint: Checkpoints, cache_dir: Path):
    """One has no memory for its prompt at once: all make as many parts, those without tokens, too; unless none can miss."""
    folder = checkpoint("qwen3_moe")
    grouped = Grouped(folder, cache_dir, slots=[slots, slots])
    for runner in grouped.runtime(1).runners:
        runner.divide_by(TokenRoom(4, 1, lambda: 0))
    reference, ids = zoo.reference(folder), [zoo.random_ids(1, length, seed=length) for length in (5, 13)]
    before = [runner.steps for runner in grouped.runtime(0).runners]

    def work(rank: int, model: PreTrainedModel) -> list[torch.Tensor]:
        return [model(input_ids=ids[rank]).logits for _ in range(2 if rank else 1)]

    with torch.no_grad():
        for rank, found in enumerate(grouped.run(work)):
            for logits in found:
                assert_close(logits, reference(input_ids=ids[rank]).logits)
    for rank in range(2):
        taken = [runner.steps - first for runner, first in zip(grouped.runtime(rank).runners, before, strict=True)]
        assert taken == [8 if slots == "50%" else 0] * len(taken), "13 tokens in 4 parts, twice"
    grouped.check()


def test_one_rank_through_all_that_ranks_do(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    compare(Grouped(folder, cache_dir, slots=[3]), Reference(folder))


@pytest.mark.parametrize("slots", [[3], [3, 4]])
def test_measured_costs(slots: list[int], checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("gpt_oss")
    compare(Grouped(folder, cache_dir, slots=slots, costs=None), Reference(folder))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("costs", [TOKENS_TRAVEL, GATHER])
def test_who_computes_changes_not_a_bit(dtype: str, costs: epslots.Costs, checkpoint: Checkpoints, cache_dir: Path):
    """Each pair's result comes whole from one rank, and its own rank sums in its own order: no bit depends on who it was."""
    folder = checkpoint("mixtral")
    alone = epslots.load(folder, slots=2, device="cpu", dtype=dtype, cache_dir=cache_dir, progress=False)
    grouped = Grouped(folder, cache_dir, slots=[2, 3, 1], costs=costs, dtype=dtype)
    ids = [zoo.random_ids(1, 6 + rank, seed=rank) for rank in range(3)]
    for rank, logits in enumerate(grouped.run(lambda rank, model: model(input_ids=ids[rank]).logits)):
        with torch.no_grad():
            expected = alone(input_ids=ids[rank]).logits
        # Matrix products of other heights may round differently, and that is all.
        assert (logits - expected).abs().max() <= (0.02 if dtype == "bfloat16" else 1e-12) * expected.abs().max()


def test_experts_that_only_some_ranks_call(checkpoint: Checkpoints, cache_dir: Path):
    """ernie4_5_vl_moe calls its vision experts only where there are image tokens."""
    folder = checkpoint("ernie4_5_vl_moe")
    grouped, reference = Grouped(folder, cache_dir, slots=[2, 3]), zoo.reference(folder)
    inputs = [zoo.mixed_inputs(2, 40), {"input_ids": zoo.random_ids(1, 12, seed=1)}]
    for rank, logits in enumerate(grouped.run(lambda rank, model: model(**inputs[rank]).logits)):
        with torch.no_grad():
            assert_close(logits, reference(**inputs[rank]).logits)
    grouped.check()


def test_all_ranks_together_hold_the_model_from_the_start(checkpoint: Checkpoints, cache_dir: Path):
    grouped = Grouped(checkpoint("qwen3_moe"), cache_dir, slots=["50%", "25%", "25%"])
    grouped.run(lambda rank, model: model(input_ids=batch_of(rank)).logits)
    for model in grouped.models:
        assert epslots.stats(model).misses == 0
    grouped.check()


def test_ranks_share_one_cache(checkpoint: Checkpoints, cache_dir: Path):
    """Two ranks with the same prompts fetch each expert once between them, not once each."""
    folder = checkpoint("qwen3_moe")
    grouped = Grouped(folder, cache_dir, slots=["50%", "25%"])
    ids = zoo.random_ids(1, 3, seed=5)
    grouped.run(lambda rank, model: model(input_ids=ids).logits)
    needed = [len(set(i.flatten().tolist())) for i, _ in zoo.routing(zoo.reference(folder), input_ids=ids).values()]
    fetched = sum(epslots.stats(model).misses for model in grouped.models)
    assert fetched == sum(needed)
