"""The model's calls of its MoE layers. Other code may take those of its thread: to capture a step in pieces around them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Called with hidden states [T, H], chosen experts and their weights [T, K]; returns [T, H]."""

Taker = Callable[[Layer, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Called with a layer and its arguments, in its place."""


class _Taken(threading.local):
    """Each thread's own."""

    by: Taker | None = None


_taken = _Taken()


def call_layer(layer: Layer, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """The layer's result, or what the code returns that has taken the calls."""
    if _taken.by is not None:
        return _taken.by(layer, hidden_TH, index_TK, weights_TK)
    return layer(hidden_TH, index_TK, weights_TK)


@contextmanager
def calls_taken_by(taker: Taker) -> Iterator[None]:
    """Within the context this thread's calls go to ``taker``, which sees to the ranks' step, too (``group.join``)."""
    assert _taken.by is None, "the calls are taken already"
    _taken.by = taker
    try:
        yield
    finally:
        _taken.by = None


def calls_are_taken() -> bool:
    """Whether this thread's calls are taken."""
    return _taken.by is not None
