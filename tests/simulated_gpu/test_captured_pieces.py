"""Steps captured in pieces, on simulated GPUs: ranks of a group, and ranks alone whose slots the device can't decide about."""

from __future__ import annotations

import gc
import os
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import epslots
from epslots.errors import PeerLost
from epslots.generation import capture_pause
from epslots.generation.cache_tensors import tensors_of
from epslots.generation.engine import Engine
from epslots.generation.paged_cache import paging_obstacle
from epslots.generation.row_batcher import RowBatcher
from epslots.generation.row_support import row_support
from epslots.group.join import join
from epslots.group.rank_group import group_of
from epslots.placement.placement import default_placement
from epslots.runtime import runtime_of
from epslots.simulated_gpu.cuda_api import simulated_gpus
from epslots.simulated_gpu.machine import SimulatedMachine
from epslots.simulated_gpu.nccl_group import NcclHub, SimulatedNcclGroup
from epslots.transport.torch_transport import TorchTransport
from tests.support.equality import SERVED
from tests.support.grouped_ranks import ALL_COSTS, TOKENS_TRAVEL
from tests.support.simulated import load_gpu, request, serve
from tests.support.simulated_ranks import SimulatedRanks, nccl_stand_in, on_ranks, run_engine

CHOSEN = ["qwen3_moe", "qwen3_next", "gemma4"]
SHARES = ["25%", "50%", "100%"]
CASES = [
    ("qwen3_moe", "25%", "rows"),
    ("qwen3_moe", "50%", "pages"),
    ("qwen3_next", "25%", "rows"),
    ("gemma4", "25%", "pages"),
]
COSTS = ["tokens travel", "copies travel"]
if os.environ.get("EPSLOTS_WHOLE_ZOO"):
    CASES = [(name, share, cache) for name in SERVED for share in SHARES for cache in ("rows", "pages")]
    COSTS = list(ALL_COSTS)
# Of each rank: the second computes prompts while the first decodes, and is idle in the end.
REQUESTS = [
    [request(0, 8), request(1, 14, temperature=0.8, top_p=0.9, seed=1), request(2, 11)],
    [request(3, 5), request(4, 7, prompt=30, temperature=1.0, top_k=5, seed=2)],
]
REQUESTS = [[replace(one, logprobs=0) for one in rank] for rank in REQUESTS]
ALL = [one for rank in REQUESTS for one in rank]


@pytest.fixture(autouse=True)
def nccl_environment() -> Iterator[None]:
    with nccl_stand_in():
        yield


def on_cpu(folder: Path, store_dir: Path, **settings: Any) -> PreTrainedModel:
    settings = {"slots": "25%", "dtype": "float32", "host_compute": "off"} | settings
    return epslots.load(folder, cache_dir=store_dir, device="cpu", progress=False, **settings)


def from_disk(folder: Path, store_dir: Path, **settings: Any) -> PreTrainedModel:
    """A rank alone whose GPU can't read the store: its RAM holds a part of it."""
    return load_gpu(folder, store_dir, **{"host_memory": "150KB"} | settings)


def two_ranks(folder: Path, store_dir: Path, **engine: Any) -> SimulatedRanks:
    engine = {"max_requests": 4, "cache": "rows"} | engine
    return SimulatedRanks(folder, store_dir, costs=TOKENS_TRAVEL, engine=engine, slots="25%", host_compute="off")


