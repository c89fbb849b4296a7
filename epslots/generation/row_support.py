"""The abilities of the rows of a model's cache, decided by its classes: the tables that ``RowBatcher`` follows.

Suits every model of transformers 5.23 whose experts can be run from slots; ``tests/generation/test_row_support.py`` names the
models that need one of the tables, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from epslots.generation.positions import depends_on_length
from epslots.generation.row_attention import attentions_by_row, layer_of
from epslots.generation.row_cache import empty_cache
from epslots.generation.row_layers import can_be_pooled
from epslots.models.batch_invariance import is_batch_invariant
from epslots.models.experts_interface import mixes_tokens
from epslots.models.model_shape import OF_THE_CACHE, CacheTensor

# Mixers whose scan begins anew with every chunk of more than one token.
WHOLE_PROMPT_MIXERS = frozenset({"JambaMambaMixer"})
# Models whose ``generate`` computes a sequence anew when it outgrows the length that they were first trained with, because the
# angles of all its tokens change (``prepare_inputs_for_generation``).
RESTARTING = frozenset({"PhimoeForCausalLM"})


@dataclass(frozen=True)
class RowSupport:
    """How a model's rows are computed.

    Attributes:
        modules: of attention that run row by row.
        rotaries: rotary embeddings that are computed row by row, because their angles depend on a row's length.
        whole_prompts: a prompt is computed in one batch, at any length.
        replays: text that is computed again comes token by token, as it did the first time: in one step it would get other
            angles, other bits or other experts. Prompts of such models are whole, too.
        together: several rows share a step.
        restart: tokens of a sequence after which it is computed anew, once; None = never.
    """

    modules: tuple[nn.Module, ...]
    rotaries: tuple[nn.Module, ...]
    whole_prompts: bool
    replays: bool
    together: bool
    restart: int | None

    @property
    def by_row(self) -> frozenset[int]:
        """Layers of the cache whose attention runs row by row."""
        return frozenset(map(layer_of, self.modules))

    @property
    def shares_prefixes(self) -> bool:
        """Whether a row may begin with another one's tokens."""
        return not self.whole_prompts

    def capture_obstacle(self, tensors: Iterable[CacheTensor]) -> str | None:
        """Why no step over rows can be captured, as a sentence's end; None if it may.

        Args:
            tensors: those that the model's cache keeps of a row.
        """
        in_the_cache = any(tensor.layer == OF_THE_CACHE for tensor in tensors)
        by_row = self.modules or self.rotaries or not self.together or in_the_cache
        return "some of its layers are computed row by row" if by_row else None


def row_support(model: PreTrainedModel) -> RowSupport:
    """How a model's rows are computed.

    Raises:
        UnsupportedModelError: its layers keep something that can't be kept apart by rows.
    """
    unknown = frozenset(i for i, layer in enumerate(empty_cache(model).layers) if not can_be_pooled(layer))
    rotaries = tuple(depends_on_length(model))
    invariant = is_batch_invariant(model)
    mixes = mixes_tokens(model)
    replays = bool(rotaries) or invariant or mixes
    restarts = rotaries and type(model).__name__ in RESTARTING
    return RowSupport(
        modules=attentions_by_row(model, unknown),
        rotaries=rotaries,
        whole_prompts=replays or any(type(module).__name__ in WHOLE_PROMPT_MIXERS for module in model.modules()),
        replays=replays,
        together=not invariant and not mixes,
        restart=getattr(model.config, "original_max_position_embeddings", None) if restarts else None,
    )
