"""Slots of each layer, and of each layer on each rank: more where another slot saves more misses.

``improve_quotas`` changes given slots and ``deal_quotas`` spreads them over ranks, for ``replanner.py`` and ``epslots
placement plan``; ``learn_quotas`` deals slots from nothing. A layer's curve of misses over slots (``reuse_distance.py``)
needn't be convex: a text that cycles through twenty experts hits nothing until all twenty fit. So slots go along each curve's
*convex minorant*, whose steps never grow, always to the layer that gains most (greedy is optimal on convex curves: Fox,
Operations Research 1966; the minorant as in Talus, Beckmann and Sanchez, HPCA 2015). At most one layer ends within a bridged
stretch.

Pure. Legend of shape suffixes: L layers, R ranks, S slots, D stack distances (E + 1 of the largest layer).
"""

from __future__ import annotations

import numpy as np

from epslots.arrays import BoolArray, FloatArray, IntArray
from epslots.errors import ConfigError

# The weight of the mean layer's curve in each layer's own, in uses for each of its experts.
PRIOR_USES = 4.0
# A slot moves only for a gain of more than so many standard errors of the counts, and the miss of the expert in it.
CONFIDENCE, _MOVE_MISSES = 2.0, 1.0


def learn_quotas(histogram_LD: IntArray, num_experts_L: IntArray, total_slots: int) -> IntArray:
    """Slots of each layer, int64 [L], of sum ``total_slots``, with the fewest misses together: from 1 to its experts.

    Args:
        histogram_LD: uses by stack distance, by the scores of the policy that the slots are for; row l ends at
            ``num_experts_L[l]`` (never used before).
        num_experts_L: experts of each layer.
        total_slots: slots of all layers, over all ranks.

    Raises:
        ConfigError: the total is outside of these bounds.
    """
    least, most = len(num_experts_L), int(num_experts_L.sum())
    if not least <= total_slots <= most:
        raise ConfigError(f"{total_slots} slots for {least} layers: allowed: {least} to {most}")
    gains = slot_gains(histogram_LD, num_experts_L)
    # Slots compete by gain; among equals the layer with the smaller share of slots comes first.
    layers, numbers = np.nonzero(np.arange(1, gains.shape[1]) < num_experts_L[:, None])
    order = np.lexsort((layers, (numbers + 1) / num_experts_L[layers], -gains[layers, numbers + 1]))
    return 1 + np.bincount(layers[order[: total_slots - least]], minlength=least)


def improve_quotas(
    current_L: IntArray,
    histogram_LD: IntArray,
    num_experts_L: IntArray,
    least_L: IntArray,
    most_L: IntArray,
) -> IntArray:
    """Better slots of each layer of the same sum, int64 [L]. A slot moves only for a significant gain that exceeds its cost.

    Args:
        current_L: slots of each layer now.
        histogram_LD: uses by stack distance, by the scores of the policy that the slots are for.
        num_experts_L: experts of each layer.
        least_L, most_L: bounds of a layer's slots.
    """
    gains = np.pad(slot_gains(histogram_LD, num_experts_L), ((0, 0), (0, 1)))
    layers, last = np.arange(len(current_L)), gains.shape[1] - 1
    quota_L = current_L.copy()
    for _ in range(int(current_L.sum())):
        gain_L = np.where(quota_L < most_L, gains[layers, np.minimum(quota_L, last)], -np.inf)
        loss_L = np.where(quota_L > least_L, gains[layers, np.minimum(quota_L - 1, last)], np.inf)
        taker, giver = int(gain_L.argmax()), int(loss_L.argmin())
        gain, loss = float(gain_L[taker]), float(loss_L[giver])
        if not gain - loss > _MOVE_MISSES + CONFIDENCE * np.sqrt(max(gain + loss, 0)):
            break
        quota_L[taker] += 1
        quota_L[giver] -= 1
    return quota_L


