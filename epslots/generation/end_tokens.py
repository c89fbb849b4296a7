"""Tokens that end a text, as a checkpoint states them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """What ends the model's texts: those of its generation configuration, one or several; none if it states none."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    if stated is None:
        return frozenset()
    return frozenset({stated} if isinstance(stated, int) else map(int, stated))
