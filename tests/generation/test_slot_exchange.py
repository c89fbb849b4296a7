"""Cache and experts exchange slots while requests run: tokens stay plain transformers', and memory stays where it is."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import asdict

import epslots
from epslots.errors import ConfigError, PeerLost
from epslots.generation import slot_exchange
from epslots.generation.cache_image import TensorPlace
from epslots.generation.engine import Engine
from epslots.generation.requests import Request
from epslots.generation.row_batcher import RowBatcher
from epslots.group.join import join
from epslots.group.rank_group import group_of
from epslots.runtime import runtime_of
from epslots.transport.local_transport import LocalHub, LocalTransport
from tests.support import zoo
from tests.support.batches import Collected, StepClock, expected_of, prompt_of
from tests.support.grouped_ranks import COPIES_TRAVEL, Grouped
from tests.support.late_link import LateLink
from tests.support.rank_helpers import run_threads
from tests.support.slot_exchanges import AUTO, check, exchange_of, load, rows_of, serve, step

Checkpoints = Callable[[str], Path]
MODELS = ["qwen3_moe", "deepseek_v3", *(["qwen3_next", "glm_moe_dsa"] if os.environ.get("EPSLOTS_WHOLE_ZOO") else [])]
SIZES = ((3, 6), (40, 4), (1, 7), (23, 4), (9, 30))


def requests_of(rank: int = 0) -> list[Request]:
    """Of every third rank, none."""
    sizes = (SIZES, SIZES[1:3], ())[rank % 3]
    return [Request(f"{rank}.{number}", prompt_of(length, rank), new) for number, (length, new) in enumerate(sizes)]


def many(sizes: Iterable[tuple[int, int]]) -> list[Request]:
    return [Request(f"m{number}.{new}", prompt_of(length, number), new) for number, (length, new) in enumerate(sizes)]


def places_of(engine: Engine) -> list[tuple[str, TensorPlace]]:
    cache = rows_of(engine).cache
    row = cache.open()
    places = list(cache.places(row))
    cache.close(row)
    return places


class Mover:
    """Changes a rank's level at random, before each of its steps."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine, self._exchange = engine, exchange_of(engine)
        self._random = random.Random(seed)
        self.levels: list[int] = []

    def move(self) -> None:
        if rows_of(self._engine)._isolation is not None:
            return
        exchange, change = self._exchange, self._random.choice((-1, 1, 1))
        if 0 <= exchange._target + change <= exchange.sizes.most_levels:
            exchange.change(change)
        open_levels = rows_of(self._engine).cache.cells.open_levels
        assert open_levels <= exchange.levels, "cells are used once their slots are ceded, and not before"
        self.levels.append(exchange.levels)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_stay_while_levels_change(name: str, checkpoint: Checkpoints, cache_dir: Path):
    model = load(checkpoint(name), cache_dir)
    runtime = runtime_of(model)
    memory = [(loader.pool.memory.data_ptr(), loader.pool.memory.nbytes) for loader in runtime.loaders]
    engine, plan = Engine(model), runtime.plan
    sizes = exchange_of(engine).sizes
    assert rows_of(engine).cache.nbytes + sizes.own_bytes == plan.kv_bytes
    assert sum(nbytes for _, nbytes in memory) == plan.slot_bytes + sizes.own_bytes
    cells = [place.memory.untyped_storage().data_ptr() for name, place in places_of(engine) if name.endswith("keys")]
    assert cells and set(cells) == {runtime.ceding_loader.pool.memory.data_ptr()}
    mover = Mover(engine, seed=1)
    assert serve(engine, requests_of(), mover.move) == expected_of(zoo.reference(checkpoint(name)), requests_of())
    assert max(mover.levels) >= 4 and len(set(mover.levels)) > 3
    assert [(loader.pool.memory.data_ptr(), loader.pool.memory.nbytes) for loader in runtime.loaders] == memory
    engine.batcher.close()
    runtime.check_integrity()
    assert runtime.ceding_loader.pool.levels == 0, "all slots are the experts' again"


