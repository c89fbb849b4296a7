"""A layer's step is the phases that ``moe_layer.py`` lists, in that order, for any ranks and any residents."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import epslots
from epslots.cuda_graph.lent_slots import LentSlots
from epslots.moe import moe_layer
from epslots.moe.moe_layer import MoELayer
from epslots.moe.token_room import TokenRoom
from epslots.runtime import runtime_of
from tests.support import zoo
from tests.support.equality import load
from tests.support.grouped_ranks import Grouped

PHASES = re.findall(r"^    (\w+) {2,}\S", moe_layer.__doc__ or "", re.MULTILINE)
Checkpoints = Callable[[str], Path]
Calls = dict[MoELayer, list[str]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The phases that each layer goes through, in order."""
    found: Calls = {}

    def record(name: str) -> None:
        phase = getattr(MoELayer, name)

        def recorded(layer: MoELayer, *args: Any) -> Any:
            found.setdefault(layer, []).append(name)
            return phase(layer, *args)

        monkeypatch.setattr(MoELayer, name, recorded)

    for name in PHASES:
        record(name)
    return found


def run(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model(input_ids=zoo.random_ids(1, 1, seed=1))


def check(calls: Calls, model: PreTrainedModel, steps: int = 1) -> None:
    for layer in runtime_of(model).runners:
        assert calls[layer] == PHASES * steps


def test_the_phases_are_those_of_the_design():
    assert [name for name in PHASES if name not in ("gather", "migrate")] == [
        *("prepare", "plan", "fetch", "dispatch", "execute", "combine")
    ]


@pytest.mark.parametrize("slots", [2, "100%"])
def test_one_rank(slots: int | str, calls: Calls, checkpoint: Checkpoints, cache_dir: Path):
    """Whether or not an expert can be missing."""
    model = load(checkpoint("qwen3_moe"), cache_dir, slots=slots)
    assert {layer.complete for layer in runtime_of(model).runners} == {slots == "100%"}
    run(model)
    check(calls, model)


def test_slots_that_are_lent(calls: Calls, checkpoint: Checkpoints, cache_dir: Path):
    model = load(checkpoint("qwen3_moe"), cache_dir, slots="50%")
    slots = LentSlots(runtime_of(model), runtime_of(model).plan.shape.top_k)
    slots.take()
    with slots.step(torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 1):
        run(model)
    assert all(layer.slots_are_lent for layer in runtime_of(model).runners)
    check(calls, model)
    slots.give_back()
    run(model)
    check(calls, model, steps=2)


@pytest.mark.parametrize("slots", ["50%", "100%"])
def test_several_ranks_of_which_one_idles(slots: str, calls: Calls, checkpoint: Checkpoints, cache_dir: Path):
    grouped = Grouped(checkpoint("qwen3_moe"), cache_dir, slots=[slots, slots])
    grouped.run(lambda rank, model: None if rank else run(model))
    for model in grouped.models:
        check(calls, model)


def test_a_step_in_parts(calls: Calls, checkpoint: Checkpoints, cache_dir: Path):
    """Ranks that divide a step find out as they gather; each part is a step."""
    grouped = Grouped(checkpoint("qwen3_moe"), cache_dir, slots=["50%", "50%"])
    for layer in grouped.runtime(0).runners:
        layer.divide_by(TokenRoom(1, 1, lambda: 0))

    def work(rank: int, model: PreTrainedModel) -> None:
        if rank == 0:
            model(input_ids=zoo.random_ids(1, 2, seed=1))

    grouped.run(work)
    for model in grouped.models:
        for layer in runtime_of(model).runners:
            assert calls[layer] == [*PHASES[:2], *PHASES, *PHASES]
    assert epslots.stats(grouped.models[0]).steps == 2
