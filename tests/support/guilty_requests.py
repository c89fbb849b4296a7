"""Models that fail with certain requests: where a token occurs, a decoder layer raises, or its row is no number any more."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from epslots.generation.requests import Request
from tests.support import zoo
from tests.support.batches import prompt_of


class Guilt:
    """Makes a model fail with every batch that has ``token`` in its input.

    Args:
        layer: the decoder layer that fails, after its work.
        how: a number that the token's row becomes, or an exception.

    Attributes:
        fell: how many layers were made to fail so far.
    """

    def __init__(self, model: PreTrainedModel, token: int, layer: int, how: float | Exception) -> None:
        self.fell = 0
        self._token, self._how = token, how
        self._rows_T = torch.zeros(0, dtype=torch.bool)
        layers = next(m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList))
        self._handles = [
            model.get_input_embeddings().register_forward_pre_hook(self._look),
            layers[layer].register_forward_hook(self._fail),
        ]

    def _look(self, _module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self._rows_T = inputs[0].flatten() == self._token

    def _fail(self, _module: Any, _inputs: Any, output: Any) -> None:
        if not self._rows_T.any():
            return
        self.fell += 1
        if isinstance(self._how, Exception):
            raise self._how
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.view(-1, hidden.shape[-1])[self._rows_T] = self._how

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


WAYS: dict[str, Callable[[], float | Exception]] = {
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "RuntimeError": lambda: RuntimeError("shapes don't match"),
    "OutOfMemoryError": lambda: torch.OutOfMemoryError("no memory is left"),
    "IndexError": lambda: IndexError("index out of range"),
}


def error_of(way: str) -> str:
    """The text of the guilty request's error."""
    return "NaN or infinite" if way in ("nan", "inf") else way


def unused(requests: list[Request], tokens: dict[str, list[int]]) -> int:
    """A token that none of these requests has in its prompt or gets."""
    return next(t for t in range(16, zoo.VOCAB) if not any(t in (*r.prompt, *tokens[r.id]) for r in requests))


def guilty_requests(token: int, lengths: tuple[int, ...], seed: int = 4) -> list[Request]:
    """Requests with the token somewhere in their prompts."""
    found = []
    for number, length in enumerate(lengths):
        prompt = list(prompt_of(length, seed))
        prompt[random.Random(seed + number).randrange(length)] = token
        found.append(Request(f"guilty{number}", tuple(prompt), 9))
    return found