def test_tokens_stay_on_ranks_with_levels_of_their_own(checkpoint: Checkpoints, cache_dir: Path):
    """Three ranks change theirs on their own, and want copies for all slots; their group is formed again meanwhile."""
    folder = checkpoint("qwen3_moe")
    grouped = Grouped(folder, cache_dir, [12, "50%", 8], COPIES_TRAVEL, prefetch="auto", **AUTO)
    for rank in range(3):
        for loader in grouped.runtime(rank).loaders:
            loader.link = LateLink()  # type: ignore[assignment]
    engines = [Engine(model) for model in grouped.models]
    movers = [Mover(engine, seed) for seed, engine in enumerate(engines)]

    def first_steps(transport: LocalTransport) -> dict[str, list[int]]:
        engine, tokens = engines[transport.rank], dict[str, list[int]]()
        group = group_of(engine.model)
        assert group is not None
        first = group.placement
        wanted_LRE = first.wanted_LRE | (np.arange(first.wanted_LRE.shape[2]) < first.quota_LR[:, :, None])
        home_LE = np.where(wanted_LRE.any(1), wanted_LRE.argmax(1), first.home_LE)
        group.offer(replace(first, version=1, home_LE=home_LE, wanted_LRE=wanted_LRE), 2**20)
        for request in requests_of(transport.rank):
            engine.batcher.add(request)
        for _ in range(9):
            step(engine, tokens, movers[transport.rank].move)
        return tokens

    def the_rest(transport: LocalTransport) -> dict[str, list[int]]:
        engine = engines[transport.rank]
        join(engine.model, transport)
        group = group_of(engine.model)
        assert group is not None and group.shared.levels_R is not None and group.placement.version > 0
        assert group.shared.levels_R[transport.rank] == exchange_of(engine).levels
        return serve(engine, [], movers[transport.rank].move)

    begun = run_threads(first_steps, 3, hub=grouped.hub)
    ended = run_threads(the_rest, 3, hub=LocalHub(3, epoch=1))
    reference = zoo.reference(folder)
    for rank, requests in enumerate(map(requests_of, range(3))):
        found = {request.id: begun[rank].get(request.id, []) + ended[rank].get(request.id, []) for request in requests}
        assert found == expected_of(reference, requests)
    assert len({tuple(mover.levels) for mover in movers}) == 3 and min(max(mover.levels) for mover in movers) > 1
    grouped.check()


def test_a_group_cedes_slots_before_a_rank_needs_them(checkpoint: Checkpoints, cache_dir: Path):
    """One rank's request outgrows its cells: slots come with the step before. A prompt's first may take a step without one."""
    grouped = Grouped(checkpoint("qwen3_moe"), cache_dir, ["75%", 2], **AUTO)
    request = Request("long", prompt_of(200), 40)
    engines = [Engine(model) for model in grouped.models]
    tokens = run_threads(lambda t: serve(engines[t.rank], [request][t.rank :]), 2, hub=grouped.hub)
    assert tokens == [expected_of(zoo.reference(checkpoint("qwen3_moe")), [request]), {}]
    assert [exchange_of(engine).levels for engine in engines] == [exchange_of(engines[0]).sizes.levels_for(239), 0]
    stats, group = engines[0].batcher.stats(), group_of(engines[0].model)
    assert group is not None and stats.preempted == 0
    assert stats.steps <= group.lockstep.steps <= stats.steps + 2, "at the beginning, and where none has work any more"
    grouped.check()


def test_a_rank_that_waits_for_slots_makes_a_step(checkpoint: Checkpoints, cache_dir: Path):
    """Without a batch, and though no rank has one: or the slots would never come."""
    grouped = Grouped(checkpoint("qwen3_moe"), cache_dir, ["75%", 2], **AUTO)
    engines = [Engine(model) for model in grouped.models]

    def work(transport: LocalTransport) -> list[bool]:
        engine = engines[transport.rank]
        if not transport.rank:
            assert not exchange_of(engine).grow(100) and engine.batcher.waits_for_room
        return [engine.step().work for _ in range(2)]

    assert run_threads(work, 2, hub=grouped.hub) == [[True, False]] * 2
    assert exchange_of(engines[0]).grow(100)
    grouped.check()


def test_running_requests_get_room_at_once(checkpoint: Checkpoints, cache_dir: Path):
    """Rather than being given up: experts cede as many slots as it takes, and no request was refused for its length."""
    folder = checkpoint("qwen3_moe")
    engine = Engine(load(folder, cache_dir))
    sizes = exchange_of(engine).sizes
    request = Request("long", prompt_of(300), 60)
    assert sizes.least_tokens < 32 and engine.batcher.capacity == sizes.most_tokens > 359
    assert serve(engine, [request]) == expected_of(zoo.reference(folder), [request])
    assert engine.batcher.stats().preempted == 0
    assert exchange_of(engine).levels == sizes.levels_for(359)
    with pytest.raises(ConfigError, match=f"the cache holds {sizes.most_tokens}"):
        engine.batcher.add(Request("longer", prompt_of(sizes.most_tokens), 2))