@pytest.mark.parametrize(("name", "slots", "cache"), CASES)
def test_a_groups_replays_give_the_usual_tokens(
    name: str, slots: str, cache: str, checkpoint: Callable[[str], Path], shared_stores: Path
):
    """As the engine of one rank on the CPU. Afterwards tables and slots agree, and repeated rows count nowhere."""
    usual = on_cpu(checkpoint(name), shared_stores, slots=slots)
    if cache == "pages" and paging_obstacle(usual) is not None:
        pytest.skip("its requests can't be kept in pages")
    logprobs: dict[str, list[float]] = {}
    expected = run_engine(Engine(usual, cache=cache, kv_tokens=512), ALL, logprobs)
    settings: dict[str, Any] = {"slots": slots, "host_compute": "off", "costs": TOKENS_TRAVEL}
    with simulated_gpus("h100", count=2) as gpu:
        ranks = SimulatedRanks(checkpoint(name), shared_stores, engine={"cache": cache, "max_requests": 4}, **settings)
        gpu.reset()
        assert ranks.serve(REQUESTS) == expected
        for id, of_request in logprobs.items():
            assert ranks.logprobs[id] == pytest.approx(of_request, abs=2e-5), "repeated rows write what the first one does"
        assert gpu.races == []
        found = [engine.batcher.stats() for engine in ranks.engines]
        for engine, stats in zip(ranks.engines, found, strict=True):
            assert (stats.replayed_steps > 0) is (stats.capture_obstacle is None), stats.capture_obstacle
            runtime_of(engine.model).check_integrity()
        assert name not in CHOSEN or cache == "pages" or all(stats.replayed_steps > 0 for stats in found)
        tokens = [
            sum(sum(layer.tokens_per_expert) for layer in epslots.stats(model).layers) for model in [usual, *ranks.models]
        ]
        assert tokens[0] == tokens[1] + tokens[2]
        ranks.close()


@pytest.mark.parametrize("costs", COSTS)
def test_tokens_and_experts_travel_between_pieces(costs: str, checkpoint: Callable[[str], Path], shared_stores: Path):
    """However a layer's step goes, it has read what a piece left for it before the next one is replayed."""
    usual, logprobs = on_cpu(checkpoint("qwen3_moe"), shared_stores), dict[str, list[float]]()
    expected = run_engine(Engine(usual, cache="rows", kv_tokens=512), ALL, logprobs)
    with simulated_gpus("h100", count=2) as gpu:
        ranks = SimulatedRanks(checkpoint("qwen3_moe"), shared_stores, costs=ALL_COSTS[costs], engine={"max_requests": 4})
        gpu.reset()
        assert ranks.serve(REQUESTS) == expected
        for id, of_request in logprobs.items():
            assert ranks.logprobs[id] == pytest.approx(of_request, abs=2e-5)
        assert gpu.races == [] and all(engine.batcher.stats().replayed_steps > 1 for engine in ranks.engines)
        ranks.close()


@pytest.mark.parametrize("cache", ["rows", "pages"])
def test_a_replayed_step_launches_nothing_of_the_model(cache: str, checkpoint: Callable[[str], Path], shared_stores: Path):
    """But a graph for each layer, and one more; the host waits for the header, each layer's counts, and the tokens."""
    launched = {}
    with simulated_gpus("h100", count=2) as gpu:
        for capture in (True, False):
            ranks = two_ranks(checkpoint("qwen3_moe"), shared_stores, cache=cache, capture=capture)
            launched[capture] = _launches_of_steps(gpu, ranks, 3)
            assert gpu.races == []
            stats = [engine.batcher.stats() for engine in ranks.engines]
            assert all((one.replayed_steps > 3) is capture for one in stats)
            ranks.close()
    layers = len(runtime_of(ranks.models[0]).runners)
    by_owner = {capture: {owner: len(found) for owner, found in each.items()} for capture, each in launched.items()}
    # In pages, transformers sends each batch's numbers.
    outside = 0 if cache == "rows" else 20
    assert by_owner[True].get("transformers", 0) <= 3 * 2 * outside, by_owner
    assert by_owner[False]["transformers"] > 3 * 2 * (layers * 30 + outside), by_owner
    replayed = [line for line in launched[True]["epslots"] if "captured_pieces.py" in line]
    assert len(replayed) > 3 * 2 * layers, "the graphs, and a copy of each layer's result"
    assert not any("captured" in line for line in launched[False]["epslots"])


