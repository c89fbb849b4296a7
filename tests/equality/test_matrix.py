"""Invariant 1 as a matrix, architecture x mode: in any mode, a loaded model answers as plain transformers does.

What an architecture decides is how its experts are stored and called; what a mode decides is where they are computed and when
they come. So one mode runs with every architecture: one slot, through which each expert passes. All others run with one
architecture of each layout (``LAYOUTS``, which ``test_every_layout_is_represented`` keeps complete); with
``EPSLOTS_WHOLE_ZOO=1``, those that differ from it in slots alone with every architecture, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import epslots
from epslots.models.experts import dense_class, experts_modules, parameter_shapes
from epslots.runtime import runtime_of
from tests.support import zoo
from tests.support.cpu_hosting import OFTEN, fetched_bytes, hosting
from tests.support.equality import LAYOUTS, SERVED, assert_equal, compare, greedy, load
from tests.support.grouped_ranks import Grouped
from tests.support.late_link import mislead
from tests.support.remembered import Reference


class Cell:
    """One architecture, in plain transformers and to be loaded in some mode."""

    def __init__(self, name: str, folder: Path, cache_dir: Path, reference: Reference) -> None:
        self.name, self.folder, self.cache_dir, self.reference = name, folder, cache_dir, reference

    def load(self, slots: int | str) -> PreTrainedModel:
        return load(self.folder, self.cache_dir, slots=slots)

    def compare(self, model: PreTrainedModel) -> None:
        """Logits of a batch, greedy tokens of a prompt; and slots and tables agree afterwards."""
        assert_equal(model, self.reference)
        prompt = zoo.random_ids(1, 9, seed=2)
        assert greedy(model, prompt, 6) == greedy(self.reference, prompt, 6)
        runtime_of(model).check_integrity()


def alone(slots: int | str) -> Callable[[Cell], None]:
    """One rank; its pool is really bounded."""

    def run(cell: Cell) -> None:
        model = cell.load(slots)
        cell.compare(model)
        runtime, tiny = runtime_of(model), zoo.ZOO[cell.name]
        assert all(layer.num_experts == tiny.num_experts for layer in runtime.layers)
        quota = {1: 1, "25%": max(1, tiny.num_experts // 4), "100%": tiny.num_experts}[slots]
        assert all(m.pool.memory.nbytes == quota * len(m.pool.layers) * m.pool.layout.nbytes for m in runtime.loaders)
        used = [layer for layer in epslots.stats(model).layers if layer.steps]
        assert len(used) == tiny.moe_layers - tiny.idle_layers
        assert all((layer.misses == 0) == (slots == "100%") for layer in used)

    return run


def misled(cell: Cell) -> None:
    """Predictions at random, over a link that brings nothing before it must: until then a slot holds nonsense."""
    model = cell.load(3)
    mislead(runtime_of(model))
    cell.compare(model)
    assert sum(layer.prefetches for layer in epslots.stats(model).layers)


def hosted(*, concurrent: bool) -> Callable[[Cell], None]:
    """Some misses are computed on the CPU, beside the slots' experts or before them."""

    def run(cell: Cell) -> None:
        model = hosting(cell.load(3), OFTEN, concurrent=concurrent)
        cell.compare(model)
        layers = epslots.stats(model).layers
        assert 0 < sum(layer.cpu_misses for layer in layers) < sum(layer.misses for layer in layers)
        assert fetched_bytes(model) > 0

    return run


def on_three_ranks(cell: Cell) -> None:
    """Of unequal slots."""
    compare(Grouped(cell.folder, cell.cache_dir, slots=[1, "25%", "100%"]), cell.reference)


def misled_on_three_ranks(cell: Cell) -> None:
    grouped = Grouped(cell.folder, cell.cache_dir, slots=[2, "25%", "50%"])
    for rank, model in enumerate(grouped.models):
        mislead(runtime_of(model), seed=rank)
    compare(grouped, cell.reference)


MODES = {
    "one slot": alone(1),
    "a quarter": alone("25%"),
    "all": alone("100%"),
    "misled": misled,
    "hosted": hosted(concurrent=False),
    "hosted beside": hosted(concurrent=True),
    "three ranks": on_three_ranks,
    "three ranks misled": misled_on_three_ranks,
}
WITH_EVERY_ARCHITECTURE = {"one slot", "a quarter", "all"} if os.environ.get("EPSLOTS_WHOLE_ZOO") else {"one slot"}
# Streams of hidden states beside each other, and experts chosen by token: what a rank without tokens computes differs most.
FURTHER = [("deepseek_v4", "three ranks"), ("qwen4_exp", "three ranks")]


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, mode) for mode in MODES for name in (SERVED if mode in WITH_EVERY_ARCHITECTURE else LAYOUTS)] + FURTHER,
)
def test_equal(name: str, mode: str, checkpoint: Callable[[str], Path], shared_stores: Path):
    folder = checkpoint(name)
    MODES[mode](Cell(name, folder, shared_stores, Reference(folder)))


def layout_of(name: str) -> object:
    """The properties by which the code that runs experts tells architectures apart."""
    tiny, flags = zoo.ZOO[name], ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
    architecture = getattr(transformers, tiny.architecture)
    with torch.device("meta"):
        modules = experts_modules(dense_class(architecture)(architecture.config_class(**tiny.settings))).values()
    kinds = {(*sorted(parameter_shapes(module)), *(getattr(module, flag) for flag in flags)) for module in modules}
    return frozenset(kinds), tiny.decorate, tiny.zero_experts > 0, tiny.idle_layers > 0, tiny.aligned


def test_every_layout_is_represented():
    """Once: a further architecture of a layout would take time and find nothing."""
    layouts = [layout_of(name) for name in LAYOUTS]
    assert len(set(layouts)) == len(LAYOUTS)
    assert {layout_of(name) for name in SERVED} == set(layouts)
