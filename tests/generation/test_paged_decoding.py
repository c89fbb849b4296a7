"""Steps over pages attend request by request: the packed attention's results, without the packed batch's waste."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.utils import build_attention_mask
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from epslots.generation import paged_cache, paged_decoding
from epslots.generation.paged_batcher import PagedBatcher
from epslots.generation.paged_decoding import _aligned_here
from epslots.generation.paged_prompts import PromptReads
from epslots.generation.requests import Request
from epslots.moe import query_attention
from tests.support import zoo
from tests.support.batches import Collected, generated, prompt_of, requests_of

# All tokens; windows among them, of two head sizes; keys wider than values, in flat rows.
KINDS = ("mixtral", "gemma4", "deepseek_v3")
SIZES = ((3, 20), (41, 20), (9, 20))


class Attention:
    """Notes what torch's attention is computed of: the shapes of queries and keys, and whether there is a mask."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: set[tuple[tuple[int, ...], tuple[int, ...], bool]] = set()
        patch.setattr(query_attention, "fits", lambda *_: False)
        self._attend = F.scaled_dot_product_attention
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", self)

    def __call__(self, query: torch.Tensor, key: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
        shapes = (query.shape[0], query.shape[2]), (key.shape[0], key.shape[2])
        self.calls.add((*shapes, settings.get("attn_mask") is not None))
        return self._attend(query, key, *args, **settings)


def decoding(model: PreTrainedModel, requests: list[Request], **given: Any) -> tuple[PagedBatcher, Collected]:
    """A batcher whose requests have all got their first token."""
    settings: dict[str, Any] = {"kv_tokens": 256, "max_requests": 4} | given
    batcher = PagedBatcher(model, **settings)
    for request in requests:
        batcher.add(request)
    collected = Collected(batcher)
    while len(collected.tokens) < len(requests):
        collected.run(1)
    return batcher, collected


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_packed_steps(name: str, monkeypatch: pytest.MonkeyPatch):
    model, requests = zoo.ZOO[name].build(), requests_of(SIZES)
    found: list[list[torch.Tensor]] = []
    for packed in (False, True):
        if packed:
            for module in (paged_cache, paged_decoding):
                monkeypatch.setattr(module, "reads_by_request", lambda model: False)
        batcher, collected = decoding(model, requests)
        assert (batcher.processor.inputs_and_outputs.attention_mask is not None) == packed
        logits: list[torch.Tensor] = []
        hook = model.get_output_embeddings().register_forward_hook(lambda _, __, out, kept=logits: kept.append(out.clone()))
        collected.run(8)
        hook.remove()
        found.append(logits)
        batcher.close()
    assert len(found[0]) == len(found[1]) == 8
    for aligned, packed_ in zip(*found, strict=True):
        assert float((aligned - packed_).abs().max() / packed_.abs().max()) < 2e-5


def test_a_step_that_decodes_has_a_row_for_each_request(monkeypatch: pytest.MonkeyPatch):
    """And none for a token of another one. In a step with a prompt, this has a product of its own."""
    model = zoo.ZOO["mixtral"].build()
    requests, late = requests_of(SIZES), Request("late", prompt_of(5), 2)
    expected = {request.id: generated(model, request) for request in (*requests, late)}
    attention = Attention(monkeypatch)
    batcher, collected = decoding(model, requests)
    attention.calls.clear()
    longest = max(len(request.prompt) + len(collected.tokens[request.id]) for request in requests)
    collected.run(1)
    assert {call[1:] for call in attention.calls} == {((3, longest), True)}
    assert {call[0][0] for call in attention.calls} == {3}
    batcher.add(late)
    attention.calls.clear()
    collected.run(1)
    assert attention.calls == {((1, 5), (1, 5), False), ((3, 2), (3, longest + 1), True)}  # two heads share keys
    assert batcher._isolation is None, "no part of it was repeated: masks are made where they are needed"
    assert collected.run().tokens == expected
    batcher.close()
    batcher, collected = decoding(model, [replace(request, prompt=prompt_of(9)) for request in requests], prefix_cache=False)
    attention.calls.clear()
    collected.run(1)
    assert {call[1:] for call in attention.calls} == {((3, 10), True)}  # of ones: heads that share keys read them once
    batcher.close()


def test_a_long_request_beside_short_ones_is_read_alone(monkeypatch: pytest.MonkeyPatch):
    """Rows of its length would take more room than all of the cache has tokens."""
    model = zoo.ZOO["mixtral"].build()
    requests = [Request("long", prompt_of(180), 6), *requests_of(((3, 9), (4, 9), (5, 9)))]
    expected = {request.id: generated(model, request) for request in requests}
    attention = Attention(monkeypatch)
    batcher, collected = decoding(model, requests, max_batch_tokens=32)
    attention.calls.clear()
    collected.run(1)
    assert {call[0] for call in attention.calls} == {(1, 2)}
    assert collected.run().tokens == expected
    batcher.close()


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("room", [0, 1000])
@pytest.mark.parametrize("rows", [2, 256])
def test_prompts_attend_as_transformers_mask_says(window: int | None, room: int, rows: int):
    """Prompts from their start and chunks of them between requests that decode; without room, each of these alone.

    Chunks attend some rows at a time.
    """
    queries, past = (1, 6, 3, 1, 1, 4), (0, 0, 5, 9, 2, 3)
    keys = [new + (old if window is None else min(old, window - 1)) for new, old in zip(queries, past, strict=True)]
    query, key, value = (torch.randn(1, heads, count, 8) for heads, count in ((4, 16), (2, sum(keys)), (2, sum(keys))))
    mask = torch.full((1, 1, 16, sum(keys)), torch.finfo(torch.float32).min)
    ends = [[0, *itertools.accumulate(counts)] for counts in (queries, keys)]
    build_attention_mask(mask, *ends, 1 if window is None else window)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    expected = sdpa_attention_forward(module, query, key, value, mask)[0]
    key[:, :, ends[1][3] : ends[1][4]] = value[:, :, ends[1][3] : ends[1][4]] = torch.nan  # of one that decodes
    found = PromptReads(queries, keys, window, room, torch.empty(rows, 9)).attend(module, query, key, value, is_causal=True)
    others = torch.arange(16) != ends[0][3]
    torch.testing.assert_close(found[:, others], expected[:, others])
    assert found[:, ends[0][3]].isnan().all()


def test_between_steps_the_model_is_as_it_was():
    model = zoo.ZOO["gemma4"].build()
    ids = zoo.random_ids(2, 9)
    with torch.no_grad():
        before = model(ids).logits
        batcher, _ = decoding(model, requests_of(SIZES))
        assert batcher.prepare()
        assert torch.equal(model(ids).logits, before)
    batcher.close()


@pytest.mark.parametrize("lengths", [[3, 3], [1, 5, 2], [4], [7, 1]])
def test_reads_end_with_each_requests_last_position(lengths: list[int]):
    index = torch.arange(100, 100 + sum(lengths) + 9)
    rows, taken, longest = [], iter(range(100, 200)), max(lengths)
    for length in lengths:
        rows.append([0] * (longest - length) + [next(taken) for _ in range(length)])
    found = _aligned_here(index, torch.tensor(lengths).numpy())
    assert found.cells.view(len(lengths), -1).tolist() == rows
    if len(set(lengths)) == 1:
        assert found.mask_R11S is None
    else:
        assert found.mask_R11S is not None
        assert found.mask_R11S[:, 0, 0].tolist() == [[place > 0 for place in row] for row in rows]


def test_contract_place_0_of_a_cache_stays_empty():
    """Shorter requests read it before their first position. No request gets it, and nothing is written there."""
    model = zoo.ZOO["gemma4"].build()
    batcher, collected = decoding(model, requests_of(SIZES))
    collected.run()
    for layer, allocator in batcher.processor.cache.layer_to_allocator.items():
        keys, values = allocator._kv_token_views[layer]
        assert allocator.read_trash_index == 0 and not keys[0].any() and not values[0].any()
    batcher.close()


def test_contract_a_batch_without_masks_can_be_prepared():
    """transformers makes none for attention functions that it doesn't know, and passes none on."""
    batcher = PagedBatcher(zoo.ZOO["mixtral"].build(), kv_tokens=64, max_batch_tokens=16)
    batch = batcher.processor.inputs_and_outputs
    assert list(inspect.signature(type(batch).prepare_batch_tensors).parameters) == [
        *("self", "requests_in_batch", "logits_processors", "use_decode_fast_path"),
        *("num_q_tokens", "max_kv_read", "use_padding"),
    ]
    assert batch.attention_mask is None and batch.get_model_kwargs()["attention_mask"] is None
    batcher.close()