def slot_gains(histogram_LD: IntArray, num_experts_L: IntArray) -> FloatArray:
    """Misses that each further slot saves, float [L, E]: column s is the slot after s slots; rows never rise."""
    layers, experts = len(num_experts_L), int(num_experts_L.max())
    uses_L = histogram_LD.sum(1)
    shared_D = _mean_shape(histogram_LD, num_experts_L, uses_L)
    gains = np.zeros((layers, experts))
    for layer, own in enumerate(num_experts_L.tolist()):
        # The mean layer's uses by relative distance, scaled to the prior's weight, at most to the uses that were seen.
        prior = _stretch(shared_D, own) * min(PRIOR_USES * own, float(uses_L[layer]))
        curve = np.concatenate([histogram_LD[layer, :own] + prior, histogram_LD[layer, own : own + 1]])[::-1].cumsum()[::-1]
        gains[layer, :own] = -np.diff(convex_minorant(curve))
    return gains


_SHAPE_BINS = 64


def _mean_shape(histogram_LD: IntArray, num_experts_L: IntArray, uses_L: IntArray) -> FloatArray:
    """Share of uses by distance / the layer's experts, in bins, float [bins]; zeros without uses."""
    shape = np.zeros(_SHAPE_BINS)
    for histogram_D, own in zip(histogram_LD, num_experts_L.tolist(), strict=True):
        middle = (np.arange(own) + 0.5) / own * _SHAPE_BINS
        shape += np.bincount(middle.astype(np.int64), histogram_D[:own], _SHAPE_BINS)
    total: FloatArray = shape / max(1, int(uses_L.sum()))
    return total


def _stretch(shape: FloatArray, experts: int) -> FloatArray:
    """Binned shares spread over ``experts`` distances, float [experts]."""
    running = np.interp(
        np.arange(experts + 1) / experts * _SHAPE_BINS, np.arange(_SHAPE_BINS + 1), np.append(0, shape.cumsum())
    )
    return np.diff(running)


def convex_minorant(curve: FloatArray) -> FloatArray:
    """The greatest convex curve that lies nowhere above ``curve``, float [n]: its lower hull (Andrew's monotone chain)."""
    corners: list[int] = []
    values = curve.tolist()
    for x, y in enumerate(values):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (values[b] - values[a]) * (x - b) < (y - values[b]) * (b - a):
                break
            corners.pop()
        corners.append(x)
    return np.interp(np.arange(len(values)), corners, curve[corners])


def deal_quotas(quota_L: IntArray, total_R: IntArray, num_experts_L: IntArray, current_LR: IntArray | None = None) -> IntArray:
    """Slots of each layer on each rank, int64 [L, R], from 1 to the layer's experts, dealt evenly.

    Column sums are exact: they are the ranks' memory. Row sums are exact if the bounds allow it, else as near as possible.

    Args:
        quota_L: slots of each layer over all ranks.
        total_R: slots of each rank over all layers.
        num_experts_L: experts of each layer.
        current_LR: slots now, changed as little as possible; if not given, slots are dealt in proportion to ``total_R``.

    Raises:
        ConfigError: the sums differ, or a rank has too few or too many slots for the layers.
    """
    layers = len(quota_L)
    if quota_L.sum() != total_R.sum():
        raise ConfigError(
            f"{int(quota_L.sum())} slots of all layers and {int(total_R.sum())} of all ranks: they must be equal"
        )
    if (total_R < layers).any() or (total_R > num_experts_L.sum()).any():
        raise ConfigError(f"a rank's slots are {total_R.tolist()}: allowed: {layers} to {int(num_experts_L.sum())}")
    quota_LR = _in_proportion(quota_L, total_R) if current_LR is None else current_LR.copy()
    quota_LR = np.clip(quota_LR, 1, num_experts_L[:, None])
    for layer in range(layers):
        _fix_row(quota_LR, layer, int(quota_L[layer]), total_R, int(num_experts_L[layer]))
    most_LR = np.broadcast_to(num_experts_L[:, None], quota_LR.shape)
    while (over_R := quota_LR.sum(0) - total_R).any():
        if not _shift_slot(quota_LR, over_R, most_LR):
            _fix_columns(quota_LR, quota_L, over_R, most_LR)
            break
    return quota_LR


