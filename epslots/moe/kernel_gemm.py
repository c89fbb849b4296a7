"""Grouped products by kernels of our own. They are for GPUs on which torch's grouped product would wait for the host.

``KernelGemm`` is the ``GroupedGemm`` that ``product_choice.py`` chooses there. Its kernels are ``Products``: Triton's on a GPU
(``grouped_kernel.py``), torch's as their reference.

Legend of shape suffixes: N rows, I inputs, O outputs, Q slots of the layer, T tiles at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.integrations.moe import _default_apply_gate

from epslots.cache.unpacking import Weight
from epslots.moe.grouped_gemm import GroupedGemm, torch_matmul

# Rows of a tile: a matrix unit takes 16 at least; beyond 64 a slot's weights are read from the GPU's cache again.
_LEAST_ROWS, _MOST_ROWS = 16, 64
# Activations that the kernels know, by transformers' classes.
_ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh"}


@dataclass(frozen=True)
class Gate:
    """The gate between two products: the first half of the outputs, activated, times the other half.

    Attributes:
        activation: "silu", "gelu" or "gelu_tanh".
    """

    activation: str


def known_gate(module: Any) -> Gate | None:
    """The gate of an experts module if the kernels know it. None if the module has to compute it by itself."""
    if not module.has_gate or getattr(module._apply_gate, "__func__", None) is not _default_apply_gate:
        return None
    activation = _ACTIVATIONS.get(type(module.act_fn).__name__)
    return None if activation is None else Gate(activation)


@dataclass(frozen=True)
class Tiles:
    """Blocks of rows of one slot each, in the order of slots. Slots without rows have none.

    Attributes:
        ends_Q: int32, where the rows of each slot end.
        size: rows of a tile at most.
        slot_T, row_T: int32, the slot and the first row of each tile.
        count: int32 [1], number of valid tiles.
    """

    ends_Q: torch.Tensor
    size: int
    slot_T: torch.Tensor
    row_T: torch.Tensor
    count: torch.Tensor

    @classmethod
    def empty(cls, ends_Q: torch.Tensor, rows: int) -> Tiles:
        """Room for the tiles of so many rows, still to be listed."""
        size = tile_rows(rows, len(ends_Q))
        most = tiles_at_most(rows, len(ends_Q), size)
        numbers = torch.empty(2 * most + 1, dtype=torch.int32, device=ends_Q.device)
        return cls(ends_Q, size, numbers[:most], numbers[most:-1], numbers[-1:])


def tile_rows(rows: int, slots: int) -> int:
    """Rows of a tile, only from shapes. A power of two, about the rows of a slot if all slots get some."""
    each = -(-rows // max(1, min(rows, slots)))
    return min(_MOST_ROWS, max(_LEAST_ROWS, 1 << (each - 1).bit_length()))


def tiles_at_most(rows: int, slots: int, size: int) -> int:
    """The most tiles of any routing: every slot's last one may be partly filled."""
    return max(1, rows // size + min(slots, rows))


class Products(Protocol):
    """The kernels of a grouped product. None asks the host for a value."""

    def list_tiles(self, ends_Q: torch.Tensor, rows: int) -> Tiles:
        """The tiles of rows that are sorted by slot.

        Args:
            ends_Q: int32, where the rows of each slot end.
            rows: N; from ``ends_Q[-1]`` on they are in no slot.
        """
        ...

    def multiply(
        self,
        rows_NI: torch.Tensor,
        weight_QIO: Weight,
        bias_QO: torch.Tensor | None,
        tiles: Tiles,
        gate: Gate | None = None,
    ) -> torch.Tensor:
        """Each row times its slot's weights, plus bias: [N, O], or [N, O / 2] with a gate. Undefined in rows without a slot.

        Args:
            rows_NI: in the weights' dtype (fp32, bf16 or fp16); each row contiguous.
            weight_QIO: in place, by any strides; or packed.
        """
        ...


class TorchProducts:
    """``Products`` by torch's operations. They may ask the host on a GPU."""

    def list_tiles(self, ends_Q: torch.Tensor, rows: int) -> Tiles:
        slots = ends_Q.shape[0]
        tiles = Tiles.empty(ends_Q, rows)
        start_Q = torch.nn.functional.pad(ends_Q, (1, 0))[:-1]
        tiles_Q = (ends_Q - start_Q + tiles.size - 1) // tiles.size
        number_T, first_Q = torch.arange(tiles.slot_T.shape[0], device=ends_Q.device), tiles_Q.cumsum(0) - tiles_Q
        slot_T = torch.searchsorted(first_Q + tiles_Q, number_T, right=True).clamp(max=slots - 1)
        tiles.slot_T.copy_(slot_T)
        tiles.row_T.copy_(start_Q[slot_T] + (number_T - first_Q[slot_T]) * tiles.size)
        tiles.count.copy_(tiles_Q.sum())
        return tiles

    def multiply(
        self,
        rows_NI: torch.Tensor,
        weight_QIO: Weight,
        bias_QO: torch.Tensor | None,
        tiles: Tiles,
        gate: Gate | None = None,
    ) -> torch.Tensor:
        result_NO = torch_matmul(weight_QIO)(rows_NI, weight_QIO, tiles.ends_Q)
        if bias_QO is not None:
            number_N = torch.arange(len(rows_NI), dtype=torch.int32, device=rows_NI.device)
            slot_N = torch.searchsorted(tiles.ends_Q, number_N, right=True)
            result_NO += bias_QO[slot_N.clamp(max=len(bias_QO) - 1)]
        return result_NO if gate is None else activated(result_NO, gate)


def activated(result_NO: torch.Tensor, gate: Gate) -> torch.Tensor:
    """The gated half of a product's results, by torch's operations."""
    first_NO, other_NO = result_NO.chunk(2, -1)
    return _ACTIVATED[gate.activation](first_NO) * other_NO


_ACTIVATED: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda gate: torch.nn.functional.gelu(gate, approximate="tanh"),
}


class KernelGemm(GroupedGemm):
    """``GroupedGemm`` by ``Products``: three launches for a pass whose gate they know, for any routing.

    Args:
        products: the kernels.
    """

    def __init__(self, module: Any, weights: Mapping[str, Weight], products: Products) -> None:
        super().__init__(module, weights)
        self._products, self._gate = products, known_gate(module)

    def ready_products(self, pairs: int) -> None:
        return None

    def __call__(self, rows_NH: torch.Tensor, ends_Q: torch.Tensor, key_N: torch.Tensor, first_key: int = 0) -> torch.Tensor:
        multiply, tiles = self._products.multiply, self._products.list_tiles(ends_Q, rows_NH.shape[0])
        inner_NI = multiply(rows_NH.to(self.dtype).contiguous(), self._first, self._first_bias, tiles, self._gate)
        if self._gate is None:
            inner_NI = self._activate(inner_NI).contiguous()
        result_NH = multiply(inner_NI, self._down, self._down_bias, tiles)
        return result_NH if self._post_norm is None else self._post_norm(result_NH)
