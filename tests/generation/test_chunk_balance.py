"""A group's ranks compute chunks of about one length, where they have prompts; tokens are what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

import epslots
from epslots.generation import engine as engine_module
from epslots.generation.chunk_balance import MOST_IMBALANCE, balanced_chunk
from epslots.generation.chunk_size import LEAST_PACE, ChunkSize
from epslots.generation.engine import Engine
from epslots.generation.engine_stats import EngineStats, sum_engines
from epslots.generation.requests import Request
from epslots.generation.row_plan import RowState, following_prompt_tokens, next_batch
from tests.support import zoo
from tests.support.batches import generated, prompt_of
from tests.support.rank_helpers import Rank, run_ranks

Checkpoints = Callable[[str], Path]


def imbalance(waiting: list[int], chunk: int) -> float:
    """Of the ranks that have prompts."""
    chunks = [min(tokens, chunk) for tokens in waiting if tokens]
    return max(chunks) / mean(chunks)


@given(st.lists(st.integers(0, 600), max_size=12))
def test_the_longest_balanced_chunk_is_chosen(waiting: list[int]):
    """Longer ones aren't balanced; ranks without a prompt count for nothing, and their order neither."""
    chunk = balanced_chunk(waiting)
    longest = max(waiting, default=0)
    if chunk is None:
        assert not longest or imbalance(waiting, longest) <= MOST_IMBALANCE * (1 + 1e-9)
    else:
        assert 0 < chunk < longest
        assert imbalance(waiting, chunk) <= MOST_IMBALANCE * (1 + 1e-9)
        assert imbalance(waiting, chunk + 1) > MOST_IMBALANCE * (1 - 1e-9)
    assert balanced_chunk(sorted(waiting)) == balanced_chunk([0, *reversed(waiting)]) == chunk


@pytest.mark.parametrize(
    ("waiting", "chunk"),
    [((), None), ((0, 0), None), ((512,), None), ((512, 512), None), ((512, 88), 146), ((512, 0, 88), 146)],
)
def test_chunks_of_some_groups(waiting: tuple[int, ...], chunk: int | None):
    assert balanced_chunk(waiting) == chunk


@given(fixed=st.floats(1e-3, 0.1), per_token=st.floats(1e-5, 1e-2), balanced=st.integers(1, 600))
def test_a_long_prompt_keeps_half_its_pace(fixed: float, per_token: float, balanced: int):
    """However short the others' are: steps would consist of their fixed costs."""
    size = ChunkSize(512, None)
    assert size.prompt_tokens(0, balanced) == 512, "nothing was timed"
    for tokens in (512, 300, 100, 0, 512):
        size.observe(tokens, 0, fixed + per_token * tokens)
    chunk = size.prompt_tokens(0, balanced)
    assert min(balanced, 512) <= chunk <= size.prompt_tokens(0) == 512
    full = 512 / (fixed + per_token * 512)
    assert (chunk + 1) / (fixed + per_token * (chunk + 1)) >= min(LEAST_PACE / per_token, full) * (1 - 1e-3)


@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(0, 89)), min_size=1, max_size=6),
    st.integers(1, 64),
)
def test_the_next_prompts_are_foreseen(rows: list[tuple[int, int]], room: int):
    """As the batch after this one will be, if its prompts are continued."""
    states = [RowState(known, min(computed, known - 1)) for known, computed in rows]
    batch = next_batch(states, room, prompt_was_last=False)
    assert batch is not None
    foreseen = following_prompt_tokens(states, batch, room)
    after = [
        RowState(state.known + (state.left == batch.width), state.computed + batch.width) if i in batch.rows else state
        for i, state in enumerate(states)
    ]
    following = next_batch(after, room, prompt_was_last=False)
    assert following is not None
    assert foreseen == (0 if following.decodes else len(following.rows) * following.width)


LENGTHS = ([240], [20, 21, 22, 23, 24, 25])
NEW = 3


def requests_of(rank: int) -> list[Request]:
    return [Request(f"{rank}.{length}", prompt_of(length), NEW) for length in LENGTHS[rank]]


def serve_on_gloo(rank: Rank, folder: Path, cache_dir: Path) -> list[tuple[dict[str, list[int]], EngineStats]]:
    """Without balancing, and with it, in rows and in pages."""
    model = epslots.load(
        folder, slots=3, device="cpu", dtype="float32", progress=False, cache_dir=cache_dir, group=rank.transport()
    )
    ChunkSize._least_worth = lambda *_: 8  # type: ignore[method-assign]  # whatever this machine's steps take
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
    assert [stats.longest_tokens for _, stats in results[0]] == [stats.longest_tokens for _, stats in results[1]]
    engines = [sum_engines([found[case][1] for found in results]) for case in range(4)]
    computed = sum(map(sum, LENGTHS)) + sum(map(len, LENGTHS)) * (NEW - 1)
    assert [engine.step_tokens for engine in engines] == [computed] * 4
    rows, rows_balanced, pages, pages_balanced = (engine.imbalance for engine in engines)
    assert rows_balanced < rows and pages_balanced < pages
