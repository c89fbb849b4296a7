"""A request that the model fails with on one of several ranks costs no other rank anything: no epoch, no token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import epslots
from epslots.errors import GroupError, PeerLost, StepFailed
from epslots.generation.engine import Engine
from epslots.generation.requests import Request
from epslots.group.join import join
from epslots.group.rank_group import group_of
from epslots.runtime import runtime_of
from epslots.transport.local_transport import LocalHub, LocalTransport
from tests.support import zoo
from tests.support.batches import generated, requests_of
from tests.support.grouped_ranks import ALL_COSTS, TOKENS_TRAVEL, Grouped
from tests.support.guilty_requests import WAYS, Guilt, error_of, guilty_requests, unused
from tests.support.rank_helpers import Rank, run_ranks, run_threads

Checkpoints = Callable[[str], Path]
Served = tuple[dict[str, list[int]], dict[str, str], int]


def mates_of(rank: int) -> list[Request]:
    sizes = [((3, 12), (60, 4), (17, 7)), ((9, 15), (20, 3)), ()][rank]
    return [replace(request, id=f"{rank}.{request.id}") for request in requests_of(sizes, seed=2 + rank)]


class Job:
    """Mates for every rank and guilty requests for the first, with what plain transformers makes of the mates."""

    def __init__(self, folder: Path, ranks: int) -> None:
        reference = zoo.reference(folder)
        self.mates = [mates_of(rank) for rank in range(ranks)]
        everyone = [request for mates in self.mates for request in mates]
        self.expected = {request.id: generated(reference, request) for request in everyone}
        self.token = unused(everyone, self.expected)
        self.guilty = guilty_requests(self.token, (5, 40))

    def requests(self, rank: int) -> list[Request]:
        mates = self.mates[rank]
        return mates if rank else [mates[0], self.guilty[0], *mates[1:], self.guilty[1]]

    def check(self, results: list[Served], error: str) -> None:
        for rank, (tokens, errors, _) in enumerate(results):
            assert {r.id: tokens[r.id] for r in self.mates[rank]} == {r.id: self.expected[r.id] for r in self.mates[rank]}
            assert errors.keys() == (set() if rank else {"guilty0", "guilty1"})
            assert all(error in said for said in errors.values())


def serve(model: PreTrainedModel, requests: list[Request], regroup: Callable[[], object] | None = None) -> Served:
    """Tokens and errors of a rank's requests, and how many steps it made in its last group; no loss, without ``regroup``."""
    engine = Engine(model, kv_tokens=512, max_batch_tokens=24)
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    errors: dict[str, str] = {}
    for request in requests:
        engine.batcher.add(request)
    group = group_of(model)
    assert group is not None
    before, steps, going = group.lockstep.steps, 0, True
    while going:
        try:
            going = engine.step().work
            steps += 1
        except GroupError:
            if regroup is None:
                raise
            regroup()
            before, steps = 0, 0
        for output in engine.batcher.outputs():
            tokens[output.id] += output.tokens
            if output.reason == "error":
                errors[output.id] = output.error or ""
    group = group_of(model)  # perhaps another
    assert group is not None and group.lockstep.steps == before + steps, "a step of the batcher is one of the group"
    engine.batcher.close()
    return tokens, errors, steps


