"""One query a request is attended by compiled loops on a CPU; or by torch, with a mask, so that heads share keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from epslots.generation.requests import Request
from epslots.generation.row_batcher import RowBatcher
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
