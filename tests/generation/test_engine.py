"""Each rank serves its own requests, in step with ranks that have more, fewer, or none; tokens equal plain transformers'."""

from __future__ import annotations

import os
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
from epslots.generation.engine import Engine
from epslots.generation.requests import Request
from epslots.generation.sampling import GREEDY, Sampling
from epslots.group.join import join
from epslots.group.rank_group import group_of
from epslots.transport.local_transport import LocalHub, LocalTransport
from tests.support import zoo
from tests.support.batches import drawn, serve_all
from tests.support.equality import SERVED, greedy
from tests.support.grouped_ranks import TOKENS_TRAVEL, Grouped
from tests.support.rank_helpers import run_threads

Checkpoints = Callable[[str], Path]
ATTENTION = dict.fromkeys(("gpt_oss", "deepseek_v4", "mimo_v2_flash", "hy_v4", "inkling2"), "eager")
IN_LOCK_STEP = ["qwen3_moe", "deepseek_v3", "gpt_oss", "gemma4", "qwen3_next", "nemotron_h", "longcat_flash"]
IN_LOCK_STEP += ["kimi_linear", "deepseek_v4", "mimo_v2_flash", "hy_v4", "inkling2", "jamba", "minimax"]
if os.environ.get("EPSLOTS_WHOLE_ZOO"):
    IN_LOCK_STEP = SERVED
DRAWN = Sampling(0.9, top_k=200, top_p=0.95, seed=12)


def requests_of(rank: int, sampling: Sampling = GREEDY) -> list[Request]:
    """Of very different lengths; every third rank has none."""
    sizes = [[(3, 8), (40, 2), (17, 5)], [(9, 5)], []][rank % 3]
    return [
        Request(f"{rank}.{n}", tuple(zoo.random_ids(1, length, seed=2 + n % 2)[0].tolist()), new, sampling=sampling)
        for n, (length, new) in enumerate(sizes)
    ]


def serve(model: PreTrainedModel, requests: list[Request], batch_tokens: int = 24) -> dict[str, list[int]]:
    engine = Engine(model, kv_tokens=512, max_batch_tokens=batch_tokens)
    return serve_all(engine, requests)


def expected(reference: PreTrainedModel, requests: list[Request]) -> dict[str, list[int]]:
    return {r.id: greedy(reference, torch.tensor([r.prompt]), r.max_new_tokens)[len(r.prompt) :] for r in requests}


def grouped_for(name: str, folder: Path, cache_dir: Path, slots: list[int | str]) -> Grouped:
    return Grouped(folder, cache_dir, slots, attn_implementation=ATTENTION.get(name, "sdpa"))


@pytest.mark.parametrize("name", IN_LOCK_STEP)
def test_ranks_with_many_few_and_no_requests(name: str, checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint(name)
    grouped = grouped_for(name, folder, cache_dir, [2, "50%", 1])
    reference = zoo.reference(folder)
    results = run_threads(lambda t: serve(grouped.models[t.rank], requests_of(t.rank)), 3, hub=grouped.hub)
    for rank, found in enumerate(results):
        assert found == expected(reference, requests_of(rank))
    grouped.check()


def test_one_rank_alone(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("mixtral")
    model = epslots.load(folder, slots=3, device="cpu", dtype="float32", cache_dir=cache_dir, progress=False)
    assert serve(model, requests_of(0)) == expected(zoo.reference(folder), requests_of(0))


def test_a_rank_that_wants_to_stop_tells_all(checkpoint: Checkpoints, cache_dir: Path):
    grouped = grouped_for("mixtral", checkpoint("mixtral"), cache_dir, [2, 2])

    def work(transport: LocalTransport) -> list[bool]:
        engine = Engine(grouped.models[transport.rank], kv_tokens=128)
        group = group_of(engine.model)
        assert group is not None
        if transport.rank:
            engine.batcher.add(requests_of(1)[0])
        seen = [engine.step().stop]
        if transport.rank == 0:
            group.lockstep.ask_to_stop()
        return [*seen, engine.step().stop]

    assert run_threads(work, 2, hub=grouped.hub) == [[False, True], [False, True]]


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next"])
def test_a_request_draws_the_same_tokens_on_any_rank(name: str, checkpoint: Checkpoints, cache_dir: Path):
    """On the first of two, on the second, beside requests of its own kind and beside others."""
    folder = checkpoint(name)
    grouped = grouped_for(name, folder, cache_dir, [2, "50%"])
    reference = zoo.reference(folder)
    alike = [replace(request, sampling=DRAWN) for request in requests_of(0)]
    mates = [replace(request, id=f"{request.id}+", sampling=Sampling(2.0, seed=n)) for n, request in enumerate(alike)]
    tokens = {request.id: drawn(reference, request) for request in [*alike, *mates]}
    assert tokens != {**expected(reference, alike), **expected(reference, mates)}
    work = [[*alike, mates[0]], [mates[1], *alike[::-1], mates[2]]]
    results = run_threads(lambda t: serve(grouped.models[t.rank], work[t.rank]), 2, hub=grouped.hub)
    assert results == [{request.id: tokens[request.id] for request in requests} for requests in work]
    grouped.check()


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next", "glm_moe_dsa", "deepseek_v4"])
def test_a_step_that_a_lost_rank_broke_is_made_again(name: str, sampling: Sampling, checkpoint: Checkpoints, cache_dir: Path):
    """Rank 2 dies in the middle of the fourth step. The two others re-form and finish: every token as if nothing was."""
    folder = checkpoint(name)
    grouped = grouped_for(name, folder, cache_dir, [3, 4, 2])
    reference = zoo.reference(folder)
    passes = 0

    def die(*_: object) -> None:
        nonlocal passes
        passes += 1
        if passes == 4:
            grouped.hub.lose(2)

    layers: Any = grouped.models[2].model.layers
    layers[1].register_forward_pre_hook(die)
    next_hub = LocalHub(2, epoch=1)

    def work(transport: LocalTransport) -> dict[str, list[int]]:
        rank = transport.rank
        requests = (
            [Request("x", tuple(zoo.random_ids(1, 20, seed=2)[0].tolist()), 20)] if rank == 2 else requests_of(rank, sampling)
        )
        engine = Engine(grouped.models[rank], kv_tokens=512, max_batch_tokens=24)
        found: dict[str, list[int]] = {request.id: [] for request in requests}
        for request in requests:
            engine.batcher.add(request)
        try:
            for output in engine.run():
                found[output.id] += output.tokens
        except PeerLost:
            if rank == 2:
                return {}
            join(engine.model, next_hub.transport(rank), settings={}, costs=TOKENS_TRAVEL)
            for output in engine.run():
                found[output.id] += output.tokens
        return found

    results = run_threads(work, 3, hub=grouped.hub)
    assert passes == 4
    assert results[:2] == [{r.id: drawn(reference, r) for r in requests_of(rank, sampling)} for rank in range(2)]
    grouped.models = grouped.models[:2]
    grouped.check()


def test_each_step_looks_at_the_load(checkpoint: Checkpoints, cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    looks = []

    class Governor:
        def __init__(self, cores: int, *torchs: Any) -> None:
            assert cores >= 1 and torchs == (torch.get_num_threads, torch.set_num_threads)

        @contextmanager
        def step(self) -> Iterator[None]:
            looks.append(1)
            yield

    monkeypatch.setattr("epslots.generation.engine.ThreadGovernor", Governor)
    model = epslots.load(checkpoint("qwen3_moe"), slots=4, dtype="float32", cache_dir=cache_dir)
    serve(model, requests_of(1))
    assert len(looks) >= requests_of(1)[0].max_new_tokens