@pytest.mark.parametrize(
    ("name", "costs", "way"),
    [
        ("qwen3_moe", "tokens travel", "nan"),
        ("qwen3_moe", "copies travel", "RuntimeError"),
        ("mixtral", "gather", "inf"),
        ("mixtral", "nothing travels", "IndexError"),
        ("qwen3_next", "copies travel", "nan"),
        ("qwen3_next", "work spreads", "OutOfMemoryError"),
    ],
)
def test_other_ranks_notice_nothing(name: str, costs: str, way: str, checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint(name)
    job = Job(folder, 3)
    grouped = Grouped(folder, cache_dir, [3, "50%", 2], ALL_COSTS[costs])
    guilt = Guilt(grouped.models[0], job.token, 0, WAYS[way]())
    results = run_threads(lambda t: serve(grouped.models[t.rank], job.requests(t.rank)), 3, hub=grouped.hub)
    job.check(results, error_of(way))
    assert guilt.fell
    assert len({steps for _, _, steps in results}) == 1
    grouped.check()


@pytest.mark.parametrize("where", ["before the step", "in a router", "in the head"])
def test_it_may_fail_anywhere_between_exchanges(where: str, checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    job = Job(folder, 2)
    grouped = Grouped(folder, cache_dir, [3, 2])
    model: Any = grouped.models[0]
    guilt = Guilt(model, job.token, 0, 1.0)
    seen: list[torch.Tensor] = []
    module = {"before the step": model, "in a router": model.model.layers[1].mlp.gate, "in the head": model.lm_head}[where]

    def fail(_module: Any, _inputs: Any, named: dict[str, Any]) -> None:
        if where == "before the step":
            seen[:] = [named["input_ids"]]
        if (seen[0] == job.token).any() if seen else guilt._rows_T.any():
            raise RuntimeError("no such shape")

    module.register_forward_pre_hook(fail, with_kwargs=True)
    results = run_threads(lambda t: serve(grouped.models[t.rank], job.requests(t.rank)), 2, hub=grouped.hub)
    job.check(results, "RuntimeError: no such shape")
    assert len({steps for _, _, steps in results}) == 1
    grouped.check()


@pytest.mark.parametrize("where", ["schedule", "fetch", "execute"])
def test_a_failure_between_two_exchanges_breaks_groups_twice(where: str, checkpoint: Checkpoints, cache_dir: Path):
    """The others wait for a result that never comes. Once for each guilty request's batch, and once for itself alone.

    Memory may run out before anything is computed, too: a batch that is too large for an exchange says nothing of the rank.
    """
    folder = checkpoint("qwen3_moe")
    job = Job(folder, 2)
    grouped = Grouped(folder, cache_dir, [3, 2])
    model = grouped.models[0]
    guilt = Guilt(model, job.token, 0, 1.0)
    runner = runtime_of(model).runners[1]
    experts = runner.experts if where == "execute" else runner.cache
    work_there = getattr(experts, where)

    def fail(*arguments: Any, **settings: Any) -> Any:
        if guilt._rows_T.any():
            raise torch.OutOfMemoryError("no memory is left")
        return work_there(*arguments, **settings)

    setattr(experts, where, fail)
    hubs = [grouped.hub] + [LocalHub(2, epoch=number, deadline_s=60) for number in range(1, 5)]
    broke = [0, 0]

    def work(transport: LocalTransport) -> Served:
        rank = transport.rank

        def regroup() -> None:
            broke[rank] += 1
            join(grouped.models[rank], hubs[broke[rank]].transport(rank), settings={}, costs=TOKENS_TRAVEL)

        return serve(grouped.models[rank], job.requests(rank), regroup)

    results = run_threads(work, 2, hub=grouped.hub)
    job.check(results, "OutOfMemoryError: no memory is left")
    assert broke == [4, 4]
    grouped.hub = hubs[4]
    grouped.check()


def test_a_rank_that_breaks_every_group_gives_up(checkpoint: Checkpoints, cache_dir: Path):
    """Then it isn't a request's fault, and the error is the rank's own."""
    grouped = Grouped(checkpoint("qwen3_moe"), cache_dir, [3])
    model = grouped.models[0]
    experts = runtime_of(model).runners[1].experts

    def fail(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory is left")

    experts.execute = fail  # type: ignore[method-assign]
    engine = Engine(model, kv_tokens=512)
    for request in requests_of(((3, 4),) * 6):
        engine.batcher.add(request)
    for number in range(1, 4):
        with pytest.raises(StepFailed, match="OutOfMemoryError"):
            engine.step()
        run_threads(lambda t: join(model, t, costs=TOKENS_TRAVEL), 1, hub=LocalHub(1, epoch=number))
    assert len([output for output in engine.batcher.outputs() if output.reason == "error"]) == 2
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()


def test_callers_of_the_model_itself_end_the_step_of_all(checkpoint: Checkpoints, cache_dir: Path):
    """They may make no further step, so no rank may wait for one."""
    grouped = Grouped(checkpoint("qwen3_moe"), cache_dir, [3, 2])
    Guilt(grouped.models[0], 20, 0, ZeroDivisionError("x"))

    def work(transport: LocalTransport) -> type[BaseException]:
        with pytest.raises((ZeroDivisionError, PeerLost)) as caught:
            grouped.models[transport.rank](input_ids=torch.tensor([[20, 21]]))
        return caught.type

    assert run_threads(work, 2, hub=grouped.hub) == [ZeroDivisionError, PeerLost]


def serve_on_gloo(rank: Rank, job: Job, folder: Path, cache_dir: Path, ways: list[str]) -> list[Served]:
    model = epslots.load(
        folder, slots=3, device="cpu", dtype="float32", progress=False, cache_dir=cache_dir, group=rank.transport()
    )
    found = []
    for way in ways:
        guilt = Guilt(model, job.token, 0, WAYS[way]() if rank.rank == 0 else 1.0)
        found.append(serve(model, job.requests(rank.rank)))
        guilt.remove()
    return found


@pytest.mark.timeout(300)
def test_on_gloo(checkpoint: Checkpoints, cache_dir: Path):
    folder = checkpoint("qwen3_moe")
    job, ways = Job(folder, 2), ["nan", "RuntimeError"]
    results = run_ranks(serve_on_gloo, 2, job, folder, cache_dir, ways, timeout=240)
    for number, way in enumerate(ways):
        job.check([found[number] for found in results], error_of(way))