def test_requests_are_preempted_when_no_slot_is_left(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    engine = Engine(load(folder, cache_dir, slots=2))
    capacity = engine.batcher.capacity
    assert exchange_of(engine).sizes.most_levels == 1
    requests = [Request(f"r{number}", prompt_of(60, number), 30) for number in range(3)]
    assert serve(engine, requests) == expected_of(zoo.reference(folder), requests)
    stats = engine.batcher.stats()
    assert stats.preempted > 0 and stats.kv_tokens == stats.kv_most_tokens == capacity


def test_the_cache_grows_under_load_and_shrinks_after(checkpoint: Checkpoints, cache_dir: Path, monkeypatch):
    """Requests that wait for cells make it grow, a level a window; when they are gone, dear misses bring the slots back."""
    monkeypatch.setattr(slot_exchange, "WINDOW_STEPS", 4)
    model = load(checkpoint("qwen3_moe"), cache_dir, max_requests=8)
    runtime = runtime_of(model)
    clock = StepClock()
    model.get_decoder().register_forward_hook(lambda _, __, output: clock.step(output[0].shape[:2].numel()))
    batcher = RowBatcher(model, clock=clock, **asdict(runtime.engine))
    exchange = batcher.admission.exchange
    assert exchange is not None
    exchange._fetch_s = 1e-6
    collected, levels = Collected(batcher), list[int]()

    def step() -> None:
        batcher.step()
        levels.append(exchange.levels)

    for request in many((28, 3) for _ in range(40)):  # a row that runs doesn't outgrow its cells
        batcher.add(request)
    collected.run(step=step)
    grown = max(levels)
    assert grown >= 2 and max(b - a for a, b in pairwise(levels)) == 1, "one level a window"
    assert batcher.stats().preempted == 0

    before = epslots.stats(model)
    exchange._fetch_s = 10.0
    for request in many(((3, 60), (5, 60))):
        batcher.add(request)
    levels.clear()
    collected.run(step=step)
    assert levels[0] == levels[1] == grown and levels[-1] < grown, "slots come back"
    assert epslots.stats(model).hits > before.hits
    batcher.close()


def test_a_loss_and_a_cancelled_request_leave_no_cell_behind(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    model = load(folder, cache_dir)
    engine = Engine(model)
    mover, requests, steps = Mover(engine, seed=3), requests_of(), itertools.count()
    module = next(iter(zoo.experts_modules(model).values()))
    raised = []

    def lose(*_: Any) -> None:
        if len(raised) < next(steps) // 4:
            raised.append(None)
            raise PeerLost("a peer was lost")

    module.register_forward_hook(lose)
    for request in requests:
        engine.batcher.add(request)
    tokens: dict[str, list[int]] = {}
    while engine.batcher.has_work:
        try:
            step(engine, tokens, mover.move)
        except PeerLost:
            check(engine)
        if len(tokens.get("0.4", ())) == 3:
            engine.batcher.cancel("0.4")
    expected = expected_of(zoo.reference(folder), requests)
    assert tokens == expected | {"0.4": expected["0.4"][: len(tokens["0.4"])]}
    assert len(raised) > 3 and len(tokens["0.4"]) == 3 < len(expected["0.4"])
    engine.batcher.close()
    assert runtime_of(model).ceding_loader.pool.levels == 0


def test_a_rank_with_all_experts_plans_only_while_it_lacks_some(checkpoint: Checkpoints, cache_dir: Path):
    """A rank alone makes no plans for a layer that never misses: one that gets its last slot back is complete at once."""
    model = load(checkpoint("qwen3_moe"), cache_dir, slots="100%")
    engine, requests = Engine(model), requests_of()
    exchange, runner = exchange_of(engine), runtime_of(model).runners[0]
    assert runner.complete
    exchange.change(1)
    assert not runner.complete
    serve(engine, requests[:1])
    engine.batcher.close()
    assert runner.complete and runner.cache.resident_E.all()
    runtime_of(model).check_integrity()


def test_one_engine_at_a_time_is_in_the_slots(checkpoint: Checkpoints, cache_dir: Path):
    model = load(checkpoint("qwen3_moe"), cache_dir)
    first = Engine(model)
    with pytest.raises(ConfigError, match="another engine keeps its requests in this model's slots"):
        Engine(model)
    beside = Engine(model, kv_tokens=64)
    assert rows_of(beside).admission.exchange is None
    first.batcher.close()
    Engine(model).batcher.close()
    fixed = epslots.load(checkpoint("qwen3_moe"), slots=2, device="cpu", cache_dir=cache_dir, progress=False)
    with pytest.raises(ConfigError, match="kv_tokens='auto': the model was loaded without it"):
        Engine(fixed, kv_tokens="auto")
