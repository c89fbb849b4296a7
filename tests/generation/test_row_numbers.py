"""A token whose numbers become NaN in some layer: no other row meets them, and no text is made of them."""

from __future__ import annotations

import math

import pytest

from epslots.generation.requests import Request
from epslots.generation.row_batcher import RowBatcher
from tests.support import zoo
from tests.support.batches import generated, prompt_of, requests_of
from tests.support.guilty_requests import Guilt, unused

# Layers of glm_moe_dsa: two choose the tokens that they attend to, and the last one attends to the choice of the second.
CASES = [*(("glm_moe_dsa", layer) for layer in range(3)), ("hy_v4", 0), ("qwen3_next", 0), ("mimo_v2_flash", 0), ("zaya", 0)]
UNREAD = {("glm_moe_dsa", 1), ("glm_moe_dsa", 2), ("hy_v4", 0)}
"""Cases in which no later token attends to it. Where a later layer chooses anew, NaN counts as the largest score."""


def collected(batcher: RowBatcher, requests: list[Request]) -> tuple[dict[str, list[int]], dict[str, str | None]]:
    tokens, errors = {request.id: list[int]() for request in requests}, dict[str, str | None]()
    for request in requests:
        batcher.add(request)
    while batcher.prepare():
        batcher.step()
        for output in batcher.outputs():
            tokens[output.id] += output.tokens
            if output.reason == "error":
                errors[output.id] = output.error
    return tokens, errors


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_nan_is_an_error_or_is_never_read(name: str, layer: int):
    """The prompt's first chunk has the token; its last chunk is a single one, which may leave the token out.

    Then the text is the one that any other number in its place gives.
    """
    model = zoo.ZOO[name].build()
    mates = requests_of(((3, 6), (20, 6), (9, 6)))
    expected = {request.id: generated(model, request) for request in mates}
    prompt = list(prompt_of(33))
    prompt[3] = unused([*mates, Request("guilty", tuple(prompt), 6)], {**expected, "guilty": []})
    guilty = Request("guilty", tuple(prompt), 6)
    texts = set[tuple[int, ...]]()
    for number in (0.0, 3.0):
        guilt = Guilt(model, prompt[3], layer, number)
        texts.add(tuple(generated(model, guilty)))
        guilt.remove()
    batcher = RowBatcher(model, kv_tokens=128, max_requests=4, max_batch_tokens=16)
    guilt = Guilt(model, prompt[3], layer, math.nan)
    tokens, errors = collected(batcher, [mates[0], guilty, *mates[1:]])
    guilt.remove()
    assert guilt.fell
    text = tuple(tokens.pop("guilty"))
    assert tokens == expected
    if (name, layer) in UNREAD:
        assert not errors and texts == {text}
    else:
        assert "NaN" in str(errors["guilty"]) and not text
    whole = Request("whole", prompt_of(128 - 5), 6)
    assert collected(batcher, [whole]) == ({"whole": generated(model, whole)}, {}), "in cells that held NaN, too"
    batcher.close()
