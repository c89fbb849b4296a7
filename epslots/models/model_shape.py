"""The sizes of a model: all that memory planning knows of it. Filled by ``measure_shape.py`` or ``known_shapes.py``.

The engine allocates a model's rows from the same ``CacheTensor``s, so plan and engine agree by construction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from epslots.config import EngineConfig
from epslots.layout import ITEM_BYTES, LayerSpec
from epslots.models.page_sizes import PageSizes

# Dtypes of what caches keep: beside activations, positions and flags.
CACHE_ITEM_BYTES = ITEM_BYTES | {"int64": 8, "int32": 4, "bool": 1}
# ``CacheTensor.layer`` of a tensor that the cache object itself keeps, beside its layers.
OF_THE_CACHE = -1
# A row's cell of each position, int32.
_CELL_NUMBER_BYTES = 4


class CacheTensor(msgspec.Struct, frozen=True):
    """One tensor that a model's own cache keeps of each sequence.

    Attributes:
        layer: index among the cache's layers; ``OF_THE_CACHE`` = an attribute of the cache object (minimax's linear_cache).
        path: the attribute, and the key or index in it where it is a dict or a list: ("keys",), ("conv_states", "0").
        kind: "token" = grows with every token; "window" = of the last ``window`` tokens; "row" = a state, of any length.
        shape: of one token's part, or of one sequence's state: without the dimensions of batch and sequence.
        dtype: a key of ``CACHE_ITEM_BYTES``.
        dimensions: of the batch, and of the sequence (None for a state), in the layer's own tensor.
        window: tokens that a token attends to, itself included, for kind "window".
        stride: tokens that share one entry, for kind "token" (deepseek_v4 compresses runs of tokens into one).
        pooled: rows share one tensor, allocated at the start. Else each row has objects of its own (deepseek_v4's layers),
            which a step makes anew before the old ones are let go.
    """

    layer: int
    path: tuple[str, ...]
    kind: Literal["token", "window", "row"]
    shape: tuple[int, ...]
    dtype: str
    dimensions: tuple[int, int | None]
    window: int | None = None
    stride: int = 1
    pooled: bool = True

    @property
    def entry_bytes(self) -> int:
        """Bytes of ``shape``."""
        return math.prod(self.shape) * CACHE_ITEM_BYTES[self.dtype]

    def entries(self, kv_tokens: int, max_requests: int, in_flight: int) -> int:
        """Entries of ``shape`` for tokens of several sequences.

        Where tokens have entries in a pool, one more stays zero: it stands for the positions before a row's first token.

        Args:
            kv_tokens: tokens of all sequences together.
            max_requests: sequences, at most.
            in_flight: new tokens of a step. They have entries before those that leave a window give theirs back.
        """
        if self.kind == "row":
            return max_requests
        if self.kind == "token":
            return kv_tokens // self.stride + self.pooled
        assert self.window is not None
        return min(kv_tokens, max_requests * (self.window - 1) + in_flight) + self.pooled

    def nbytes(self, kv_tokens: int, max_requests: int, in_flight: int) -> int:
        """Bytes of so many entries, at their worst."""
        return self.entries(kv_tokens, max_requests, in_flight) * self.entry_bytes * (1 if self.pooled else 2)


def row_bytes(cache: Sequence[CacheTensor], engine: EngineConfig, step_tokens: int, most_tokens: int | None = None) -> int:
    """Bytes of the rows that an engine allocates.

    Args:
        cache: the tensors that the model's own cache keeps of a sequence.
        step_tokens: new tokens of one step, at most.
        most_tokens: tokens of all sequences together, at most; by default those that the engine plans with.
    """
    tokens = engine.planned_tokens if most_tokens is None else most_tokens
    tensors = sum(tensor.nbytes(tokens, engine.max_requests, step_tokens) for tensor in cache)
    # A table for each kind of window, and one for what keeps all tokens.
    tables = len({None, *(tensor.window for tensor in cache if tensor.pooled)})
    return tensors + tables * engine.max_requests * tokens * _CELL_NUMBER_BYTES


class ModelShape(msgspec.Struct, frozen=True):
    """The sizes of a model.

    Attributes:
        name: the model's name in messages.
        dtype: of weights and activations, a key of ``ITEM_BYTES``.
        layers: the MoE layers, in order.
        top_k: experts per token.
        dense_bytes: all weights outside the experts; a tied one counts once.
        cache: the tensors that the model's own cache keeps of a sequence, in the order of its layers.
        hidden_size: H, the width of a token between layers.
        vocab_size: V, the width of the logits.
        pages: the sizes of the paged cache, if the engine keeps requests in pages; None = in rows of the model's own cache.
        whole_prompts: a prompt of any length is computed in one step.
        capture_obstacle: why no decoding step over that cache can be captured on any GPU, as a sentence's end; None if it may.
        slot_note: of a quantised checkpoint, how slots hold its experts and why; else empty.
    """

    name: str
    dtype: str
    layers: tuple[LayerSpec, ...]
    top_k: int
    dense_bytes: int
    cache: tuple[CacheTensor, ...]
    hidden_size: int
    vocab_size: int
    pages: PageSizes | None = None
    whole_prompts: bool = False
    capture_obstacle: str | None = None
    slot_note: str = ""

    @property
    def num_experts(self) -> int:
        """Experts of all layers together."""
        return sum(layer.num_experts for layer in self.layers)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts' records."""
        return sum(layer.num_experts * layer.layout.nbytes for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Weights of the whole model, counting the dense ones as if all were of ``dtype``."""
        experts = sum(layer.num_experts * layer.weights.elements for layer in self.layers)
        return experts + self.dense_bytes // ITEM_BYTES[self.dtype]

    @property
    def cache_kind(self) -> str:
        """How the engine keeps requests: "pages" or "rows"."""
        return "rows" if self.pages is None else "pages"

    @property
    def token_bytes(self) -> int:
        """Bytes of cache for each token, in the layers that keep all tokens."""
        if self.pages is not None:
            return self.pages.token_bytes
        return sum(tensor.entry_bytes // tensor.stride for tensor in self.cache if tensor.kind == "token")

    @property
    def request_bytes(self) -> int:
        """Bytes of cache for each request, in the layers that don't: states, and windows when they are full."""
        kept = [(tensor.window or 1, tensor.entry_bytes) for tensor in self.cache if tensor.kind != "token"]
        return 0 if self.pages is not None else sum(count * size for count, size in kept)

    def step_tokens(self, engine: EngineConfig) -> int:
        """Tokens of one step, at most."""
        return engine.step_tokens(self.whole_prompts)

    def kv_bytes(self, engine: EngineConfig) -> int:
        """Bytes of the cache that an engine allocates, with a fixed number of ``kv_tokens``."""
        if self.pages is not None:
            return self.pages.nbytes(engine.planned_tokens, engine.max_requests, engine.max_batch_tokens)
        return row_bytes(self.cache, engine, self.step_tokens(engine))
