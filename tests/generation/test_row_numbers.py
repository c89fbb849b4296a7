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
CASES = [("glm_moe_dsa", 0), ("glm_moe_dsa", 2), ("qwen3_next", 0), ("mimo_v2_flash", 0)]


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


class Case:
    """A model, a request whose token number ``place`` is that of a layer's fault, and requests beside it."""

    def __init__(self, name: str, layer: int, place: int) -> None:
        self.model, self._layer = zoo.ZOO[name].build(), layer
        self.mates = requests_of(((3, 6), (20, 4)))
        self.expected = {request.id: generated(self.model, request) for request in self.mates}
        prompt = list(prompt_of(33))
        self._token = unused([*self.mates, Request("all", tuple(prompt), 6)], {**self.expected, "all": []})
        prompt[place] = self._token
        self.guilty = Request("guilty", tuple(prompt), 6)

    def guilt(self, number: float) -> Guilt:
        """The layer's result for the token becomes this number."""
        return Guilt(self.model, self._token, self._layer, number)

    def text(self, number: float) -> list[int]:
        """The tokens of ``generate`` for the request then."""
        guilt = self.guilt(number)
        try:
            return generated(self.model, self.guilty)
        finally:
            guilt.remove()

    def outcome(self) -> tuple[list[int], str | None]:
        """The request's text, and its error, with NaN. No other request meets it, neither beside it nor in its cells."""
        batcher = RowBatcher(self.model, kv_tokens=128, max_requests=4, max_batch_tokens=16)
        guilt = self.guilt(math.nan)
        tokens, errors = collected(batcher, [self.guilty, *self.mates])
        guilt.remove()
        assert guilt.fell
        text = tokens.pop("guilty")
        assert tokens == self.expected
        whole = Request("whole", prompt_of(128 - 5), 6)
        assert collected(batcher, [whole]) == ({"whole": generated(self.model, whole)}, {})
        batcher.close()
        return text, errors.pop("guilty", None)


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_nan_is_an_error_or_is_never_read(name: str, layer: int):
    """The prompt's first chunk has the token, and its last chunk is a single one."""
    case = Case(name, layer, place=3)
    text, error = case.outcome()
    if layer == case.model.config.num_hidden_layers - 1:  # nothing is made of it but logits that are asked for by none
        assert error is None and text == case.text(0.0)
    else:
        assert "NaN" in str(error) and not text


def test_a_token_that_is_never_chosen_may_be_nan():
    """An indexer chose before the token's numbers broke. The text is the one that any number in their place gives.

    Where a layer chooses anew, NaN is the largest of its scores: no text leaves it out by chance. And a chunk of several
    tokens multiplies all earlier ones, with zeros if they aren't chosen: there, too, NaN stays NaN.
    """
    case = Case("glm_moe_dsa", 1, place=5)
    text, error = case.outcome()
    assert error is None and text == case.text(0.0) == case.text(-1e9)