def _in_proportion(quota_L: IntArray, total_R: IntArray) -> IntArray:
    """Whole numbers near ``quota_L * total_R / sum``, int64 [L, R], with exact row and column sums."""
    # All slots in one row, each rank's spread evenly over it; layers take consecutive stretches.
    rank_S = np.repeat(np.arange(len(total_R)), total_R)
    number_S = np.arange(len(rank_S)) - np.repeat(total_R.cumsum() - total_R, total_R)
    order_S = rank_S[np.argsort((number_S + 0.5) / total_R[rank_S], kind="stable")]
    layer_S = np.repeat(np.arange(len(quota_L)), quota_L)
    dealt = np.bincount(layer_S * len(total_R) + order_S, minlength=len(quota_L) * len(total_R))
    return dealt.reshape(len(quota_L), len(total_R))


def _fix_row(quota_LR: IntArray, layer: int, target: int, total_R: IntArray, most: int) -> None:
    """Bring a layer's slots to ``target``, in place, as far as the bounds allow."""
    row_R = quota_LR[layer]
    while (lack := target - int(row_R.sum())) != 0:
        over_R = quota_LR.sum(0) - total_R
        free = np.flatnonzero(row_R < most if lack > 0 else row_R > 1)
        if not len(free):
            return
        sign = 1 if lack > 0 else -1
        order = np.lexsort((free, sign * row_R[free] / total_R[free], sign * np.sign(over_R[free])))
        row_R[free[order[: abs(lack)]]] += sign


def _shift_slot(quota_LR: IntArray, over_R: IntArray, most_LR: IntArray) -> bool:
    """Shift one slot, in place, from a rank with too many to one with too few; False if impossible."""
    came_from = np.full(len(over_R), -1)
    seen_R: BoolArray = over_R > 0
    frontier = np.flatnonzero(seen_R).tolist()
    lacking_R = over_R < 0
    while frontier:
        rank = frontier.pop(0)
        can_give_L = quota_LR[:, rank] > 1
        reached_R = (can_give_L[:, None] & (quota_LR < most_LR)).any(0) & ~seen_R
        came_from[reached_R] = rank
        seen_R |= reached_R
        found = np.flatnonzero(reached_R & lacking_R)
        if len(found):
            target = int(found[0])
            while (source := int(came_from[target])) >= 0:
                movable_L = (quota_LR[:, source] > 1) & (quota_LR[:, target] < most_LR[:, target])
                uneven_L = np.where(movable_L, quota_LR[:, source] - quota_LR[:, target], np.iinfo(np.int64).min)
                layer = int(uneven_L.argmax())
                quota_LR[layer, source] -= 1
                quota_LR[layer, target] += 1
                target = source
            return True
        frontier += np.flatnonzero(reached_R).tolist()
    return False


def _fix_columns(quota_LR: IntArray, quota_L: IntArray, over_R: IntArray, most_LR: IntArray) -> None:
    """Bring the ranks' sums to their totals, in place, where the layers' sums suffer least."""
    for rank in np.flatnonzero(over_R).tolist():
        sign = -1 if over_R[rank] > 0 else 1
        for _ in range(abs(int(over_R[rank]))):
            lack_L = (quota_L - quota_LR.sum(1)) * sign
            free_L = quota_LR[:, rank] > 1 if sign < 0 else quota_LR[:, rank] < most_LR[:, rank]
            quota_LR[int(np.where(free_L, lack_L, np.iinfo(np.int64).min).argmax()), rank] += sign
