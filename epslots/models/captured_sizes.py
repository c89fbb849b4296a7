"""``CapturedSizes``: the steps that an engine's graphs serve, and the memory that they keep. Pure; engine and plan ask it.

A graph serves the steps of one size: so many rows, each of which reads so many positions, both padded. All rows of a step read
as many as the longest, so one long request among many short ones would let a step read far more than the cache holds: where
that exceeds ``MOST_READS`` caches, the step takes the usual path.
"""

from __future__ import annotations

from dataclasses import dataclass

from epslots.layout import ITEM_BYTES
from epslots.models.model_shape import CacheTensor, ModelShape

# Positions that the smallest graph reads of a row; the others read twice as many each.
LEAST_SPAN = 64
MOST_READS = 8
# A CUDA graph's own memory, for its kernels' arguments. An estimate: users of other engines report 2 to 10 MB a graph.
GRAPH_BYTES = 4 * 1024**2
# Each further graph of a step that is captured in pieces. An estimate: vLLM's pieces take 24 to 28 MB a size (its PR 22897).
PIECE_BYTES = 256 * 1024
# Where a step finds a position: cells and masks, of one kind of attention.
_POSITION_BYTES = 32
_ID_BYTES = 8


def span_of(longest: int) -> int:
    """Positions that a graph reads of each row, so that it serves longer ones, too."""
    return max(LEAST_SPAN, 1 << (longest - 1).bit_length())


@dataclass(frozen=True)
class CapturedSizes:
    """The sizes of one engine's captured steps.

    Attributes:
        rows: of a step, at most; 0 = no step is captured.
        kv_tokens: that the engine's cache keeps.
    """

    rows: int
    kv_tokens: int

    def padded(self, rows: int) -> int:
        """Rows of the graph that serves so many."""
        return min(1 << (rows - 1).bit_length(), self.rows)

    def serves(self, rows: int, longest: int) -> bool:
        """Whether a graph serves steps of so many rows, the longest of which reads so many positions."""
        span = span_of(longest)
        most = max(MOST_READS * self.kv_tokens, LEAST_SPAN * self.rows)
        return rows <= self.rows and span <= span_of(self.kv_tokens) and self.padded(rows) * span <= most

    def graphs(self) -> list[tuple[int, int]]:
        """Rows and positions of each graph, if one was captured for every size."""
        batches = sorted({self.padded(1 << power) for power in range(self.rows.bit_length() + 1)}) if self.rows else []
        spans = [LEAST_SPAN]
        while spans[-1] < span_of(self.kv_tokens):
            spans.append(2 * spans[-1])
        return [(batch, span) for batch in batches for span in spans if self.serves(batch, span)]

    def nbytes(self, shape: ModelShape, moe_bytes: int) -> int:
        """Memory of all graphs.

        They share one pool for a step's activations: those of a MoE layer, and the keys and values that attention reads in one
        layer. Each has its own logits. The states that a step leaves of its rows count once.

        Args:
            shape: the model.
            moe_bytes: activations of a MoE layer for ``rows`` tokens.
        """
        graphs = self.graphs()
        if not graphs:
            return 0
        logits = sum(batch for batch, _ in graphs) * shape.vocab_size * ITEM_BYTES[shape.dtype]
        reads = max(batch * _read_bytes(shape, span) for batch, span in graphs)
        states = [tensor.entry_bytes for tensor in _row_tensors(shape) if tensor.kind == "row"]
        return moe_bytes + reads + logits + self.rows * sum(states) + len(graphs) * GRAPH_BYTES

    def pieces_nbytes(self, shape: ModelShape) -> int:
        """Memory of graphs in pieces, beyond ``nbytes``.

        A piece keeps the experts that were chosen, and their weights. The layers of a graph share their hidden states and
        results; of one request, each keeps its own.

        Args:
            shape: the model.
        """
        layers = len(shape.layers)
        chosen = layers * shape.top_k * (_ID_BYTES + ITEM_BYTES["float32"])
        states = 2 * shape.hidden_size * ITEM_BYTES[shape.dtype]
        kept = sum(batch * chosen + states * (layers if batch == 1 else batch) for batch, _ in self.graphs())
        return kept + len(self.graphs()) * layers * PIECE_BYTES


def _row_tensors(shape: ModelShape) -> tuple[CacheTensor, ...]:
    return shape.cache if shape.pages is None else ()


def _read_bytes(shape: ModelShape, span: int) -> int:
    """A step's reads of one row: its positions, of each kind of attention, and one layer's keys and values there."""
    if shape.pages is not None:
        return span * (len(shape.pages.layers) * _POSITION_BYTES + shape.pages.layer_bytes)
    layers: dict[int, int] = {}
    for tensor in shape.cache:
        if tensor.kind != "row":
            read = tensor.entry_bytes * min(span, tensor.window or span)
            layers[tensor.layer] = layers.get(tensor.layer, 0) + read
    kinds = len({tensor.window for tensor in shape.cache if tensor.kind != "row"})
    return span * kinds * _POSITION_BYTES + max(layers.values(), default=0)
