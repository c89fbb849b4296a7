"""The sizes of a model: all that memory planning knows of it. Filled by ``measure_shape.py`` or ``known_shapes.py``."""

from __future__ import annotations

import msgspec

from epslots.layout import ITEM_BYTES, LayerSpec


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
