"""Bounds of the exchange of cache and experts: room that can't be had, rows in the way, slots that can't be filled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from epslots.cuda_graph.lent_slots import LentSlots
from epslots.errors import StoreError
from epslots.generation.engine import Engine
from epslots.generation.requests import Request
from epslots.generation.slot_exchange import SlotExchange
from epslots.runtime import runtime_of
from tests.support.batches import prompt_of
from tests.support.late_link import Late, LateLink
from tests.support.slot_exchanges import check, exchange_of, load, rows_of, serve

Checkpoints = Callable[[str], Path]


def test_kept_beginnings_go_before_slots_and_for_nothing_in_vain(checkpoint: Checkpoints, cache_dir: Path, monkeypatch):
    """Cells that rows share count once; kept rows make way for foreseen tokens, and for slots that can go back now."""
    engine = Engine(load(checkpoint("qwen3_moe"), cache_dir, max_batch_tokens=64))
    exchange, admission, sizes = exchange_of(engine), rows_of(engine).admission, exchange_of(engine).sizes
    assert not exchange.grow(sizes.most_tokens + 1) and not exchange.levels, "for what can never fit, none is ceded"
    serve(engine, [Request("kept", prompt_of(20), 2)])
    assert [kept.row.length for kept in admission.kept] == [21]
    admission.foresee(exchange._cells.free + 5)
    assert not admission.kept and not exchange.levels

    sums, beginning = exchange._sums, prompt_of(sizes.least_tokens + 40)
    serve(engine, [Request("first", beginning, 2)])
    (first,) = admission.kept
    for number in range(2):
        engine.batcher.add(Request(f"r{number}", (*beginning, number), 60))
    engine.step()
    assert len(admission.running) == 2 and first in admission.kept and exchange.levels
    assert sums.held < 2 * len(beginning), "both have one beginning"
    monkeypatch.setattr(SlotExchange, "due", True)
    monkeypatch.setattr(exchange, "decide", lambda **_: -1)
    levels = exchange.levels
    admission.exchange_memory(rows_of(engine).chunk_size, 0.0)
    assert first in admission.kept and exchange.levels == levels, "a running row is in the way"
    monkeypatch.setattr(SlotExchange, "due", False)
    serve(engine, [])
    rows_of(engine).cache.cut(admission.kept[0].row, 16)
    levels, rows = exchange.levels, [kept.row.number for kept in admission.kept]
    reaches = [row for row in rows if exchange.is_in_the_way(row, -1)]
    assert reaches == rows[1:] != []
    monkeypatch.setattr(SlotExchange, "due", True)
    admission.exchange_memory(rows_of(engine).chunk_size, 0.0)
    assert [kept.row.number for kept in admission.kept] == [row for row in rows if row not in reaches]
    assert exchange.levels == levels - 1
    check(engine)
    engine.batcher.close()


def test_a_slot_that_cannot_be_filled_stays_the_caches(checkpoint: Checkpoints, cache_dir: Path):
    """A rank alone completes a layer that gets its last slot back: if it can't, tables are as before, and it tries again."""
    model = load(checkpoint("qwen3_moe"), cache_dir, slots="100%")
    engine, runtime = Engine(model), runtime_of(model)
    exchange, loader, layouts = exchange_of(engine), runtime.ceding_loader, runtime.ceding_loader.pool.layouts
    exchange.change(1)
    wait = loader.wait

    def fail(slots: np.ndarray) -> None:
        wait(slots)
        if loader.pool.slot_of[1].min() >= 0:
            raise StoreError("a record can't be read")

    loader.wait = fail  # type: ignore[method-assign]
    with pytest.raises(StoreError):
        exchange.change(-1)
    loader.wait = wait  # type: ignore[method-assign]
    assert exchange.levels == exchange._cells.open_levels == exchange._target == 1
    assert not runtime.runners[0].complete and runtime.runners[0].planner.state.quota_R[0] == loader.pool.quotas[0]
    check(engine)
    serve(engine, [Request("any", prompt_of(3), 6)])
    engine.batcher.close()
    assert loader.pool.levels == 0 and runtime.runners[0].cache.resident_E.all()
    assert loader.pool.layouts > layouts, "what was captured with the first layout is void"
    runtime.check_integrity()


class Unreadable(LateLink):
    """The record of one slot can't be read."""

    slot = 0

    def wait(self, transfer: Late) -> None:
        if transfer.slot.data_ptr() == self.slot:
            raise StoreError("it can't be read")
        super().wait(transfer)


def test_a_fetch_that_fails_changes_no_level(checkpoint: Checkpoints, cache_dir: Path):
    """It was in flight when the slots were to return, and nothing had waited for it."""
    engine = Engine(load(checkpoint("qwen3_moe"), cache_dir, slots="100%"))
    exchange, runtime = exchange_of(engine), runtime_of(engine.model)
    exchange.change(1)
    loader, runner = runtime.ceding_loader, runtime.runners[0]
    loader.link = link = Unreadable()
    expert = int(np.flatnonzero(~runner.cache.resident_E)[0])
    runner.cache.prefetch(np.array([expert]), np.eye(16, dtype=bool)[(expert + 1) % 16])
    link.slot = loader.pool.memory[runner.cache.slot_of_E[expert]].data_ptr()
    with pytest.raises(StoreError, match="it can't be read"):
        exchange.change(-1)
    assert exchange.levels == 1 and not any(each.complete for each in runtime.runners)
    link.slot = 0
    exchange.change(-1)
    assert exchange.levels == 0 and all(each.complete and each.cache.resident_E.all() for each in runtime.runners)
    runtime.check_integrity()


def test_seconds_of_fetches_are_of_windows_with_samples(checkpoint: Checkpoints, cache_dir: Path):
    """The first windows count whole; those without uses, as of captured steps, say nothing; further replicas save none."""
    model = load(checkpoint("qwen3_moe"), cache_dir, slots="50%")
    exchange, runtime = exchange_of(Engine(model)), runtime_of(model)
    assert exchange._fetches() is None
    experts, layers = runtime.layers[0].num_experts, len(runtime.layers)

    def use() -> tuple[float, float] | None:
        for layer in range(layers):
            runtime.telemetry.count_reuse(layer, np.arange(experts))
            runtime.telemetry._uses_LE[layer] += 1
        return exchange._fetches()

    first = use()
    assert first is not None and min(first) > 0
    assert exchange._fetches() == first, "no uses, no change"
    for _ in range(3):
        assert use() == pytest.approx(first, rel=0.3)
    for runner in runtime.runners:
        runner.planner.state.quota_R[0] = experts
    saved_s, lost_s = exchange._fetches() or (1.0, 0.0)
    assert saved_s == 0 < lost_s
    for runner in runtime.runners:
        runner.planner.state.quota_R[0] = experts + 1
    assert exchange._fetches() == (0, 0)


def test_ranges_that_went_to_and_fro_void_what_was_captured(checkpoint: Checkpoints, cache_dir: Path):
    """They are as before, but views of them were replaced."""
    model = load(checkpoint("qwen3_moe"), cache_dir, slots="50%")
    exchange, lent = exchange_of(Engine(model)), LentSlots(runtime_of(model), 2)

    def is_void() -> bool:
        changed = lent.take()
        lent.give_back()
        return changed

    assert is_void() and not is_void()
    exchange.change(1)
    exchange.change(-1)
    assert not exchange.levels and is_void() and not is_void()
