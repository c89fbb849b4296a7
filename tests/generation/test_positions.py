"""Models whose positions depend on a sequence's length give the tokens of generate, after and beside any other requests."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from epslots.errors import PeerLost, UnsupportedModelError
from epslots.generation.batcher import Batcher
from epslots.generation.batchers import batcher_for
from epslots.generation.paged_batcher import PagedBatcher
from epslots.generation.paged_cache import paging_obstacle
from epslots.generation.requests import Request
from epslots.generation.row_batcher import RowBatcher
from epslots.models.batch_invariance import make_batch_invariant
from tests.support import zoo
from tests.support.batches import Collected, Faults, finish, generated, prompt_of
from tests.support.guilty_requests import WAYS, Guilt

BORDER = 64
USUAL: dict[str, Any] = {"rope_theta": 10000.0}
LONG = {
    **USUAL,
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0 + i for i in range(8)],
    "original_max_position_embeddings": BORDER,
}
DYNAMIC = {**USUAL, "rope_type": "dynamic", "factor": 4.0}
# By architecture: settings by which angles depend on the longest sequence.
DEPENDENT: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope, two scales": ("phimoe", {"rope_parameters": {**LONG, "short_mscale": 1.1, "long_mscale": 1.3}}),
    "longrope, computed anew": (
        "phimoe",
        {
            "rope_parameters": {**LONG, "short_mscale": 1.1, "long_mscale": 1.3},
            "original_max_position_embeddings": BORDER,
        },
    ),
    "longrope": ("qwen3_moe", {"rope_parameters": {**LONG, "factor": 8.0}}),
    "dynamic": ("mixtral", {"rope_parameters": DYNAMIC, "max_position_embeddings": BORDER, "head_dim": 16}),
    "dynamic in some layers": (
        "gemma4",
        {
            "rope_parameters": {"full_attention": {**USUAL, "rope_type": "default"}, "sliding_attention": DYNAMIC},
            "max_position_embeddings": BORDER,
        },
    ),
}
FIXED: dict[str, dict[str, Any]] = {
    "default": USUAL,
    "linear": {**USUAL, "rope_type": "linear", "factor": 4.0},
    "yarn": {**USUAL, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": BORDER},
    "llama3": {
        **USUAL,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": BORDER,
    },
}


def build(kind: str) -> PreTrainedModel:
    name, settings = DEPENDENT[kind]
    tiny = zoo.ZOO[name]
    return replace(tiny, settings={**tiny.settings, **settings}).build()


# Short, long, and one that crosses the border while it is decoded; long before short, and twice.
SIZES = {"short": (20, 6), "long": (100, 6), "crossing": (58, 20), "longer": (150, 4), "again": (100, 6), "late": (21, 6)}
REQUESTS = [Request(id, prompt_of(length), new) for id, (length, new) in SIZES.items()]


@pytest.fixture(scope="module", params=DEPENDENT)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(kind: str) -> dict[str, list[int]]:
    """Of models that have seen nothing else."""
    return {request.id: generated(build(kind), request) for request in REQUESTS}


def test_they_are_not_paged(kind: str, caplog: pytest.LogCaptureFixture):
    model = build(kind)
    with caplog.at_level(logging.INFO, "epslots.generation.batchers"):
        assert isinstance(batcher_for(model, kv_tokens=256), RowBatcher)
    assert "because its rotary embedding depends on the longest sequence of a batch" in caplog.text
    with pytest.raises(UnsupportedModelError, match="rotary embedding"):
        PagedBatcher(model, kv_tokens=256)


@pytest.mark.parametrize("order", [1, -1])
def test_no_request_notices_what_was_served_before(kind: str, order: int, expected: dict[str, list[int]]):
    batcher = batcher_for(build(kind), kv_tokens=256)
    assert finish(batcher, REQUESTS[::order]).tokens == expected


def test_a_sequence_is_computed_anew_where_generate_does_so():
    """At the border, once. Tokens hardly tell: a tiny model's don't change with the angles of its earliest ones."""
    model, crossing, passes = build("longrope, computed anew"), REQUESTS[2], list[int]()
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].shape[1]))
    tokens = generated(model, crossing)
    by_generate = passes.copy()
    passes.clear()
    assert finish(batcher_for(model, kv_tokens=256), [crossing]).tokens == {crossing.id: tokens}
    assert passes == by_generate and passes.count(BORDER + 1) == 1
    moved = [(done, crossing.after(tokens[:done])) for done in (3, 12)]
    for done, request in moved:  # before the border, and behind it: what was computed one by one is so again
        passes.clear()
        assert finish(batcher_for(model, kv_tokens=256), [request]).tokens == {crossing.id: tokens[done:]}
        assert passes == (by_generate if done == 3 else [BORDER + 1, *by_generate[by_generate.index(BORDER + 1) + 1 :]])
    hook.remove()


def test_a_batch_invariant_model_computes_its_angles_too(kind: str, expected: dict[str, list[int]]):
    model = build(kind)
    make_batch_invariant(model)
    assert finish(batcher_for(model, kv_tokens=256), REQUESTS[::-1]).tokens == expected


def test_steps_that_are_made_again_change_nothing(kind: str, expected: dict[str, list[int]]):
    """Keys that were computed before the border was crossed keep their angles, though all are computed anew."""
    model = build(kind)
    batcher, crossing = batcher_for(model, kv_tokens=256), REQUESTS[2]
    batcher.add(crossing)
    collected = Collected(batcher).run(12)
    faults = Faults(model)
    assert batcher.prepare()
    for _ in range(2):
        with pytest.raises(PeerLost):
            batcher.step()
    faults.remove()
    assert collected.run().tokens["crossing"] == expected["crossing"]


def test_another_batcher_goes_on_alike(kind: str, expected: dict[str, list[int]]):
    crossing = REQUESTS[2]
    done: list[int] = []
    for steps in (3, 9, 100):
        batcher: Batcher = batcher_for(build(kind), kv_tokens=256)
        batcher.add(crossing.after(done))
        collected = Collected(batcher)
        while batcher.has_work and len(collected.tokens.get("crossing", ())) < steps:
            collected.run(1)
        done += collected.tokens["crossing"]
    assert done == expected["crossing"]


@pytest.mark.parametrize("way", ["nan", "RuntimeError"])
def test_a_request_that_fails_at_a_later_token_ends(kind: str, way: str, expected: dict[str, list[int]]):
    """Its tokens are computed again one by one, on the way to the second attempt at the one that failed."""
    model, guilty = build(kind), next(request for request in REQUESTS if request.id == "crossing")
    tokens = expected[guilty.id]
    at = next(i for i in range(3, len(tokens)) if tokens[i] not in (*guilty.prompt, *tokens[:i]))
    batcher = RowBatcher(model, kv_tokens=256)
    guilt = Guilt(model, tokens[at], 0, WAYS[way]())
    batcher.add(guilty)
    steps, outputs = 0, []
    while batcher.prepare():
        assert (steps := steps + 1) < 100, "it is tried for ever"
        batcher.step()
        outputs += batcher.outputs()
    guilt.remove()
    assert [token for output in outputs for token in output.tokens] == tokens[: at + 1]
    # A row that isn't finite has touched no other, and ends at once; another failure is tried twice.
    assert outputs[-1].reason == "error" and guilt.fell == (1 if way == "nan" else 2)
    batcher.add(REQUESTS[0])
    assert finish(batcher, []).tokens == {REQUESTS[0].id: expected[REQUESTS[0].id]}


def test_a_request_that_was_moved_twice_knows_its_own_prompt():
    request = Request("a", (20, 21, 22), 9)
    moved = request.after([30, 31]).after([32])
    assert (moved.prompt, moved.max_new_tokens, moved.resumed) == ((20, 21, 22, 30, 31, 32), 6, 3)


@pytest.mark.parametrize("rope", FIXED)
def test_positions_that_stand_for_themselves_are_paged(rope: str):
    tiny = zoo.ZOO["qwen3_moe"]
    model = replace(tiny, settings={**tiny.settings, "rope_parameters": FIXED[rope]}).build()
    assert paging_obstacle(model) is None
    requests = REQUESTS[:3]
    batcher = batcher_for(model, kv_tokens=512, max_batch_tokens=32)
    assert finish(batcher, requests).tokens == {request.id: generated(model, request) for request in requests}
    batcher.close()


def test_a_rotary_embedding_of_another_make_is_asked_too():
    """By what it answers, not by its name or its configuration."""
    model = zoo.ZOO["mixtral"].build()
    plain = type(model.model.rotary_emb)

    class Shrinking(plain):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(x, position_ids.float() / position_ids.max().clamp(min=100) * 100)

    assert paging_obstacle(model) is None
    model.model.rotary_emb.__class__ = Shrinking
    assert "rotary" in (paging_obstacle(model) or "")
