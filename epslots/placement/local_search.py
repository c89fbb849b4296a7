"""Improve a placement move by move: swap two copies, or put an expert into a slot. ``planner.propose`` runs ``Search``.

Minimised is the expected *excess* (the largest rank load over the mean, less 1) plus a price for every new copy. Ranks differ
because their expected loads differ, and because the loads of their experts vary together. Both are in the sum of squares

    F = sum over ranks of E[(load / speed)^2]  =  sum over ranks of a' G a / speed^2,    G = E[x x'] of the experts' loads x,

where a rank's row ``a`` is the share of each expert that it computes (1 / copies). A move changes few entries of ``a``, so
that its change of F follows from G and the products a G, for all moves at once. The largest of R normal numbers of variance v
exceeds their mean by about k(R) sqrt(v) (order statistics), which turns F into an excess. Pure; all layers at once.

Legend of shape suffixes: L layers, R ranks, E experts, S slots of all ranks, P and Q slots of the ranks that are searched.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from epslots.arrays import BoolArray, FloatArray, IntArray

_LEAST_GAIN = 1e-6  # smaller gains are rounding errors
_PROHIBITIVE = 1e12  # the price of a forbidden move
_PARTNERS = 8  # the least loaded ranks, with which swaps are tried
EMPTY = -1


@dataclass(frozen=True)
class Objective:
    """The loads that are levelled, over which ranks and nodes.

    Attributes:
        moments_LEE: second moments of the experts' loads, layer totals scaled to the number of ranks (mean rank load 1).
        speed_R: relative compute speeds, mean 1.
        node_R: the node of each rank, from 0.
        node_weight: the weight of the nodes' excess relative to the ranks'; 0: nodes are ignored.
    """

    moments_LEE: FloatArray
    speed_R: FloatArray
    node_R: IntArray
    node_weight: float = 0.0


def spread_factor(ranks: int) -> float:
    """Standard deviations by which the largest of ``ranks`` normal numbers exceeds their mean (Blom's approximation)."""
    from_below = (ranks - 0.375) / (ranks + 0.25)
    # The normal quantile, by the rational approximation of Abramowitz and Stegun 26.2.23.
    t = float(np.sqrt(-2 * np.log(1 - from_below))) if ranks > 1 else 0.0
    top = 2.515517 + 0.802853 * t + 0.010328 * t * t
    return max(0.0, t - top / (1 + 1.432788 * t + 0.189269 * t * t + 0.001308 * t**3)) if ranks > 1 else 0.0


@dataclass(frozen=True)
class _View:
    """The layers that are searched in one step, and slots of their ranks.

    Attributes:
        layers, rows: their indices, and 0, 1, 2...: [L, 1] each.
        holds: copies, [L, R, E].
        count, share: the number of copies of each expert, and the share that each computes, [L, E].
        slope: half of the derivative of F by each rank's share of each expert, [L, R, E].
        price: price of a copy on each rank, 0 for old ones, [L, R, E].
        entry: the same, prohibitive where the rank holds the expert already.
        slot_P, expert_P, rank_P: slots of the most loaded ranks, their experts and ranks, [L, P] each.
        slot_Q, expert_Q, rank_Q: the same of the least loaded ranks, with which they may swap.
        barred_P, barred_Q: prohibitive for slots that the layer doesn't have, else 0.
    """

    layers: IntArray
    rows: IntArray
    holds: BoolArray
    count: IntArray
    share: FloatArray
    slope: FloatArray
    price: FloatArray
    entry: FloatArray
    slot_P: IntArray
    slot_Q: IntArray
    expert_P: IntArray
    expert_Q: IntArray
    rank_P: IntArray
    rank_Q: IntArray
    barred_P: FloatArray
    barred_Q: FloatArray


class Search:
    """Slots of all layers, and the moves that improve them.

    Attributes:
        expert_LS: int64, the expert in each slot, rank by rank; -1 = empty.
        holds_LRE: the holders of each expert; one more column stands for "empty", and is False.
    """

    def __init__(
        self, expert_LS: IntArray, rank_S: IntArray, usable_LS: BoolArray, objective: Objective, before_LRE: BoolArray
    ) -> None:
        """Start from a placement.

        Args:
            expert_LS: the expert in each slot; no expert twice on a rank, every expert in some slot.
            rank_S: the rank of each slot.
            usable_LS: the slots that each layer has.
            objective: the loads that are levelled.
            before_LRE: copies that cost nothing.
        """
        layers, ranks, experts = before_LRE.shape
        self.rank_S, self.usable_LS = rank_S, usable_LS
        self.expert_LS = np.where(usable_LS, expert_LS, EMPTY)
        speed_R, node_R = objective.speed_R, objective.node_R
        node_speed = np.bincount(node_R, weights=speed_R)[node_R]
        # Squares per speed: at the optimum all ranks, and all nodes, finish at the same time.
        self._form_RR = np.diag(1 / speed_R) + objective.node_weight * (node_R[:, None] == node_R) / node_speed
        self._least = (1 + objective.node_weight) * ranks
        self._scale = spread_factor(ranks) / np.sqrt(ranks)
        self.holds_LRE = np.zeros((layers, ranks, experts + 1), bool)
        self.holds_LRE[np.arange(layers)[:, None], rank_S, self.expert_LS] = True
        self.holds_LRE[:, :, EMPTY] = False
        self._new_LRE = np.zeros((layers, ranks, experts + 1), np.int64)
        self._new_LRE[:, :, :experts] = ~before_LRE
        self._moments_LEE = np.zeros((layers, experts + 1, experts + 1))
        self._moments_LEE[:, :experts, :experts] = objective.moments_LEE
        self._own_LE = np.diagonal(self._moments_LEE, axis1=1, axis2=2)
        share_LRE = self.holds_LRE / np.maximum(self.holds_LRE.sum(1), 1)[:, None]
        self._product_LRE = share_LRE @ self._moments_LEE
        self._total_L = np.einsum("lre,lre->l", self._form_RR @ self._product_LRE, share_LRE)

    def excess(self) -> FloatArray:
        """Expected largest load / mean load - 1, float64 [L]."""
        return self._excess(self._total_L)

    def _excess(self, total: FloatArray) -> FloatArray:
        result: FloatArray = self._scale * np.sqrt(np.maximum(total - self._least, 0.0))
        return result

    def copies(self) -> IntArray:
        """The number of new copies, int64 [L]."""
        added: IntArray = (self._new_LRE * self.holds_LRE).sum((1, 2))
        return added

    def improve(self, price_L: FloatArray, most_moves: int, focus: int) -> IntArray:
        """Make the best move of each layer again and again, until none pays; returns the moves made, int64 [L].

        Args:
            price_L: the excess that a new copy must save.
            most_moves: of each layer.
            focus: moves of the slots of so many most loaded ranks are tried.
        """
        moves_L = np.zeros(len(self.expert_LS), np.int64)
        active = np.arange(len(self.expert_LS))
        for _ in range(most_moves):
            if not len(active):
                break
            active = active[self._step(active, price_L[active], focus)]
            moves_L[active] += 1
        return moves_L

    def _step(self, active: IntArray, price: FloatArray, focus: int) -> BoolArray:
        """Make the best move of each of these layers if it pays; returns whether it did, bool [n]."""
        view = self._view(active, price, focus)
        rows = np.arange(len(active))
        total = self._total_L[active][:, None, None]
        then = [self._excess(total + change) + price for change, price in (self._swaps(view), self._puts(view))]
        flat = [table.reshape(len(active), -1) for table in then]
        best = np.stack([table.argmin(1) for table in flat])
        least = np.stack([table[rows, chosen] for table, chosen in zip(flat, best, strict=True)])
        kind = least.argmin(0)
        paying: BoolArray = self._excess(total[:, 0, 0]) - least.min(0) > _LEAST_GAIN
        place, other = np.divmod(best[kind, rows], np.where(kind == 0, then[0].shape[2], then[1].shape[2]))
        slot, partner = view.slot_P[rows, place], view.slot_Q[rows, np.where(kind == 0, other, 0)]
        swapped, put = paying & (kind == 0), paying & (kind == 1)
        self._swap(active[swapped], slot[swapped], partner[swapped])
        self._put(active[put], slot[put], other[put])
        return paying

    def _view(self, active: IntArray, price: FloatArray, focus: int) -> _View:
        """The arrays from which the moves of some layers are evaluated; ``price``: of a copy, [n]."""
        holds = self.holds_LRE[active]
        count = holds.sum(1)
        slope = self._form_RR @ self._product_LRE[active]
        rows = np.arange(len(active))[:, None]
        share = np.where(count > 0, 1 / np.maximum(count, 1), 0.0)
        order = np.argsort(-np.einsum("lre,lre->lr", slope, holds * share[:, None]), axis=1, kind="stable")
        slot_P, slot_Q = self._slots(order[:, :focus]), self._slots(order[:, -_PARTNERS:])
        barred = np.where(self.usable_LS[active], 0.0, _PROHIBITIVE)
        price_of_copy = self._new_LRE[active] * price[:, None, None]
        return _View(
            layers=active[:, None],
            rows=rows,
            holds=holds,
            count=count,
            share=share,
            slope=slope,
            price=price_of_copy,
            entry=price_of_copy + np.where(holds, _PROHIBITIVE, 0.0),
            slot_P=slot_P,
            slot_Q=slot_Q,
            expert_P=self.expert_LS[active[:, None], slot_P],
            expert_Q=self.expert_LS[active[:, None], slot_Q],
            rank_P=self.rank_S[slot_P],
            rank_Q=self.rank_S[slot_Q],
            barred_P=barred[rows, slot_P],
            barred_Q=barred[rows, slot_Q],
        )

    def _slots(self, rank: IntArray) -> IntArray:
        """Slots of some ranks of each layer, int64 [L, ranks x room]."""
        room = len(self.rank_S) // len(self._form_RR)
        slots: IntArray = (rank[:, :, None] * room + np.arange(room)).reshape(len(rank), -1)
        return slots

    def _swaps(self, view: _View) -> tuple[FloatArray, FloatArray]:
        """The change of F and the price, [L, P, Q] each, of swapping slots p and q; one may be empty."""
        rows, rank_P, expert_P, rank_Q, expert_Q = view.rows, view.rank_P, view.expert_P, view.rank_Q, view.expert_Q
        own = self._own_LE[view.layers[:, 0]]
        share_P, share_Q = view.share[rows, expert_P], view.share[rows, expert_Q]
        crossed = (rows[:, :, None], rank_P[:, :, None], expert_Q[:, None])  # rank of p, expert of q
        back = (rows[:, :, None], np.arange(view.holds.shape[1]), expert_P[:, :, None])  # expert of p, each rank: [L, P, R]
        at_P, at_Q = (rows, rank_P, expert_P), (rows, rank_Q, expert_Q)
        form = np.diagonal(self._form_RR)
        apart = form[rank_P][:, :, None] + form - 2 * self._form_RR[rank_P]  # [L, P, R]
        # Terms that depend on q's rank and not on its expert are computed per rank first.
        share_P2, share_Q2 = share_P[:, :, None], share_Q[:, None]
        gone = (2 * share_P2) * (view.slope[back] - view.slope[at_P][:, :, None])
        gone += apart * (share_P**2 * own[rows, expert_P])[:, :, None]
        leave = view.entry[back] + (view.barred_P - view.price[at_P])[:, :, None]
        leave[rows, np.arange(rank_P.shape[1]), rank_P] += _PROHIBITIVE
        of_rank = np.broadcast_to(rank_Q[:, None], (len(rows), rank_P.shape[1], rank_Q.shape[1]))
        change, apart, price = (np.take_along_axis(table, of_rank, 2) for table in (gone, apart, leave))
        pair = self._moments_LEE[view.layers[:, :, None], expert_P[:, :, None], expert_Q[:, None]]
        change += share_Q2 * (2 * (view.slope[crossed] - view.slope[at_Q][:, None]) - (2 * share_P2) * apart * pair)
        change += apart * (share_Q**2 * own[rows, expert_Q])[:, None]
        price += view.entry[crossed]
        price += (view.barred_Q - view.price[at_Q])[:, None]
        return change, price

    def _puts(self, view: _View) -> tuple[FloatArray, FloatArray]:
        """The change of F and the price, [L, P, E] each, of putting expert f into slot p.

        The slot is empty, or its expert has other copies.

        With c copies of p's expert e, its other holders' shares rise by 1/c(c-1) and the slot's 1/c goes; with c of f, all
        its holders' shares fall by 1/c(c+1), and the slot's rank gets 1/(c+1).
        """
        rows, rank_P, expert_P, slope = view.rows, view.rank_P, view.expert_P, view.slope
        own = self._own_LE[view.layers[:, 0]]
        held = view.holds.astype(np.float64)
        spread = self._form_RR @ held  # the form applied to each expert's ranks
        alone = np.einsum("lre,lre->le", held, spread)
        pull = np.einsum("lre,lre->le", held, slope)
        among_P = held[rows, :, expert_P] @ spread  # [L, P, E]: the form between the ranks of slot p's expert and another's
        empty_P = expert_P == EMPTY
        count_P = np.where(empty_P, 2, view.count[rows, expert_P])
        lost_P = np.where(empty_P, 0.0, 1 / np.maximum(count_P - 1, 1))  # as if all shares rose, the slot's too
        rise_P = lost_P / count_P
        grown = 1 / (view.count + 1)
        fall = grown * view.share
        at_P = (rows, rank_P, expert_P)
        form_P, slope_P, spread_P = np.diagonal(self._form_RR)[rank_P], slope[rows, rank_P], spread[rows, rank_P]
        leave = 2 * (rise_P * pull[rows, expert_P] - lost_P * slope[at_P]) + own[rows, expert_P] * (
            rise_P**2 * alone[rows, expert_P] - 2 * rise_P * lost_P * spread[at_P] + lost_P**2 * form_P
        )
        enter = (own * fall**2 * alone - 2 * fall * pull)[:, None] + (2 * grown)[:, None] * slope_P
        enter += (own * grown**2)[:, None] * form_P[:, :, None] - (2 * own * fall * grown)[:, None] * spread_P
        both = grown[:, None] * (rise_P * spread[at_P] - lost_P * form_P)[:, :, None]
        both += fall[:, None] * (lost_P[:, :, None] * spread_P - rise_P[:, :, None] * among_P)
        change = leave[:, :, None] + enter + 2 * self._moments_LEE[view.layers, expert_P] * both
        stuck_P = view.barred_P + np.where(count_P < 2, _PROHIBITIVE, 0.0) - view.price[at_P]
        # The layer doesn't have experts without a copy.
        price = view.entry[rows, rank_P] + stuck_P[:, :, None] + np.where(view.count == 0, _PROHIBITIVE, 0.0)[:, None]
        return change, price

    def _swap(self, layer: IntArray, first: IntArray, second: IntArray) -> None:
        before = self._shares(layer, self.expert_LS[layer, first]), self._shares(layer, self.expert_LS[layer, second])
        one, two = self.expert_LS[layer, first], self.expert_LS[layer, second]
        self.holds_LRE[layer, self.rank_S[first], one] = False
        self.holds_LRE[layer, self.rank_S[second], two] = False
        self.expert_LS[layer, first], self.expert_LS[layer, second] = two, one
        self.holds_LRE[layer, self.rank_S[first], two] = True
        self.holds_LRE[layer, self.rank_S[second], one] = True
        self._update(layer, one, two, *before)

    def _put(self, layer: IntArray, slot: IntArray, expert: IntArray) -> None:
        replaced = self.expert_LS[layer, slot]
        before = self._shares(layer, replaced), self._shares(layer, expert)
        self.holds_LRE[layer, self.rank_S[slot], replaced] = False
        self.holds_LRE[layer, self.rank_S[slot], expert] = True
        self.expert_LS[layer, slot] = expert
        self._update(layer, replaced, expert, *before)

    def _shares(self, layer: IntArray, expert: IntArray) -> FloatArray:
        """Each rank's share of one expert of each layer, [n, R]."""
        held = self.holds_LRE[layer, :, expert] & (expert != EMPTY)[:, None]
        shares: FloatArray = held / np.maximum(held.sum(1, keepdims=True), 1)
        return shares

    def _update(self, layer: IntArray, one: IntArray, two: IntArray, before_one: FloatArray, before_two: FloatArray) -> None:
        """Update the products and F after a change of the copies of two experts."""
        self.holds_LRE[layer, :, EMPTY] = False
        change_one, change_two = self._shares(layer, one) - before_one, self._shares(layer, two) - before_two
        added = (
            change_one[:, :, None] * self._moments_LEE[layer, one][:, None]
            + change_two[:, :, None] * self._moments_LEE[layer, two][:, None]
        )
        middle = self._form_RR @ (2 * self._product_LRE[layer] + added)
        rows = np.arange(len(layer))
        self._total_L[layer] += (middle[rows, :, one] * change_one).sum(1) + (middle[rows, :, two] * change_two).sum(1)
        self._product_LRE[layer] += added