def _launches_of_steps(gpu: SimulatedMachine, ranks: SimulatedRanks, steps: int) -> dict[str, list[str]]:
    """Launches in steps in which each of two ranks decodes a request, by owner: their source lines."""
    ranks.open_all(6, request(0, 30), request(1, 30))
    gpu.reset()
    ranks.run(lambda engine: [engine.step() for _ in range(steps)])
    found: dict[str, list[str]] = {}
    streams = {stream: device for device in range(2) for stream in gpu.streams_of(device)}
    last_s = [-1.0, -1.0]
    for one in gpu.timeline.operations:
        if one.engine and one.queued_s > last_s[streams[one.stream]]:  # a graph's operations are queued at one moment
            last_s[streams[one.stream]] = one.queued_s
            found.setdefault(one.owner, []).append(one.site)
    return found


def test_a_step_that_a_lost_rank_broke_is_replayed_again(checkpoint: Callable[[str], Path], shared_stores: Path):
    """It dies between two pieces. The other makes the step once more, alone: every token as if nothing was."""
    expected = serve(on_cpu(checkpoint("qwen3_next"), shared_stores), REQUESTS[0], cache="rows")
    with simulated_gpus("h100", count=2):
        ranks = two_ranks(checkpoint("qwen3_next"), shared_stores)
        broken: list[int] = []
        transports: list[TorchTransport] = []

        def work(transport: TorchTransport) -> dict[str, list[int]]:
            transports.append(transport)
            ranks.join(transport)
            model, rank = ranks.models[transport.rank], transport.rank
            engine, tokens = ranks.open(model), dict[str, list[int]]()
            runner: Any = runtime_of(model).runners[1]
            gather = runner.gather

            def lose(batch: Any) -> Any:
                if rank == 0 and engine.batcher.stats().replayed_steps == 3 and not broken:
                    broken.append(len(batch.hidden_TH))
                    ranks.hub.lose(1)
                    for one in transports:
                        one.deadline_s = 0.2
                return gather(batch)

            runner.gather = lose
            for one in REQUESTS[rank][:3]:
                engine.batcher.add(one)

            def go_on() -> None:
                for output in engine.run():
                    tokens.setdefault(output.id, []).extend(output.tokens)

            try:
                go_on()
            except PeerLost:
                if rank == 1:
                    return {}
                group: Any = SimulatedNcclGroup(NcclHub(1), 0, model.device)
                join(model, TorchTransport(group, device=model.device, epoch=1), settings={}, costs=TOKENS_TRAVEL)
                before = engine.batcher.stats()
                go_on()
                after = engine.batcher.stats()
                assert after.replayed_steps > before.replayed_steps + 3
            return tokens

        found = on_ranks(ranks.hub, work)
        assert broken == [2] or broken == [3], broken
        assert found[0] == expected
        runtime_of(ranks.models[0]).check_integrity()


