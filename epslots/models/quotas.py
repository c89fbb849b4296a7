"""Slots of each MoE layer for a ``slots`` setting. Pure arithmetic on integers."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

from epslots.errors import ConfigError, DoesNotFitError
from epslots.layout import LayerSpec
from epslots.units import SlotsSetting, format_bytes


def resolve_quotas(setting: SlotsSetting, layers: Sequence[LayerSpec], auto_bytes: int | None) -> tuple[int, ...]:
    """Slots of each MoE layer: from 1 to its number of experts.

    Args:
        setting: slots per layer, a share of each layer's experts (rounded down), bytes for the pool, or auto.
        layers: the MoE layers; they may differ in experts and in record size.
        auto_bytes: bytes for the pool when ``setting`` is auto, None = as many slots as experts. Else ignored.

    Raises:
        ConfigError: more slots per layer than the largest layer has experts.
        DoesNotFitError: the bytes don't hold one slot of every layer.
    """
    if setting.per_layer is not None:
        largest = max(layer.num_experts for layer in layers)
        if not 1 <= setting.per_layer <= largest:
            raise ConfigError(
                f"slots={setting.per_layer}: allowed are 1 to {largest} slots per MoE layer, since the largest layer has "
                f"{largest} experts"
            )
        return tuple(min(setting.per_layer, layer.num_experts) for layer in layers)
    if setting.share is not None:
        # The float nearest to 29 % lies below 29/100, which would lose a slot: take the ratio that was meant.
        share = Fraction(setting.share).limit_denominator(1_000_000)
        return tuple(max(1, math.floor(share * layer.num_experts)) for layer in layers)
    budget = auto_bytes if setting.is_auto else setting.total_bytes
    if budget is None:
        return tuple(layer.num_experts for layer in layers)
    return _fill(layers, budget)


def _fill(layers: Sequence[LayerSpec], budget: int) -> tuple[int, ...]:
    """One slot per layer, then one by one to the layer with the smallest resident share."""
    ones = [1] * len(layers)
    least = pool_bytes(layers, ones)
    if least > budget:
        raise DoesNotFitError(
            f"one slot in each of {len(layers)} MoE layers takes {describe_pool(layers, ones)} = {format_bytes(least)}, and "
            f"the pool has {format_bytes(budget)}"
        )
    left = budget - least
    # Shares are compared in units of 1 / lcm, which makes them integers. Ties go to the earlier layer.
    unit = math.lcm(*(layer.num_experts for layer in layers))
    quotas = ones
    queue = [(2 * (unit // layer.num_experts), i) for i, layer in enumerate(layers) if layer.num_experts > 1]
    heapq.heapify(queue)
    while queue:
        share, i = queue[0]
        if layers[i].layout.nbytes > left:
            heapq.heappop(queue)  # for good: the remaining bytes only shrink
            continue
        left -= layers[i].layout.nbytes
        quotas[i] += 1
        if quotas[i] < layers[i].num_experts:
            heapq.heapreplace(queue, (share + unit // layers[i].num_experts, i))
        else:
            heapq.heappop(queue)
    return tuple(quotas)


def served_tokens(layers: Sequence[LayerSpec], quotas: Sequence[int], top_k: int) -> int | None:
    """Tokens of a step that can't need more experts than any layer has slots; None = any number."""
    fewest = [quota for quota, layer in zip(quotas, layers, strict=True) if quota < layer.num_experts]
    return min(fewest) // top_k if fewest else None


def pool_bytes(layers: Sequence[LayerSpec], quotas: Sequence[int]) -> int:
    """Bytes of a pool with these quotas."""
    return sum(quota * layer.layout.nbytes for quota, layer in zip(quotas, layers, strict=True))


def describe_pool(layers: Sequence[LayerSpec], quotas: Sequence[int]) -> str:
    """The pool as a sum, ``58 x 84 MiB``: slots x bytes of one, for each size of slot."""
    slots: dict[int, int] = {}
    for quota, layer in zip(quotas, layers, strict=True):
        slots[layer.layout.nbytes] = slots.get(layer.layout.nbytes, 0) + quota
    return " + ".join(f"{count:,} x {format_bytes(size)}" for size, count in slots.items())


def describe_quotas(quotas: Sequence[int]) -> str:
    """``64 per layer``, or ``31 to 32 per layer``."""
    low, high = min(quotas), max(quotas)
    return f"{low:,} per layer" if low == high else f"{low:,} to {high:,} per layer"
