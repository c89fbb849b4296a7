"""The sizes of a model: all that memory planning knows of it. Filled by ``measure_shape.py`` or ``known_shapes.py``."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from epslots.layout import ITEM_BYTES, LayerSpec

# Dtypes of what caches keep beside activations: positions, flags.
CACHE_ITEM_BYTES = ITEM_BYTES | {"int64": 8, "int32": 4, "bool": 1}
# Dimensions of the tensors of transformers' cache classes, by attribute: of the batch, and of the sequence (None = a state).
CACHE_DIMENSIONS: dict[str, tuple[int, int | None]] = {
    "keys": (0, 2),
    "values": (0, 2),
    "indexer_keys": (0, 1),
    "indexer_position_ids": (1, 2),
    "idx_keys": (0, 2),
    "compressed_kv": (0, 1),
    "buffer_kv": (0, None),
    "buffer_gate": (0, None),
    "overlap_kv": (0, None),
    "overlap_gate": (0, None),
    "conv_states": (0, None),
    "recurrent_states": (0, None),
    "linear_cache": (0, None),
}
# ``CacheTensor.layer`` of a tensor that the cache object itself keeps, beside its layers.
OF_THE_CACHE = -1


class CacheTensor(msgspec.Struct, frozen=True):
    """One tensor that a model's cache keeps of each sequence: measured by ``measure_shape.py``, allocated from by the engine.

    Attributes:
        layer: index among the cache's layers; ``OF_THE_CACHE`` = an attribute of the cache object (minimax's linear_cache).
        path: the attribute, and the key or index in it where it is a dict or a list: ("keys",), ("conv_states", "0").
        kind: "token" = grows with every token; "window" = of the last ``window`` tokens; "row" = a state, of any length.
        shape: of one token's part, or of one sequence's state: without the dimensions of batch and sequence.
        dtype: a key of ``CACHE_ITEM_BYTES``.
        window: tokens that are kept, for kind "window".
        stride: tokens that share one entry, for kind "token" (deepseek_v4 compresses runs of tokens into one).
    """

    layer: int
    path: tuple[str, ...]
    kind: Literal["token", "window", "row"]
    shape: tuple[int, ...]
    dtype: str
    window: int | None = None
    stride: int = 1

    @property
    def dimensions(self) -> tuple[int, int | None]:
        """The dimension of the batch, and of the sequence (None = a state), in the layer's own tensor."""
        return CACHE_DIMENSIONS[self.path[0]]

    @property
    def entry_bytes(self) -> int:
        """Bytes of ``shape``."""
        return math.prod(self.shape) * CACHE_ITEM_BYTES[self.dtype]

    def entries(self, kv_tokens: int, max_requests: int, in_flight: int) -> int:
        """Entries of ``shape`` that hold ``kv_tokens`` tokens of at most ``max_requests`` sequences together.

        A step's new tokens, at most ``in_flight``, have entries before those that leave a window are free. Where tokens have
        entries, one more stays zero: it stands for the positions before a row's first token.
        """
        match self.kind:
            case "token":
                return kv_tokens // self.stride + 1
            case "window":
                assert self.window is not None
                return min(kv_tokens, max_requests * (self.window - 1) + in_flight) + 1
            case "row":
                return max_requests

    def nbytes(self, kv_tokens: int, max_requests: int, in_flight: int) -> int:
        """Bytes of so many entries."""
        return self.entries(kv_tokens, max_requests, in_flight) * self.entry_bytes


class KVLayer(msgspec.Struct, frozen=True):
    """Bytes that one attention or recurrent layer keeps of one sequence.

    A layer that keeps two kinds of state (a window beside a compressed history) is two of these.

    Attributes:
        bytes_per_token: grows with every token, up to ``window``.
        window: tokens kept at most; None = all.
        fixed_bytes: recurrent and convolution states, of any length.
    """

    bytes_per_token: int
    window: int | None = None
    fixed_bytes: int = 0

    def nbytes(self, tokens: int) -> int:
        """Bytes after ``tokens`` tokens."""
        kept = tokens if self.window is None else min(tokens, self.window)
        return kept * self.bytes_per_token + self.fixed_bytes


class ModelShape(msgspec.Struct, frozen=True):
    """The sizes of a model.

    Attributes:
        name: the model's name in messages.
        dtype: of weights and activations, a key of ``ITEM_BYTES``.
        layers: the MoE layers, in order.
        top_k: experts per token.
        dense_bytes: all weights outside the experts; a tied one counts once.
        kv: state per sequence; layers without state have no entry.
        hidden_size: H, the width of a token between layers.
        vocab_size: V, the width of the logits.
    """

    name: str
    dtype: str
    layers: tuple[LayerSpec, ...]
    top_k: int
    dense_bytes: int
    kv: tuple[KVLayer, ...]
    hidden_size: int
    vocab_size: int

    @property
    def num_experts(self) -> int:
        """Experts of all layers together."""
        return sum(layer.num_experts for layer in self.layers)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts' records."""
        return sum(layer.num_experts * layer.record.nbytes for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Weights of the whole model, counting the dense ones as if all were of ``dtype``."""
        experts = sum(layer.num_experts * layer.layout.elements for layer in self.layers)
        return experts + self.dense_bytes // ITEM_BYTES[self.dtype]

    def kv_bytes(self, tokens: int) -> int:
        """Bytes that one sequence of ``tokens`` tokens keeps."""
        return sum(layer.nbytes(tokens) for layer in self.kv)
