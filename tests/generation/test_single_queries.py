"""One query a request is attended by compiled loops on a CPU; or by torch, with a mask, so that heads share keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from epslots.generation import single_queries
from epslots.generation.attention_switch import depends_on_name
from epslots.generation.requests import Request
from epslots.generation.row_batcher import RowBatcher
from epslots.generation.single_queries import SingleQueries
from epslots.moe import query_attention
from tests.support import zoo
from tests.support.batches import Collected, generated, prompt_of


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("lengths", [(4, 4), (4, 7)])
def test_steps_attend_with_shared_keys(compiled: bool, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    model = zoo.ZOO["mixtral"].build()
    if not compiled:
        monkeypatch.setattr(query_attention, "fits", lambda *_: False)
    requests = [Request(str(number), prompt_of(length, seed=number), 9) for number, length in enumerate(lengths)]
    expected = {request.id: generated(model, request) for request in requests}
    batcher = RowBatcher(model, kv_tokens=64, max_requests=2)
    for request in requests:
        batcher.add(request)
    collected = Collected(batcher)
    while len(collected.tokens) < 2 or min(map(len, collected.tokens.values())) < 2:
        collected.run(1)
    seen, original = set(), F.scaled_dot_product_attention

    def note(query: torch.Tensor, key: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
        seen.add((query.shape[1] == key.shape[1], query.shape[2], settings.get("enable_gqa", False)))
        return original(query, key, *args, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    collected.run(2)
    heads = model.config.num_attention_heads // model.config.num_key_value_heads
    assert heads > 1 and seen == (set() if compiled else {(True, heads, False)})
    assert collected.run().tokens == expected
    assert model.config._attn_implementation == "sdpa"
    batcher.close()


class _Chooses(nn.Module):
    def forward(self, config: Any) -> Any:
        return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, None)


class _Compares(_Chooses):
    def mask(self, config: Any) -> bool:
        return config._attn_implementation in ("eager", "sdpa")


def test_modules_that_look_at_the_name_keep_it(monkeypatch: pytest.MonkeyPatch):
    """Indexers mask what they didn't select for "sdpa" alone: under another name all keys would be attended to."""
    assert depends_on_name(nn.ModuleList([_Chooses()])) is None
    assert depends_on_name(nn.ModuleList([_Chooses(), _Compares()])) == "_Compares"
    monkeypatch.setattr(single_queries, "paging_obstacle", lambda model: None)
    monkeypatch.setattr(single_queries, "row_width", lambda model: None)
    for name, active in (("qwen3_moe", True), ("glm_moe_dsa", False)):
        model = zoo.ZOO[name].build()
        with SingleQueries(model).active():
            assert (model.config._attn_implementation == "sdpa") != active
