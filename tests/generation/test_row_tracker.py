"""Predictors know which token precedes which, in batches whose requests come, go and are cut in pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from epslots.generation.batcher import Batcher
from epslots.generation.paged_batcher import PagedBatcher
from epslots.generation.requests import Request
from epslots.generation.row_batcher import RowBatcher
from epslots.generation.row_tracker import RowTracker
from epslots.prefetch.predictor import KernelWeights, Predictor
from epslots.runtime import attach, runtime_of
from tests.support import zoo
from tests.support.equality import load


@given(st.lists(st.dictionaries(st.integers(0, 5), st.integers(1, 4), max_size=5), max_size=8))
def test_rows_are_followed_from_step_to_step(steps: list[dict[int, int]]):
    """Each row must be told the row before it of the same request, if that was in this step or the one before."""
    order = RowTracker()
    position: dict[int, int] = {}
    before: list[tuple[int, int]] = []  # (request, position) of the rows of the step before
    for requests in steps:
        rows = [(name, position.get(name, 0) + i) for name, count in requests.items() for i in range(count)]
        follows = order.next(list(requests.items())).tolist()
        assert len(follows) == len(rows)
        for (name, at), index in zip(rows, follows, strict=True):
            came_from = None if index == 0 else rows[index - 1] if index > 0 else before[index]
            known = (name, at - 1) in rows or (name, at - 1) in before
            assert came_from == ((name, at - 1) if known else None)
        for name, count in requests.items():
            position[name] = position.get(name, 0) + count
        before = rows


# --- as batchers use it

LAYER = 1


class Watched:
    """An estimator with history that keeps what it is given, rows [T, 2 H] of each step."""

    history = True
    top_k = 0
    kernel_weights: KernelWeights | None = None

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    @property
    def unlikely_E(self) -> torch.Tensor:
        return torch.full((8,), -0.1)

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        self.steps.append(rows.clone())
        return torch.zeros(len(rows), 8)

    def to(self, device: torch.device, dtype: torch.dtype) -> Watched:
        return self


def asked_in_each_step(model: PreTrainedModel) -> Watched:
    """Give the model a predictor that one layer asks in each step."""
    estimator = Watched()
    found = Predictor([None, estimator, None], [8] * 3, torch.device("cpu"), torch.float32)
    attach(model, replace(runtime_of(model), predictor=found))

    def ask(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.ids(LAYER, args[0], 2)

    list(zoo.experts_modules(model).values())[LAYER].register_forward_pre_hook(ask)
    return estimator


def hidden_alone(model: PreTrainedModel, ids: tuple[int, ...]) -> torch.Tensor:
    """The inputs of the layer's experts for a sequence that runs alone, [T, H]."""
    seen: list[torch.Tensor] = []
    module = list(zoo.experts_modules(model).values())[LAYER]
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0]


def positions(batcher: Batcher) -> list[tuple[str, int]]:
    """The (request, place in its sequence) of each row of the prepared batch."""
    if isinstance(batcher, RowBatcher):
        assert batcher._isolation is not None and batcher._batch is not None
        width = batcher._batch.width
        return [
            (running.entry.request.id, running.row.length + place)
            for running in batcher._isolation.part
            for place in range(width)
        ]
    assert isinstance(batcher, PagedBatcher)
    return [
        (batcher._running[future.state.request_id][0].request.id, future.state.position_offset - future.query_length + row)
        for future in batcher.processor.inputs_and_outputs.requests_in_batch
        for row in range(future.query_length)
    ]


@pytest.mark.parametrize("batcher_class", [PagedBatcher, RowBatcher])
def test_each_row_is_told_of_with_the_one_before_it(batcher_class: Any, checkpoint: Callable[[str], Path], cache_dir: Path):
    """Prompts longer than a step, some that come while others decode, one that leaves early: what the predictor is given of
    each token is what it would be given of its sequence alone.
    """
    folder = checkpoint("mixtral")
    reference, model = zoo.reference(folder), load(folder, cache_dir)
    watched = asked_in_each_step(model)
    batcher: Batcher = batcher_class(model, kv_tokens=512, max_batch_tokens=24)
    sizes = {"a": (3, 14), "b": (50, 9), "c": (7, 8), "d": (1, 12), "e": (30, 6)}
    requests = {
        name: Request(name, tuple(zoo.random_ids(1, length, seed=length)[0].tolist()), new)
        for name, (length, new) in sizes.items()
    }
    comes = {0: "ab", 3: "c", 6: "de"}
    rows: dict[tuple[str, int], torch.Tensor] = {}
    tokens = {name: list(request.prompt) for name, request in requests.items()}
    mixed, step_of = 0, dict[tuple[str, int], int]()
    for step in range(200):
        for name in comes.get(step, ""):
            batcher.add(requests[name])
        if step == 9:
            batcher.cancel("c")
        if not batcher.prepare():
            break
        places = positions(batcher)
        mixed += len({name for name, _ in places}) > 1 and len(places) > len({name for name, _ in places})
        batcher.step()
        assert len(watched.steps) == step + 1 and len(watched.steps[-1]) == len(places)
        rows |= dict(zip(places, watched.steps[-1], strict=True))
        step_of |= dict.fromkeys(places, step)
        for output in batcher.outputs():
            tokens[output.id] += output.tokens
    assert batcher_class is RowBatcher or mixed > 3, "prompts and single tokens went together"
    predictor = runtime_of(model).predictor
    assert predictor is not None and predictor._state.previous_rows is None, "outside of the batcher nothing is known"
    batcher.close()
    for name, sequence in tokens.items():
        hidden_TH = hidden_alone(reference, tuple(sequence))
        computed = sorted(place for of, place in rows if of == name)
        assert computed == list(range(len(computed)))
        assert computed or batcher_class is RowBatcher
        for place in computed:
            now_H, before_H = rows[name, place].chunk(2)
            # In rows, a prompt's pass may lie between two tokens of a text; the predictor knows one step.
            known = place > 0 and step_of[name, place] - step_of[name, place - 1] <= 1
            assert known or place == 0 or batcher_class is RowBatcher
            expected_H = hidden_TH[place - 1] if known else torch.zeros_like(now_H)
            assert torch.allclose(now_H, hidden_TH[place], atol=1e-4, rtol=1e-4)
            assert torch.allclose(before_H, expected_H, atol=1e-4, rtol=1e-4), (name, place)


@pytest.mark.parametrize("batcher_class", [PagedBatcher, RowBatcher])
def test_a_failed_step_is_no_step_before(batcher_class: Any, checkpoint: Callable[[str], Path], cache_dir: Path):
    """Only some layers have seen its rows: what the repeated step is given of the row before is nothing."""
    model = load(checkpoint("mixtral"), cache_dir)
    watched = asked_in_each_step(model)
    batcher: Batcher = batcher_class(model, kv_tokens=64)
    batcher.add(Request("a", (20, 21, 22), 9))

    def step() -> bool:
        """Whether the predictor knows the row before."""
        assert batcher.prepare()
        batcher.step()
        return bool(watched.steps[-1][-1].chunk(2)[1].any())

    assert [step() for _ in range(3)] == [True] * 3
    handle = model.model.layers[-1].register_forward_hook(lambda *_: 1 / 0)
    step()
    handle.remove()
    assert [step() for _ in range(3)] == [False, True, True]
    batcher.close()
