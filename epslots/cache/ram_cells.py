"""Number of records that a rank keeps in RAM, where that holds a part of the host store. Arithmetic, for plan and load.

A node's ranks have equal shares of its RAM. A rank's share is cut into cells (``ram_tier.py``), some for each size of record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from epslots.layout import LayerSpec, RecordLayout


def deal_cells(layers: Sequence[LayerSpec], quotas: Sequence[int], top_k: int, ram_bytes: int) -> dict[RecordLayout, int]:
    """The cells of each size of record, in proportion to the bytes of the experts that have no slot.

    Args:
        quotas: slots of each layer.
        top_k: experts of a token.
        ram_bytes: the rank's share, no less than ``least_ram``.

    Returns:
        Cells by layout, no fewer than those of ``least_ram``, and no more than there are records.
    """
    slotless: Counter[RecordLayout] = Counter()
    for layer, quota in zip(layers, quotas, strict=True):
        slotless[layer.layout] += (layer.num_experts - quota) * layer.layout.stride
    left, total = ram_bytes - least_ram(layers, top_k), max(1, slotless.total())
    assert left >= 0, "refused before"
    return {
        layout: min(records, _least_cells(records, top_k) + left * slotless[layout] // total // layout.stride)
        for layout, records in _records(layers).items()
    }


def least_ram(layers: Sequence[LayerSpec], top_k: int) -> int:
    """Bytes of the fewest cells that a rank needs. Of each size of record, the experts of one token in one layer."""
    return sum(_least_cells(records, top_k) * layout.stride for layout, records in _records(layers).items())


def _least_cells(records: int, top_k: int) -> int:
    return min(records, top_k)


def _records(layers: Sequence[LayerSpec]) -> Counter[RecordLayout]:
    """The number of experts of each layout."""
    found: Counter[RecordLayout] = Counter()
    for layer in layers:
        found[layer.layout] += layer.num_experts
    return found
