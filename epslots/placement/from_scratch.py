"""A placement that ignores the current one: the copies of each expert, and their ranks. Fast, for one set of loads.

``place_afresh`` is the entry. Each further copy goes to the expert with most load per copy (as in EPLB, and D'Hondt's method).
Copies are then assigned, largest first, to the rank that would finish first, has a free slot and no copy of the expert
(longest processing time first, Graham 1969); where all ranks are alike, in rounds, which is faster. Finally the most loaded
rank swaps copies with little loaded ones.

Pure; all layers at once. Legend of shape suffixes: L layers, R ranks, E experts, S slots of all ranks.
"""

from __future__ import annotations

import numpy as np

from epslots.arrays import BoolArray, FloatArray, IntArray

# Swaps of each layer at the end, and the little loaded ranks that are tried for each.
LEVEL_SWAPS = 16
PARTNERS = 3


def copies_by_load(load_LE: FloatArray, own_LE: BoolArray, total_L: IntArray, most_L: IntArray) -> IntArray:
    """Copies of each expert, int64 [L, E]: one each, and the rest where load per copy is largest.

    Args:
        load_LE: float64, load of each expert.
        own_LE: bool, the experts that each layer has.
        total_L: copies of all experts together; at least the layer's experts.
        most_L: the most copies of one expert: the ranks that have a slot.
    """
    layers = np.arange(len(load_LE))
    copies_LE = own_LE.astype(np.int64)
    extra_L = np.minimum(total_L, most_L * own_LE.sum(1)) - own_LE.sum(1)
    per_copy_LE = np.where(own_LE & (copies_LE < most_L[:, None]), load_LE, -np.inf)
    for number in range(int(extra_L.max(initial=0))):
        hottest_L = per_copy_LE.argmax(1)
        rows = layers if number < extra_L.min() else np.flatnonzero(extra_L > number)
        hottest = hottest_L[rows]
        copies_LE[rows, hottest] += 1
        count = copies_LE[rows, hottest]
        per_copy_LE[rows, hottest] = np.where(count < most_L[rows], load_LE[rows, hottest] / count, -np.inf)
    return copies_LE


def pack(load_LE: FloatArray, copies_LE: IntArray, quota_LR: IntArray, speed_R: FloatArray) -> BoolArray:
    """The holders of each expert, bool [L, R, E]. A copy is dropped if only ranks with the same expert have a slot left.

    Args:
        load_LE, copies_LE: load of each expert, split equally over its copies.
        quota_LR: slots of each layer on each rank; together at least as many as copies.
        speed_R: relative compute speeds.
    """
    layers, experts = load_LE.shape
    rows = np.arange(layers)
    total_L = copies_LE.sum(1)
    most = int(total_L.max())
    share_LE = load_LE / np.maximum(copies_LE, 1)
    expert_SL = _by_share(load_LE, copies_LE, most).T.copy()
    share_SL = np.take_along_axis(share_LE, expert_SL.T, 1).T.copy()
    again_S = np.zeros(most, bool)
    again_S[1:] = (expert_SL[1:] == expert_SL[:-1]).any(1)
    exists_SL = np.arange(most)[:, None] < total_L  # whether the layer has so many copies
    everywhere_S = exists_SL.all(1)
    unit_R = 1 / speed_R
    alike = bool((speed_R == speed_R[0]).all())
    ranks = quota_LR.shape[1]
    holds_LRE = np.zeros((layers, ranks, experts), bool)
    room = quota_LR.ravel().copy()
    time_LR = np.where(quota_LR > 0, 0.0, np.inf)  # infinite for ranks without a free slot
    time = time_LR.reshape(-1)
    mine_LR = np.zeros((layers, ranks), bool)  # the ranks that hold the current expert
    for number in range(most):
        share_L = share_SL[number]
        then_LR = time_LR if alike else time_LR + share_L[:, None] * unit_R
        if again_S[number]:
            mine_LR &= (expert_SL[number] == expert_SL[number - 1])[:, None]
            then_LR = np.where(mine_LR, np.inf, then_LR)
        elif number + 1 < most and again_S[number + 1]:
            mine_LR[:] = False
        at = then_LR.argmin(1) + rows * ranks
        if again_S[number] or not everywhere_S[number]:
            chosen = np.flatnonzero(exists_SL[number] & np.isfinite(then_LR.reshape(-1)[at]))
            at, share_L = at[chosen], share_L[chosen]
            holds_LRE[chosen, at % ranks, expert_SL[number, chosen]] = True
        else:
            holds_LRE[rows, at % ranks, expert_SL[number]] = True
        mine_LR.reshape(-1)[at] = True
        left = room[at] - 1
        room[at] = left
        added = share_L if alike else share_L * unit_R[at % ranks]
        time[at] = np.where(left > 0, time[at] + added, np.inf)
    return holds_LRE