def test_a_failed_capture_breaks_no_step(
    checkpoint: Callable[[str], Path], shared_stores: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """One rank can't capture: it goes on uncaptured within the step, with the reason named, and the other rank with graphs."""
    expected = serve(on_cpu(checkpoint("qwen3_moe"), shared_stores), ALL, cache="rows")
    with simulated_gpus("h100", count=2) as gpu:
        ranks, graph, tried = two_ranks(checkpoint("qwen3_moe"), shared_stores), torch.cuda.graph, []

        @contextmanager
        def fail(*args: Any, **settings: Any) -> Iterator[None]:
            """As ``torch.cuda.graph``; on the first rank the third piece of a step fails as it ends."""
            with graph(*args, **settings):
                yield
                if torch.cuda.current_device() == 0:
                    tried.append(1)
                    if len(tried) == 3:
                        raise RuntimeError("operation not permitted")

        monkeypatch.setattr(torch.cuda, "graph", fail)
        assert ranks.serve(REQUESTS) == expected
        found = [engine.batcher.stats() for engine in ranks.engines]
        assert found[0].capture_obstacle == "a decoding step can't be captured (operation not permitted)"
        assert (found[0].replayed_steps, found[0].graph_bytes, len(tried)) == (0, 0, 3)
        assert found[1].capture_obstacle is None and found[1].replayed_steps > 1
        assert "decodes uncaptured" in caplog.text and gpu.races == []
        steps = [one.steps for one in found]
        for engine in ranks.engines:  # none was broken off and made once more; the last one finds that no rank has work
            group = group_of(engine.model)
            assert group is not None and group.lockstep.steps == max(steps) + 1
        ranks.close()


def test_a_layer_that_fails_between_pieces_breaks_no_group(checkpoint: Callable[[str], Path], shared_stores: Path):
    """The rank takes part in the rest of the step without tokens, and makes its requests' step in parts afterwards."""
    expected = serve(on_cpu(checkpoint("qwen3_next"), shared_stores), ALL, cache="rows")
    with simulated_gpus("h100", count=2) as gpu:
        ranks, failed = two_ranks(checkpoint("qwen3_next"), shared_stores), list[int]()
        runner: Any = runtime_of(ranks.models[0]).runners[1]
        prepare = runner.prepare

        def fail(hidden_TH: torch.Tensor, *rest: torch.Tensor) -> Any:
            if called_by_a_piece():
                failed.append(len(hidden_TH))
                if len(failed) == 3:
                    raise RuntimeError("as it happens")
            return prepare(hidden_TH, *rest)

        runner.prepare = fail
        assert ranks.serve(REQUESTS) == expected
        assert len(failed) > 5 and gpu.races == []
        assert all(engine.batcher.stats().replayed_steps > 1 for engine in ranks.engines)
        ranks.close()


def called_by_a_piece() -> bool:
    """Whether a layer's step is made after a replay."""
    return any(Path(frame.filename).name == "captured_pieces.py" for frame in traceback.extract_stack())


@pytest.mark.parametrize("full", [1, 2])
def test_a_capture_without_memory_is_tried_again(
    full: int, checkpoint: Callable[[str], Path], shared_stores: Path, monkeypatch: pytest.MonkeyPatch
):
    """Some steps later, when the first piece found none, or the second; and no capture stays open."""
    monkeypatch.setattr(capture_pause, "FIRST_PAUSE", 3)
    expected = serve(on_cpu(checkpoint("qwen3_moe"), shared_stores), REQUESTS[0][:1], cache="rows")
    with simulated_gpus("h100") as gpu:
        model = from_disk(checkpoint("qwen3_moe"), shared_stores)
        engine = Engine(model, cache="rows", kv_tokens=256, max_requests=2)
        memory_bytes, graph, tried = gpu.memory_bytes, torch.cuda.graph, list[int]()

        @contextmanager
        def crowded(*args: Any, **settings: Any) -> Iterator[None]:
            tried.append(engine.batcher.stats().steps)
            try:
                with graph(*args, **settings):
                    gc.collect()  # what earlier tests left is freed now, not in the capture
                    gpu.memory_bytes = gpu.allocated[0] if len(tried) == full else memory_bytes
                    yield
            finally:
                gpu.memory_bytes = memory_bytes

        monkeypatch.setattr(torch.cuda, "graph", crowded)
        assert run_engine(engine, REQUESTS[0][:1]) == expected
        layers, stats = len(runtime_of(model).runners), engine.batcher.stats()
        assert tried == [*[2] * full, *[2 + 4] * (layers + 1)]
        assert (stats.failed_captures, stats.capture_obstacle, stats.replayed_steps) == (1, None, 1) and gpu.races == []
        engine.batcher.close()


@pytest.mark.parametrize("cache", ["rows", "pages"])
def test_a_rank_whose_host_plans_replays_pieces(cache: str, checkpoint: Callable[[str], Path], shared_stores: Path):
    """With a store on disk: its experts are prefetched between pieces, and nothing races."""
    folder = checkpoint("qwen3_moe")
    expected = serve(on_cpu(folder, shared_stores), ALL, cache=cache)
    with simulated_gpus("h100") as gpu:
        model = from_disk(folder, shared_stores, kv_tokens=512, max_requests=4)
        assert runtime_of(model).plan.captures_in_pieces
        engine = Engine(model, cache=cache)
        gpu.reset()
        assert run_engine(engine, ALL) == expected
        stats = engine.batcher.stats()
        assert stats.replayed_steps > 3 and stats.capture_obstacle is None and stats.crowded_steps == 0
        assert stats.whole_obstacle == "the host store isn't pinned, so the GPU can't read it"
        assert epslots.stats(model).total("prefetches") > 0
        assert not any(runner.slots_are_lent for runner in runtime_of(model).runners)
        assert gpu.races == []
        engine.batcher.close()


def test_prompts_of_another_rank_pass_by_a_replay(checkpoint: Callable[[str], Path], shared_stores: Path):
    """It computes them on the usual path, and is idle in between: the first rank's steps are replayed all the same."""
    mine, theirs = request(0, 30), [request(number, 4, prompt=number * 20) for number in (1, 2, 3)]
    expected = serve(on_cpu(checkpoint("qwen3_moe"), shared_stores), [mine, *theirs], cache="rows")
    with simulated_gpus("h100", count=2) as gpu:
        ranks = two_ranks(checkpoint("qwen3_moe"), shared_stores)
        ranks.open_all(6, mine, theirs[0])
        before = ranks.engines[0].batcher.stats()

        def go_on(engine: Engine) -> dict[str, list[int]]:
            tokens: dict[str, list[int]] = {}
            for step in range(24):
                if engine is ranks.engines[1] and step in (3, 12):
                    engine.batcher.add(theirs[1 + (step == 12)])
                engine.step()
                for output in engine.batcher.outputs():
                    tokens.setdefault(output.id, []).extend(output.tokens)
            return tokens

        first, second = ranks.run(go_on)
        assert first | second == expected
        after, other = (engine.batcher.stats() for engine in ranks.engines)
        assert after.replayed_steps - before.replayed_steps == 24
        assert other.steps == 12 and other.prompt_tokens == sum(len(one.prompt) for one in theirs)
        assert gpu.races == []
        ranks.close()


def test_slots_move_while_pieces_are_replayed(checkpoint: Callable[[str], Path], shared_stores: Path):
    """For a placement, between layers: no piece depends on them, so none is captured anew."""
    requests = [request(0, 40), request(1, 40)]
    expected = serve(on_cpu(checkpoint("qwen3_moe"), shared_stores), requests, cache="rows")
    with simulated_gpus("h100", count=2) as gpu:
        ranks = two_ranks(checkpoint("qwen3_moe"), shared_stores)
        ranks.open_all(8, *requests)
        before = [engine.batcher.stats() for engine in ranks.engines]
        quotas = [list(runtime_of(model).place_of(0)[0].quotas) for model in ranks.models]

        def go_on(engine: Engine) -> dict[str, list[int]]:
            group, tokens = group_of(engine.model), dict[str, list[int]]()
            assert group is not None
            group.offer(moved_slots(group.placement), 1 << 30)
            for output in engine.run():
                tokens.setdefault(output.id, []).extend(output.tokens)
            return tokens

        first, second = ranks.run(go_on)
        assert first | second == {id: tokens[-len((first | second)[id]) :] for id, tokens in expected.items()}
        assert [list(runtime_of(model).place_of(0)[0].quotas) for model in ranks.models] != quotas
        for engine, old in zip(ranks.engines, before, strict=True):
            new = engine.batcher.stats()
            assert new.replayed_steps - old.replayed_steps > 25
            runtime_of(engine.model).check_integrity()
        assert gpu.races == []
        ranks.close()


def moved_slots(old: Any) -> Any:
    """A placement by which the first rank's first layer gives slots to its second."""
    quota_LR = old.quota_LR.copy()
    quota_LR[0, 0] -= 1
    quota_LR[1, 0] += 1
    moved = default_placement([old.home_LE.shape[1]] * len(quota_LR), quota_LR)
    return replace(moved, version=old.version + 1)


def test_experts_cede_slots_while_pieces_are_replayed(checkpoint: Callable[[str], Path], shared_stores: Path):
    """To the caches of both ranks, and take them back: cells stay where they are, so no piece is captured anew."""
    requests, chosen = [request(0, 40), request(1, 40)], random.Random(5)
    expected = serve(on_cpu(checkpoint("qwen3_moe"), shared_stores), requests, cache="rows")
    room: dict[str, Any] = {"kv_tokens": "auto", "max_requests": 2, "max_batch_tokens": 16}
    with simulated_gpus("h100", count=2) as gpu:
        settings: dict[str, Any] = {"costs": TOKENS_TRAVEL, "slots": 12, "host_compute": "off"}
        ranks = SimulatedRanks(checkpoint("qwen3_moe"), shared_stores, engine=room, **settings, **room)
        ranks.open_all(8, *requests)

        def go_on(engine: Engine) -> tuple[dict[str, list[int]], set[int]]:
            tokens, levels, batcher = dict[str, list[int]](), set[int](), engine.batcher
            assert isinstance(batcher, RowBatcher) and batcher.admission.exchange is not None
            exchange = batcher.admission.exchange
            for step in range(34):
                change = chosen.choice((-1, 1, 1)) if step % 3 == 0 else 0
                if change and 0 <= exchange._target + change <= exchange.sizes.most_levels:
                    exchange.change(change)
                engine.step()
                levels.add(exchange.levels)
                for output in batcher.outputs():
                    tokens.setdefault(output.id, []).extend(output.tokens)
            return tokens, levels

        (first, seen), (second, _) = ranks.run(go_on)
        assert first | second == expected and len(seen) > 2
        assert all(engine.batcher.stats().replayed_steps > 34 for engine in ranks.engines)
        assert gpu.races == []
        for engine in ranks.engines:
            engine.batcher.close()
            runtime_of(engine.model).check_integrity()


def test_a_rank_that_joins_a_group_changes_its_way(checkpoint: Callable[[str], Path], shared_stores: Path):
    """Alone its steps are captured whole, in a group in pieces; with the same engine, in the middle of a request."""
    requests = [request(0, 30), request(1, 30)]
    expected = serve(on_cpu(checkpoint("qwen3_moe"), shared_stores), requests, cache="rows")
    with simulated_gpus("h100", count=2) as gpu:
        ranks = two_ranks(checkpoint("qwen3_moe"), shared_stores)
        tokens: dict[str, list[int]] = {}

        def work(transport: TorchTransport) -> None:
            engine = ranks.open(ranks.models[transport.rank])
            captured = engine.batcher._captured
            engine.batcher.add(requests[transport.rank])
            found = tokens.setdefault(str(transport.rank), [])
            for step in range(40):
                if step == 8:
                    assert captured.whole_obstacle is None and captured.replays > 3
                    ranks.join(transport)
                engine.step()
                found += [token for output in engine.batcher.outputs() for token in output.tokens]
            assert captured.whole_obstacle is not None and captured.replays > 15
            engine.batcher.close()

        on_ranks(ranks.hub, work)
        assert tokens == expected and gpu.races == []


def test_observed_routes_take_the_usual_path(checkpoint: Callable[[str], Path], shared_stores: Path):
    """An observer may keep what it is shown."""
    with simulated_gpus("h100"):
        model, seen = from_disk(checkpoint("qwen3_moe"), shared_stores), list[torch.Tensor]()
        engine = Engine(model, cache="rows", kv_tokens=256)
        engine.batcher.add(request(0, 12))
        for _ in range(5):
            engine.step()
        runtime_of(model).runners[0].observe(lambda layer, index_TK: seen.append(index_TK))
        before = engine.batcher.stats().replayed_steps
        for _ in range(3):
            engine.step()
        assert len(seen) == 3 and before > 0 and engine.batcher.stats().replayed_steps == before
        assert len({index_TK.data_ptr() for index_TK in seen}) == 3
        engine.batcher.close()


def test_batch_invariant_steps_are_not_captured(checkpoint: Callable[[str], Path], shared_stores: Path):
    """A row's bits would depend on how many positions a step reads."""
    model = on_cpu(checkpoint("qwen3_moe"), shared_stores, batch_invariant=True)
    assert row_support(model).capture_obstacle(tensors_of(model)) is not None
    engine = Engine(model, cache="pages", kv_tokens=256)
    assert engine.batcher._decoding.obstacle is not None
    engine.batcher.close()
