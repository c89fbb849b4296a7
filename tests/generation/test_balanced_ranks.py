"""Ranks of a group compute chunks of about one length, and get the tokens that they get anyway."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import epslots
from epslots.generation import engine as engine_module
from epslots.generation.chunk_balance import balanced_chunk
from epslots.generation.chunk_size import ChunkSize
from epslots.generation.engine import Engine
from epslots.generation.engine_stats import EngineStats, sum_engines
from epslots.generation.requests import Request
from tests.support import zoo
from tests.support.batches import generated, prompt_of
from tests.support.rank_helpers import Rank, run_ranks

Checkpoints = Callable[[str], Path]

LENGTHS = ([240], [20, 21, 22, 23, 24, 25])
NEW = 1
"""Only prompts: a rank that decodes waits for others' chunks of any length."""


def requests_of(rank: int) -> list[Request]:
    return [Request(f"{rank}.{length}", prompt_of(length), NEW) for length in LENGTHS[rank]]


def serve_on_gloo(rank: Rank, folder: Path, cache_dir: Path) -> list[tuple[dict[str, list[int]], EngineStats]]:
    """Without balancing, and with it, in rows and in pages."""
    model = epslots.load(
        folder, slots=3, device="cpu", dtype="float32", progress=False, cache_dir=cache_dir, group=rank.transport()
    )
    ChunkSize._least_worth = lambda *_: 8  # type: ignore[method-assign]  # at any speed of this machine
    found = []
    for cache in ("rows", "pages"):
        for decide in (lambda _: None, balanced_chunk):
            engine_module.balanced_chunk = decide  # type: ignore[assignment]
            engine = Engine(model, kv_tokens=1024, max_batch_tokens=64, cache=cache, prefix_cache=False)
            tokens: dict[str, list[int]] = {request.id: [] for request in requests_of(rank.rank)}
            for request in requests_of(rank.rank):
                engine.batcher.add(request)
            for output in engine.run():
                tokens[output.id] += output.tokens
            found.append((tokens, engine.batcher.stats()))
            engine.batcher.close()
    return found


@pytest.mark.timeout(300)
def test_ranks_on_gloo_wait_less_for_each_other(checkpoint: Checkpoints, cache_dir: Path):
    """Tokens are what they are without; the ranks agree by what they exchange in any case."""
    folder = checkpoint("qwen3_moe")
    reference = zoo.reference(folder)
    expected = [{request.id: generated(reference, request) for request in requests_of(rank)} for rank in (0, 1)]
    results = run_ranks(serve_on_gloo, 2, folder, cache_dir, timeout=240)
    for rank, found in enumerate(results):
        assert [tokens for tokens, _ in found] == [expected[rank]] * 4
    engines = [sum_engines([found[case][1] for found in results]) for case in range(4)]
    computed = sum(map(sum, LENGTHS)) + sum(map(len, LENGTHS)) * (NEW - 1)
    assert [engine.step_tokens for engine in engines] == [computed] * 4
    rows, rows_balanced, pages, pages_balanced = (engine.step_skew for engine in engines)
    assert rows_balanced < rows and pages_balanced < pages