def deal(load_LE: FloatArray, copies_LE: IntArray, ranks: int) -> IntArray:
    """The expert of each slot, int64 [L, R, Q], for equal ranks: ``pack`` in rounds.

    In each round the largest remaining copies go to all ranks, one each, the largest to the least loaded.
    """
    layers = len(load_LE)
    rows = np.arange(layers)[:, None]
    total = int(copies_LE[0].sum())
    expert_LS = _by_share(load_LE, copies_LE, total)
    share_LS = np.take_along_axis(load_LE / np.maximum(copies_LE, 1), expert_LS, 1)
    expert_LRQ = np.full((layers, ranks, total // ranks), -1)
    time_LR = np.zeros((layers, ranks))
    for number in range(total // ranks):
        dealt_LR = expert_LS[:, number * ranks : (number + 1) * ranks]
        order_LR = np.argsort(time_LR, axis=1, kind="stable")
        if number:
            # Copies of one expert are neighbours: those of the last round's last expert may continue in this round.
            straddling = np.flatnonzero(dealt_LR[:, 0] == expert_LS[:, number * ranks - 1])
            if len(straddling):
                order_LR[straddling] = _keep_apart(order_LR[straddling], dealt_LR[straddling], expert_LRQ[straddling])
        expert_LRQ[rows, order_LR, number] = dealt_LR
        time_LR[rows, order_LR] += share_LS[:, number * ranks : (number + 1) * ranks]
    return expert_LRQ


def _keep_apart(order_LR: IntArray, dealt_LR: IntArray, expert_LRQ: IntArray) -> IntArray:
    """The order of ranks, int64 [L, R], changed so that no rank gets an expert twice; only the round's first expert could.

    Ranks that have it already come after as many other ranks as it has copies in the round.
    """
    first_L1 = dealt_LR[:, :1]
    has_LR = np.take_along_axis((expert_LRQ == first_L1[:, :, None]).any(2), order_LR, 1)
    later_L1 = (dealt_LR == first_L1).sum(1, keepdims=True) + has_LR.sum(1, keepdims=True)
    place_LR = np.broadcast_to(np.arange(order_LR.shape[1]), order_LR.shape)
    changed_LR = np.argsort(np.where(has_LR, np.maximum(place_LR, later_L1), place_LR), axis=1, kind="stable")
    return np.take_along_axis(order_LR, changed_LR, 1)


def _by_share(load_LE: FloatArray, copies_LE: IntArray, most: int) -> IntArray:
    """Experts by load per copy, the largest first, each repeated by its copies, int64 [L, most]."""
    layers, experts = load_LE.shape
    share_LE = np.where(copies_LE > 0, load_LE / np.maximum(copies_LE, 1), -1.0)
    order_LE = np.argsort(-share_LE, axis=1, kind="stable")
    end_LE = np.take_along_axis(copies_LE, order_LE, 1).cumsum(1)
    steps_LS = np.zeros((layers, most + 1), np.int64)
    np.add.at(steps_LS, (np.arange(layers)[:, None], np.minimum(end_LE, most)), 1)
    number_LS = np.minimum(steps_LS[:, :most].cumsum(1), experts - 1)
    return np.take_along_axis(order_LE, number_LS, 1)


def level(
    expert_LRQ: IntArray, load_LE: FloatArray, speed_R: FloatArray, most_swaps: int, usable_LRQ: BoolArray | None = None
) -> None:
    """Lower each layer's largest rank load, in place: its most loaded rank swaps copies with little loaded ranks.

    Each swap is the one after which the larger of the two loads is smallest; swaps end when none helps.

    Args:
        expert_LRQ: the expert of each slot, -1 = empty.
        load_LE: load of each expert, split equally over its copies.
        speed_R: relative compute speeds.
        most_swaps: of each layer.
        usable_LRQ: bool, the slots that exist; all, if not given.
    """
    layers, _, room = expert_LRQ.shape
    copies_LE = np.zeros((layers, load_LE.shape[1] + 1), np.int64)
    np.add.at(copies_LE, (np.arange(layers)[:, None], expert_LRQ.reshape(layers, -1)), 1)
    share_LE = np.zeros(copies_LE.shape)
    share_LE[:, :-1] = load_LE / np.maximum(copies_LE[:, :-1], 1)
    share_LRQ = share_LE[np.arange(layers)[:, None, None], expert_LRQ]
    time_LR = share_LRQ.sum(2) / speed_R
    active = np.arange(layers)
    for _ in range(most_swaps):
        order = np.argsort(time_LR[active], axis=1)
        worst, least = order[:, -1], order[:, :PARTNERS]
        rows = np.arange(len(active))
        top = time_LR[active, worst]
        mine, theirs = expert_LRQ[active, worst], expert_LRQ[active[:, None], least]
        differ = share_LRQ[active, worst][:, :, None, None] - share_LRQ[active[:, None], least][:, None]
        here = top[:, None, None, None] - differ / speed_R[worst][:, None, None, None]
        there = np.take_along_axis(time_LR[active], least, 1)[:, None, :, None] + differ / speed_R[least][:, None, :, None]
        larger = np.maximum(here, there)
        if usable_LRQ is not None:
            larger = np.where(usable_LRQ[active, worst][:, :, None, None], larger, np.inf)
            larger = np.where(usable_LRQ[active[:, None], least][:, None], larger, np.inf)
        larger = larger.reshape(len(active), -1)
        best = larger.argmin(1)
        place, rest = np.divmod(best, least.shape[1] * room)
        other, position = np.divmod(rest, room)
        one, two, rank = mine[rows, place], theirs[rows, other, position], least[rows, other]
        # A layer is finished when its best swap would put an expert on a rank twice: seldom, and it is well levelled by then.
        barred = (theirs[rows, other] == one[:, None]).any(1) & (one >= 0) | (mine == two[:, None]).any(1) & (two >= 0)
        helps = (larger[rows, best] < top * (1 - 1e-9)) & ~barred & (rank != worst)
        active, place, position = active[helps], place[helps], position[helps]
        one, two, rank, worst = one[helps], two[helps], rank[helps], worst[helps]
        if not len(active):
            break
        expert_LRQ[active, worst, place], expert_LRQ[active, rank, position] = two, one
        moved = share_LE[active, one] - share_LE[active, two]
        share_LRQ[active, worst, place] -= moved
        share_LRQ[active, rank, position] += moved
        time_LR[active, worst] -= moved / speed_R[worst]
        time_LR[active, rank] += moved / speed_R[rank]


def slots_of(holds_LRE: BoolArray, room: int) -> IntArray:
    """The expert in each slot, int64 [L, S], ``room`` slots for each rank in turn, -1 = empty."""
    layers, ranks, _ = holds_LRE.shape
    expert_LRQ = np.full((layers, ranks, room), -1)
    layer, rank, expert = np.nonzero(holds_LRE)
    first = np.searchsorted(layer * ranks + rank, np.arange(layers * ranks))
    expert_LRQ[layer, rank, np.arange(len(layer)) - first[layer * ranks + rank]] = expert
    return expert_LRQ.reshape(layers, -1)


def holds_of(expert_LRQ: IntArray, experts: int) -> BoolArray:
    """The holders of each expert, bool [L, R, E], from the expert in each slot, int64 [L, R, Q]."""
    layers, ranks, _ = expert_LRQ.shape
    holds_LRE = np.zeros((layers, ranks, experts + 1), bool)
    holds_LRE[np.arange(layers)[:, None, None], np.arange(ranks)[:, None], expert_LRQ] = True
    return holds_LRE[:, :, :experts]


def place_afresh(load_LE: FloatArray, own_LE: BoolArray, quota_LR: IntArray, speed_R: FloatArray) -> BoolArray:
    """The holders of each expert, bool [L, R, E], chosen without regard to the current ones.

    Args:
        load_LE: float64, load of each expert.
        own_LE: bool, the experts that each layer has.
        quota_LR: slots of each layer on each rank; together at least as many as experts.
        speed_R: relative compute speeds.
    """
    total_L = quota_LR.sum(1)
    copies_LE = copies_by_load(load_LE, own_LE, total_L, (quota_LR > 0).sum(1))
    room, ranks = int(quota_LR.max()), quota_LR.shape[1]
    alike = int(quota_LR.min()) == room and bool((speed_R == speed_R[0]).all())
    if alike and (copies_LE.sum(1) == total_L).all():
        expert_LRQ = deal(load_LE, copies_LE, ranks)
    else:
        expert_LRQ = slots_of(pack(load_LE, copies_LE, quota_LR, speed_R), room).reshape(len(load_LE), ranks, room)
    usable_LRQ = None if alike else np.arange(room) < quota_LR[:, :, None]
    level(expert_LRQ, load_LE, speed_R, LEVEL_SWAPS, usable_LRQ)
    return holds_of(expert_LRQ, load_LE.shape[1])
