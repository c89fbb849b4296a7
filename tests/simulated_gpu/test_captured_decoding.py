"""An engine's captured steps on a simulated GPU: the uncaptured tokens, from graphs that no value of the host goes into."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import PreTrainedModel

import epslots
from epslots.cuda_graph import torch_kernels
from epslots.generation import capture_pause
from epslots.generation.batcher import Batcher
from epslots.generation.engine import Engine
from epslots.generation.paged_batcher import PagedBatcher
from epslots.generation.paged_cache import paging_obstacle
from epslots.generation.requests import Request
from epslots.generation.row_batcher import RowBatcher
from epslots.moe.prefetcher import Prefetcher
from epslots.runtime import runtime_of
from epslots.simulated_gpu.cuda_api import simulated_gpus
from epslots.simulated_gpu.gpu_spec import GPUS
from tests.support import zoo
from tests.support.equality import SERVED
from tests.support.simulated import kernels_of, load_gpu, request, serve

CHOSEN = ["qwen3_moe", "gpt_oss", "qwen3_next"]
MODELS = SERVED if os.environ.get("EPSLOTS_WHOLE_ZOO") else CHOSEN
# Computed row by row, or by values of the host.
UNCAPTURED = {"deepseek_v4", "minimax", "minimax_m3_vl", "qwen4_exp", "llama4", "doge"}


REQUESTS = [
    request(0, 8),
    request(1, 11, temperature=0.8, top_p=0.9, seed=1),
    request(2, 14, temperature=1.0, top_k=5, seed=2, repetition_penalty=1.1),
]


def rows_of(tiny: Any) -> dict[str, Any]:
    """Slots for as many rows as there are requests, where the layers have so many experts."""
    return {"slots": min(len(REQUESTS) * tiny.top_k, tiny.num_experts), "dtype": "float32", "host_compute": "off"}


@pytest.mark.parametrize("name", MODELS)
def test_replays_give_the_usual_tokens(name: str, checkpoint: Callable[[str], Path], shared_stores: Path):
    """Greedy and drawn, while requests end one after the other. Afterwards tables, slots and counters agree."""
    settings = rows_of(zoo.ZOO[name])
    usual = epslots.load(checkpoint(name), cache_dir=shared_stores, device="cpu", progress=False, **settings)
    expected = serve(usual, REQUESTS, cache="rows")
    with simulated_gpus("h100") as gpu:
        model = load_gpu(checkpoint(name), shared_stores, **settings)
        batcher = RowBatcher(model, kv_tokens=512, max_requests=4)
        captured = batcher._captured
        assert (captured.obstacle is None) is (name not in UNCAPTURED), captured.obstacle
        gpu.reset()
        assert run(batcher, REQUESTS) == expected
        assert gpu.races == []
        assert batcher.stats().replayed_steps == captured.replays
        # A size's first two passes are no replays; the sizes are 4, 2 and 1 row.
        assert captured.replays == 13 - 2 * 3 if captured.obstacle is None else captured.replays == 0
        runtime_of(model).check_integrity()
        for mine, theirs in zip(epslots.stats(model).layers, epslots.stats(usual).layers, strict=True):
            assert mine.steps == theirs.steps
            assert mine.hits + mine.misses == theirs.hits + theirs.misses
            assert mine.tokens_per_expert == theirs.tokens_per_expert, "rows that fill a size don't count"
        batcher.close()


def run(batcher: Batcher, requests: list[Request]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for one in requests:
        batcher.add(one)
    while batcher.prepare():
        batcher.step()
        for output in batcher.outputs():
            assert output.error is None
            tokens.setdefault(output.id, []).extend(output.tokens)
    return tokens


def qwen(folder: Path, store_dir: Path, **settings: Any) -> PreTrainedModel:
    return load_gpu(folder, store_dir, **{"slots": 8, "dtype": "bfloat16", "host_compute": "off"} | settings)


@pytest.mark.parametrize("gpu_name", ["h100", "a100"])
def test_a_replayed_pass_waits_and_uploads_nothing(gpu_name: str, checkpoint: Callable[[str], Path], shared_stores: Path):
    """But for its numbers, which a kernel reads, and the tokens that come out. On every GPU."""
    with simulated_gpus(gpu_name) as gpu:
        engine = Engine(qwen(checkpoint("qwen3_moe"), shared_stores), cache="rows", kv_tokens=256)
        engine.batcher.add(request(0, 12))
        for _ in range(4):
            engine.step()
        assert engine.batcher.stats().replayed_steps == 1
        gpu.reset()
        for _ in range(5):
            engine.step()
        assert engine.batcher.stats().replayed_steps == 6
        assert sum(gpu.syncs.values()) == 5 and all("next_token.py" in line for _, line in gpu.syncs)
        assert not [line for kind, line in gpu.copies if kind == "H2D"]
        assert gpu.kernels["epslots", "bitwise_or"] == 5, "one upload"
        assert gpu.races == []
        layers = len(runtime_of(engine.model).runners)
        assert kernels_of(gpu)["epslots"] <= 5 * (13 * layers + 70)


DRAWN = {
    "greedy": {},
    "top_p": {"temperature": 0.8, "top_p": 0.9, "seed": 1},
    "top_k": {"temperature": 1.0, "top_k": 5, "min_p": 0.01, "seed": 2, "repetition_penalty": 1.1},
    "edited": {"temperature": 0.7, "logit_bias": ((3, 2.0),), "frequency_penalty": 0.5, "min_tokens": 20, "seed": 3},
}


@pytest.mark.parametrize("cache", ["rows", "pages"])
def test_the_host_waits_for_the_tokens_alone(cache: str, checkpoint: Callable[[str], Path], shared_stores: Path):
    """However they are chosen: the one wait of a replayed step is where they are read, after all is queued."""
    with simulated_gpus("h100") as gpu:
        engine = Engine(qwen(checkpoint("qwen3_moe"), shared_stores, slots=16), cache=cache, kv_tokens=512)
        for number, sampling in enumerate(DRAWN.values()):
            engine.batcher.add(request(number, 40, **sampling))
        for _ in range(8):
            engine.step()
        before = engine.batcher.stats().replayed_steps
        gpu.reset()
        for _ in range(5):
            engine.step()
        assert engine.batcher.stats().replayed_steps == before + 5
        ours = [line for _, line in gpu.syncs.elements() if line.startswith("epslots/")]
        assert len(ours) == 5 and all("next_token.py" in line for line in ours), gpu.syncs
        if cache == "rows":  # transformers sends a batch's numbers from pageable memory
            assert sum(gpu.syncs.values()) == 5
        assert gpu.races == []
        engine.batcher.close()


def test_experts_are_prefetched_within_the_graph(checkpoint: Callable[[str], Path], shared_stores: Path):
    """Counted as by the host, within its budget, and never raced; the verdicts on predictions go to and fro."""
    folder, found = checkpoint("qwen3_moe"), {}
    with simulated_gpus("h100") as gpu:
        for prefetch in ("off", "1B", "auto"):
            model = qwen(folder, shared_stores, dtype="float32", prefetch=prefetch)
            gpu.reset()
            batcher = RowBatcher(model, kv_tokens=512, max_requests=2)
            tokens = run(batcher, REQUESTS[:2])
            assert batcher.stats().replayed_steps > 5
            batcher.close()
            assert gpu.races == []
            runtime_of(model).check_integrity()
            stats = epslots.stats(model)
            found[prefetch] = tokens, stats.total("prefetches"), stats.misses, gpu.kernels["epslots", "choose"]
            fetched = stats.misses + stats.total("prefetches")
            assert stats.total("host_bytes") == fetched * runtime_of(model).layers[0].layout.nbytes
            verdicts = [runner.planner.prefetch_policy.verdict for runner in runtime_of(model).runners]
            assert any(verdict.predicted for verdict in verdicts) is (prefetch != "off")
    assert found["off"][0] == found["1B"][0] == found["auto"][0]
    assert found["off"][1] == found["1B"][1] == 0 < found["auto"][1]
    assert found["off"][3] == 0 < found["1B"][3]
    assert found["auto"][2] < found["off"][2], "fewer misses"


def test_nothing_waits_for_a_wrong_prefetch(
    checkpoint: Callable[[str], Path], shared_stores: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its copy ends when the layer's router has chosen other experts: a slow link shows it."""

    def wrong(self: Prefetcher, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        """The even ones are said to be used: those that are absent are fetched, and many in vain."""
        return (torch.arange(len(self._unused_E), dtype=torch.int32, device=hidden_TH.device) + 1) % 2 * 255

    monkeypatch.setattr(Prefetcher, "usage", wrong)
    monkeypatch.setattr(torch_kernels, "LEAST_JUDGED", 1 << 60)
    seconds, dropped = {}, 0
    with simulated_gpus(msgspec.structs.replace(GPUS["h100"], link_rate=1e8)) as gpu:
        for prefetch in ("off", "auto"):
            model = qwen(checkpoint("qwen3_moe"), shared_stores, prefetch=prefetch)
            batcher = RowBatcher(model, kv_tokens=512, max_requests=1)
            batcher.add(request(0, 20))
            while batcher.stats().replayed_steps < 2:
                assert batcher.prepare()
                batcher.step()
            gc.collect()  # what earlier tests left is freed now, not while the clock counts
            began_s = gpu.now_s
            for _ in range(6):
                assert batcher.prepare()
                batcher.step()
            seconds[prefetch] = gpu.now_s - began_s
            if prefetch == "auto":
                stats = epslots.stats(model)
                copies = [one for one in gpu.timeline.operations if one.name == "copy_ahead"]
                each_s = runtime_of(model).layers[0].layout.nbytes / gpu.spec.link_rate
                dropped = stats.total("prefetches") - sum(one.duration_s for one in copies) / each_s
            batcher.close()
            assert gpu.races == []
    assert dropped > 5, "copies in vain end early; of those that are made whole it is 0"
    assert seconds["auto"] < 1.3 * seconds["off"], seconds


PAGED = ["qwen3_moe", "gemma4"]
# Their models ask the host for values where the batch is packed: the capture fails, and is named.
ASK_IN_PAGES = {"phimoe", "muse_spark"}


@pytest.mark.parametrize("name", MODELS if os.environ.get("EPSLOTS_WHOLE_ZOO") else PAGED)
def test_steps_over_pages_are_replayed_too(name: str, checkpoint: Callable[[str], Path], shared_stores: Path):
    """With and without windows; while requests end one after the other, and one comes later."""
    settings = rows_of(zoo.ZOO[name])
    usual = epslots.load(checkpoint(name), cache_dir=shared_stores, device="cpu", progress=False, **settings)
    if paging_obstacle(usual) is not None:
        pytest.skip("its requests can't be kept in pages")
    expected = serve(usual, REQUESTS, cache="pages")
    with simulated_gpus("h100") as gpu:
        model = load_gpu(checkpoint(name), shared_stores, **settings)
        batcher = PagedBatcher(model, kv_tokens=512, max_requests=4)
        gpu.reset()
        assert run(batcher, REQUESTS) == expected
        assert gpu.races == []
        obstacle = batcher.stats().capture_obstacle
        assert (batcher.stats().replayed_steps > 0) is (obstacle is None), obstacle
        assert (obstacle is None) is (batcher._decoding.obstacle is None and name not in UNCAPTURED | ASK_IN_PAGES), obstacle
        runtime_of(model).check_integrity()
        for mine, theirs in zip(epslots.stats(model).layers, epslots.stats(usual).layers, strict=True):
            assert mine.tokens_per_expert == theirs.tokens_per_expert
        batcher.close()


def test_prompts_and_many_rows_take_the_usual_path(checkpoint: Callable[[str], Path], shared_stores: Path):
    """A request that comes, and a batch that may need more experts than a layer has slots; and captured steps again."""
    folder, later = checkpoint("qwen3_moe"), [request(3, 6), request(4, 6)]
    usual = epslots.load(
        folder, cache_dir=shared_stores, device="cpu", progress=False, slots=8, dtype="float32", host_compute="off"
    )
    expected = serve(usual, [*REQUESTS, *later], cache="rows")
    with simulated_gpus("h100") as gpu:
        batcher = RowBatcher(qwen(folder, shared_stores, dtype="float32"), kv_tokens=512, max_requests=8)
        waiting, tokens, passes = [*REQUESTS[2:], *REQUESTS[:2], *later], {}, []
        while waiting or batcher.has_work:
            if len(passes) in (0, 6, 8, 10, 12):
                batcher.add(waiting.pop(0))
            before = batcher.stats().replayed_steps
            assert batcher.prepare() and batcher._batch is not None
            rows, decodes = len(batcher._batch.rows), batcher._batch.decodes
            batcher.step()
            passes.append((rows, decodes, batcher.stats().replayed_steps - before))
            for output in batcher.outputs():
                tokens.setdefault(output.id, []).extend(output.tokens)
        assert tokens == expected
        assert passes[:6] == [(1, False, 0), *[(1, True, 0)] * 2, *[(1, True, 1)] * 3]
        assert any(rows > 2 and decodes for rows, decodes, _ in passes)
        assert all(rows <= 2 and decodes for rows, decodes, replayed in passes if replayed)
        assert sum(replayed for _, _, replayed in passes[14:]) > 0
        crowded = [rows for rows, decodes, _ in passes if decodes and rows > 2]
        assert batcher.stats().crowded_steps == len(crowded) and batcher.stats().ragged_steps == 0
        assert gpu.races == []
        batcher.close()


@pytest.mark.parametrize("cache", ["rows", "pages"])
def test_one_long_request_takes_the_usual_path(cache: str, checkpoint: Callable[[str], Path], shared_stores: Path):
    """With many short ones, as long as which all of them would be read; alone, its steps are captured."""
    requests = [request(0, 12, prompt=200), *(request(number, 4, prompt=20 - number) for number in range(1, 9))]
    settings = {"cache": cache, "kv_tokens": 500, "max_requests": 16}
    with simulated_gpus("h100") as gpu:
        model = qwen(checkpoint("qwen3_moe"), shared_stores, slots=16, dtype="float32")
        expected = run(Engine(model, capture=False, **settings).batcher, requests)
        batcher = Engine(model, **settings).batcher
        assert run(batcher, requests) == expected
        stats = batcher.stats()
        assert (stats.ragged_steps, stats.crowded_steps) == (3, 0) and stats.replayed_steps > 3
        assert gpu.races == []
        batcher.close()


def test_slots_that_move_free_the_graphs(checkpoint: Callable[[str], Path], shared_stores: Path):
    """With their memory, which no other graph may share then; what they take is counted once."""
    with simulated_gpus("h100") as gpu:
        model = qwen(checkpoint("qwen3_moe"), shared_stores, slots=8, dtype="float32")
        runtime, batcher = runtime_of(model), RowBatcher(model, kv_tokens=256, max_requests=2)
        expected = run(batcher, [request(0, 8)])
        before = batcher.stats()
        assert before.graph_bytes > 0
        runtime.divide([7, 9, *[8] * (len(runtime.layers) - 2)])
        assert run(batcher, [request(0, 8)]) == expected
        assert batcher.stats().replayed_steps > before.replayed_steps and batcher.stats().capture_obstacle is None
        assert batcher.stats().graph_bytes < 1.5 * before.graph_bytes
        assert gpu.races == []
        batcher.close()


def test_observed_routes_take_the_usual_path(checkpoint: Callable[[str], Path], shared_stores: Path):
    """An observer is called from Python."""
    with simulated_gpus("h100"):
        model = qwen(checkpoint("qwen3_moe"), shared_stores)
        seen: list[int] = []
        runtime_of(model).runners[0].observe(lambda layer, index_TK: seen.append(len(index_TK)))
        batcher = RowBatcher(model, kv_tokens=256, max_requests=2)
        run(batcher, [request(0, 6)])
        assert seen == [7, *[1] * 5] and batcher.stats().replayed_steps == 0
        batcher.close()


def test_a_failed_capture_is_named_and_not_tried_again(
    checkpoint: Callable[[str], Path], shared_stores: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The pass is made in the usual way, as are all later ones."""
    with simulated_gpus("h100"):
        model = qwen(checkpoint("qwen3_moe"), shared_stores)
        expected = run(RowBatcher(model, kv_tokens=256, max_requests=2, capture=False), REQUESTS[:1])
        tried: list[int] = []

        def fail(*_: Any, **__: Any) -> Any:
            tried.append(1)
            raise RuntimeError("operation not permitted")

        batcher = RowBatcher(model, kv_tokens=256, max_requests=2)
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "graph", fail)
            assert run(batcher, REQUESTS[:1]) == expected
        assert batcher._captured.obstacle == "a decoding step can't be captured (operation not permitted)"
        assert len(tried) == 1 and "decodes uncaptured" in caplog.text
        runtime_of(model).check_integrity()


def test_a_capture_without_memory_is_tried_again(
    checkpoint: Callable[[str], Path], shared_stores: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """After pauses that grow; meanwhile steps take the usual way, but for those of a size that has its graph."""
    monkeypatch.setattr(capture_pause, "FIRST_PAUSE", 2)
    with simulated_gpus("h100") as gpu:
        model = qwen(checkpoint("qwen3_moe"), shared_stores)
        requests = [request(0, 30), request(1, 3)]
        expected = run(RowBatcher(model, kv_tokens=256, max_requests=2, capture=False), requests)
        tried: list[int] = []
        batcher, memory_bytes, graph = RowBatcher(model, kv_tokens=256, max_requests=2), gpu.memory_bytes, torch.cuda.graph

        @contextmanager
        def crowded(*args: Any, **settings: Any) -> Iterator[None]:
            """As ``torch.cuda.graph``; the first three find a device that is full but for some KiB."""
            tried.append(batcher.stats().steps)
            try:
                with graph(*args, **settings):
                    gc.collect()  # what earlier tests left is freed now, not in the capture
                    gpu.memory_bytes = gpu.allocated[0] + 4096 if len(tried) <= 3 else memory_bytes
                    yield
            finally:
                gpu.memory_bytes = memory_bytes

        monkeypatch.setattr(torch.cuda, "graph", crowded)
        batcher.add(requests[0])
        tokens: dict[str, list[int]] = {"0": [], "1": []}
        reasons = []
        while batcher.prepare():
            if batcher.stats().steps == 22:  # as the graph of one row is there
                batcher.add(requests[1])
            batcher.step()
            reasons.append(batcher.stats().capture_obstacle)
            for output in batcher.outputs():
                assert output.error is None
                tokens[output.id] += output.tokens
        assert tokens == expected
        # After the prompt and one step that isn't captured, and then with 2, 4 and 8 steps between.
        assert tried[:4] == [2, 2 + 3, 5 + 5, 10 + 9]
        assert [reason is not None for reason in reasons[:20]] == [False] * 2 + [True] * 17 + [False]
        stats = batcher.stats()
        assert (stats.failed_captures, stats.capture_obstacle) == (3, None) and stats.replayed_steps > 5
        assert "decodes uncaptured for now" in caplog.text and gpu.races == []
        runtime_of(model).check_integrity()
        batcher.close()


def test_a_broken_pass_is_repeated(checkpoint: Callable[[str], Path], shared_stores: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing of it counts: neither its tokens, nor the states that it left."""
    with simulated_gpus("h100"):
        model = load_gpu(checkpoint("qwen3_next"), shared_stores, **rows_of(zoo.ZOO["qwen3_next"]))
        expected = run(RowBatcher(model, kv_tokens=256, max_requests=2, capture=False), REQUESTS[:2])
        batcher, choose, turns = RowBatcher(model, kv_tokens=256, max_requests=2), RowBatcher._choose, []

        def fail_at_times(itself: RowBatcher, part: Any, *rest: Any) -> Any:
            turns.append(len(part))
            if len(part) == 2 and turns.count(2) in (4, 7):
                raise RuntimeError("as it happens")
            return choose(itself, part, *rest)

        monkeypatch.setattr(RowBatcher, "_choose", fail_at_times)
        assert run(batcher, REQUESTS[:2]) == expected
        assert batcher.stats().replayed_steps > 3
        batcher.close()


def test_captured_and_usual_passes_take_turns(checkpoint: Callable[[str], Path], shared_stores: Path):
    """Each goes on from the states that the other kind left."""
    with simulated_gpus("h100"):
        model = load_gpu(checkpoint("qwen3_next"), shared_stores, **rows_of(zoo.ZOO["qwen3_next"]))
        expected = run(RowBatcher(model, kv_tokens=256, max_requests=2, capture=False), REQUESTS[2:])
        batcher, tokens = RowBatcher(model, kv_tokens=256, max_requests=2), []
        batcher.add(REQUESTS[2])
        while batcher.prepare():
            batcher._captured.obstacle = "not now" if batcher.stats().steps % 6 in (1, 2) else None
            batcher.step()
            tokens += [token for output in batcher.outputs() for token in output.tokens]
        assert tokens == expected["2"] and batcher.stats().replayed_steps > 3
        batcher.close()


def test_an_idle_engine_gives_the_slots_back(checkpoint: Callable[[str], Path], shared_stores: Path):
    """And before, a reader of the statistics gets those of the device, too."""
    with simulated_gpus("h100"):
        model = qwen(checkpoint("qwen3_moe"), shared_stores)
        engine = Engine(model, cache="rows", kv_tokens=256)
        engine.batcher.add(request(0, 12))
        for step in range(1, 9):
            engine.step()
            if step % 3 == 0:
                assert epslots.stats(model).steps == step
        assert any(runner.slots_are_lent for runner in runtime_of(model).runners)
        for _ in engine.run():
            pass
        assert not any(runner.slots_are_lent for runner in runtime_of(model).runners)
        runtime_of(model).check_integrity()


def test_nothing_is_captured_where_it_cannot_be(checkpoint: Callable[[str], Path], shared_stores: Path):
    """On a CPU, if it isn't wanted, and without slots for one token's experts: with the reason."""
    folder = checkpoint("qwen3_moe")
    on_cpu = epslots.load(folder, cache_dir=shared_stores, device="cpu", progress=False, slots=8)
    assert RowBatcher(on_cpu, kv_tokens=64)._captured.obstacle == "the model is on cpu"
    with simulated_gpus("h100"):
        few = RowBatcher(qwen(folder, shared_stores, slots=2), kv_tokens=64)._captured.reason
        assert few is not None and few.endswith("has 2 slots, and a step may need 4 experts")
        unwanted = RowBatcher(qwen(folder, shared_stores), kv_tokens=64, capture=False)
        assert unwanted._captured.obstacle == "it was asked for"
