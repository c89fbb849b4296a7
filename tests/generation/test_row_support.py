"""Models whose rows need more than pooled layers: each is named here, with the reason, and no other is."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from epslots.errors import UnsupportedModelError
from epslots.generation.requests import Request
from epslots.generation.row_attention import LayerOfRows, RowByRow
from epslots.generation.row_batcher import RowBatcher
from epslots.generation.row_cache import RowCache
from epslots.generation.row_layers import can_be_pooled
from epslots.generation.row_support import row_support
from epslots.models.batch_invariance import make_batch_invariant
from epslots.models.measure_shape import measure_cache
from tests.support import zoo
from tests.support.batches import finish, generated, prompt_of

MODELS = {**zoo.ZOO, **zoo.STRESSED}
BY_ROW = {
    "deepseek_v4": "its compressors close windows at each row's own phase",
    "minimax_m3": "blocks of keys are counted from the cache's first place",
    "llama4": "a temperature follows the cache's length",
    "llama4_nope": "a temperature follows the cache's length",
    "inkling": "queries are scaled by the cache's length",
}
MIXED = {"doge": "the tokens of a pass choose experts for one another"}
OF_THE_CACHE = {"minimax": "the cache itself keeps the states of linear attention"}
WHOLE_PROMPTS = {"jamba": "a scan begins anew with every chunk"} | MIXED
"""And models with rotary embeddings that depend on the longest position; the zoo has none, ``test_positions.py`` some."""


@pytest.mark.parametrize("name", sorted(MODELS))
def test_only_these_models_are_computed_otherwise(name: str):
    model = MODELS[name].build()
    support = row_support(model)
    assert (support.capture_obstacle(measure_cache(model)) is None) == (name not in BY_ROW | MIXED | OF_THE_CACHE)
    assert bool(support.by_row) == (name in BY_ROW)
    assert support.whole_prompts == (name in WHOLE_PROMPTS)
    assert support.replays == (not support.together) == (name in MIXED)
    assert not support.rotaries
    assert support.shares_prefixes == (name not in WHOLE_PROMPTS)


class KeepsMore(DynamicLayer):
    """A layer of an unknown class."""


def test_a_subclass_is_not_taken_for_its_parent():
    assert can_be_pooled(DynamicLayer()) and not can_be_pooled(KeepsMore())


def test_unknown_layers_without_attention_are_refused(monkeypatch: pytest.MonkeyPatch):
    model = zoo.ZOO["mixtral"].build()
    monkeypatch.setattr("epslots.generation.row_support.can_be_pooled", lambda _: False)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = 7
    with pytest.raises(UnsupportedModelError, match="no module of layer 0 takes a cache"):
        row_support(model)


@pytest.mark.parametrize("name", ["deepseek_v4", "mixtral"])
def test_a_model_is_its_own_outside_of_a_pass(name: str):
    """Within one, too, for calls that have another cache."""
    model = MODELS[name].build()
    ids = zoo.random_ids(1, 9)
    with torch.no_grad():
        before = model(ids).logits
        support = row_support(model)
        by_row = RowByRow(support.modules, support.rotaries, model.device)
        with by_row.active():
            assert torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


def opened(model: PreTrainedModel, **sizes: int) -> RowCache:
    by_row = row_support(model).by_row
    return RowCache(
        model, measure_cache(model), **{"kv_tokens": 64, "max_requests": 3, "in_flight": 64, **sizes}, by_row=by_row
    )


def test_rows_share_cells_until_both_are_gone():
    cache = opened(zoo.ZOO["mixtral"].build())
    first = cache.open()
    with cache.step([first], 20) as step:
        step.commit()
    second = cache.copy(first, 16)
    assert (cache.free_tokens, cache.free_rows, second.length) == (44, 1, 16)
    cache.close(first)
    assert cache.free_tokens == 48
    cache.close(second)
    assert (cache.free_tokens, cache.free_rows) == (64, 3)
    cache.check()


def test_a_step_without_commit_leaves_no_trace():
    cache = opened(zoo.ZOO["qwen3_next"].build())
    row = cache.open()
    with pytest.raises(ZeroDivisionError), cache.step([row], 5):
        raise ZeroDivisionError
    assert (row.length, cache.free_tokens) == (0, 64)
    cache.check()


def test_contract_a_recurrence_gives_its_whole_new_state():
    """A pooled layer keeps what it is given, where transformers copies it into the tensor that it has."""
    layer, state = LinearAttentionLayer(), torch.ones(2, 3)
    kept = layer.update_recurrent_state(state, 0)
    assert torch.equal(kept, state) and kept is not state
    assert layer.update_recurrent_state(2 * state) is kept and torch.equal(layer.recurrent_states[0], 2 * state)
    assert layer.is_recurrent_states_initialized == {0: True}


def test_masks_are_made_for_the_longest_of_apart_rows():
    one, other = DynamicLayer(), DynamicLayer()
    one.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    assert LayerOfRows([other, one]).get_mask_sizes(2) == (5, 0)


def test_a_batch_invariant_prompt_has_room_in_windows():
    """It is computed in one pass, however long; windows have cells for all of it."""
    model = MODELS["mimo_v2_flash"].build()
    make_batch_invariant(model)
    batcher = RowBatcher(model, kv_tokens=200, max_requests=2, max_batch_tokens=16)
    requests = [Request("long", prompt_of(120), 4), Request("short", prompt_of(9), 4)]
    assert finish(batcher, requests).tokens == {request.id: generated(model, request) for request in requests}
    batcher.close()
