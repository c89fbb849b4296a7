"""A layer's past uses of experts, and how likely each expert is used next. Integers only.

``MoELayer`` and the simulator call ``note_use`` once a step and layer; eviction policies (``cache_policy.py``) read the
``UseHistory``. Read ``UseHistory`` first, then ``note_use``, then ``expected_use``, the score of the ``adaptive`` policy.

All arithmetic is shifts, adds and products of integers: numpy on the host, the kernels of captured decoding and the simulator
agree to the bit. The constants below are part of that agreement.

Legend of shape suffixes: R ranks, E experts of the layer, D decay rows, U experts that a step uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epslots.arrays import BoolArray, IntArray
from epslots.compiled import compiled
from epslots.errors import ConfigError

# One use, in fixed point.
_USE_BITS = 16
USE = 1 << _USE_BITS
# Decay row d loses 1/2^SHIFTS[d] of each sum at every step. One more row is a snapshot of the slowest row's sums, taken at
# steps 1, 2, 4, .. and then every SNAPSHOT_EVERY steps.
SHIFTS = (1, 3, 4, 5, 7, 9)
RECENT, FREQUENT, SLOWEST = SHIFTS.index(4), SHIFTS.index(7), len(SHIFTS) - 1
ROWS = len(SHIFTS) + 1
SNAPSHOT_EVERY = 512
# Left shifts that turn each row's sums into shares of the steps on one scale, that of the slowest row.
SCALE_SHIFTS_D = np.array([SHIFTS[-1] - shift for shift in (*SHIFTS, SHIFTS[-1])])
# The low bits of a score hold the step of the last use: among equal frequencies the more recent expert stays.
STEP_BITS = 32

# Each row's hit counter loses 1/2^_HITS_SHIFT at every step. It begins as if the row had hit all of _FIRST_USES uses.
_HITS_SHIFT = 9
_FIRST_USES = 64
_FIRST_WEIGHTS_D = (1, 1, 1, 2, 16, 8, 1)
# A row's weight halves with each 1/2^_HALVING_SHIFT of all uses that it hits less than the best row; by quarters of a halving.
_HALVING_SHIFT = 9
_HALVED = tuple(round(2**30 * 2 ** (-quarter / 4)) for quarter in range(128))
_MOST_QUARTERS = len(_HALVED) - 1
_WEIGHT_BITS = 8
_WEIGHT_SUM = 1 << _WEIGHT_BITS

# A row of ``follows`` loses 1/2^_FOLLOW_SHIFT at each use of its expert; an expert that always follows has 2^_FOLLOW_BITS.
_FOLLOW_SHIFT = 5
_FOLLOW_BITS = 14
_FOLLOWED = np.int16(1 << (_FOLLOW_BITS - _FOLLOW_SHIFT))
# A step that uses more than 1/4 of the experts says little about the next step, and would be slow to learn from.
_FOLLOW_EXPERTS_SHARE = 4
# ``follows`` counts only while it predicts uses better than this decay row does, by 1/2^_LEAD_SHIFT of a use for each use.
# The two are compared every COMPARE_EVERY steps; the lead loses 1/2^_LEAD_DECAY_SHIFT at each comparison.
_COMPARED_ROW = SHIFTS.index(5)
_COMPARED_SHIFT = _USE_BITS + SHIFTS[_COMPARED_ROW] - _FOLLOW_BITS
_LEAD_SHIFT = 7
COMPARE_EVERY = 16
_LEAD_DECAY_SHIFT = 6
# Expected uses come as 2^25 times _WEIGHT_SUM. SCORE_SHIFT leaves 29 bits, so that a score with its step fits into an int64.
_SHARE_BITS = 29
SCORE_SHIFT = _USE_BITS + SHIFTS[-1] + _WEIGHT_BITS - _SHARE_BITS
# Passed to the kernel in place of a number of slots.
_USES_ONLY = -1


@dataclass(frozen=True)
class UseHistory:
    """Past uses of every expert: of all layers, or of one, a layer's history, whose arrays lack the first axis.

    Attributes:
        last_use: int64 [layers, E], the layer's step of the expert's last use, counted from 1; 0 = never.
        decayed: int64 [layers, D, E], uses, decaying at several rates (``SHIFTS``); the last row is a snapshot.
        holds: bool [layers, D, E], the experts that a cache of the layer's size would hold if it evicted by that row alone.
        follows: int16 [layers, E, E], how often a use of the first expert was followed by one of the second a step later.
        hits: int64 [layers, D + 2], uses that each row's cache has hit; all uses; the lead of ``follows`` over a decay row in
            predicting the next step.
        weights: int64 [layers, D], each row's weight in ``expected_use``, from its hits.
    """

    last_use: IntArray
    decayed: IntArray
    holds: BoolArray
    follows: NDArray[np.int16]
    hits: IntArray
    weights: IntArray

    @classmethod
    def empty(cls, layers: int, experts: int) -> UseHistory:
        """A history without uses, of ``layers`` layers with at most ``experts`` experts each."""
        return cls(
            np.zeros((layers, experts), np.int64),
            np.zeros((layers, ROWS, experts), np.int64),
            np.zeros((layers, ROWS, experts), bool),
            np.zeros((layers, experts, experts), np.int16),
            np.zeros((layers, ROWS + 2), np.int64),
            np.tile(np.array(_FIRST_WEIGHTS_D) * _WEIGHT_SUM // sum(_FIRST_WEIGHTS_D), (layers, 1)),
        )

    def layer(self, layer: int, experts: int) -> UseHistory:
        """The history of one layer with ``experts`` experts; its arrays are views."""
        return UseHistory(
            self.last_use[layer, :experts],
            self.decayed[layer, :, :experts],
            self.holds[layer, :, :experts],
            self.follows[layer, :experts, :experts],
            self.hits[layer],
            self.weights[layer],
        )

    @property
    def recent(self) -> IntArray:
        """Uses of about the last dozen steps (each step loses 1/16 of the sum), int64 [.., E]."""
        return self.decayed[..., RECENT, :]

    @property
    def frequent(self) -> IntArray:
        """Uses of about the last hundred steps (each step loses 1/128 of the sum), int64 [.., E]."""
        return self.decayed[..., FREQUENT, :]

    def pack(self) -> bytes:
        """A layer's history as bytes, for ``unpack``. ``follows`` is left out: it is large, and soon learned again."""
        return b"".join(array.tobytes() for array in self._packed())

    def unpack(self, content: bytes) -> None:
        """Overwrite a layer's history, in place, by one that ``pack`` made; ``follows`` becomes empty.

        Ranks stay equal only if the rank that packed the history unpacks it, too.

        Raises:
            ConfigError: the bytes are not a history of as many experts.
        """
        size = sum(array.nbytes for array in self._packed())
        if len(content) != size:
            raise ConfigError(f"a history of {len(content)} bytes; allowed for {len(self.last_use)} experts: {size}")
        start = 0
        for array in self._packed():
            array[...] = np.frombuffer(content, array.dtype, array.size, start).reshape(array.shape)
            start += array.nbytes
        self.follows[...] = 0

    def _packed(self) -> tuple[NDArray[Any], ...]:
        return self.last_use, self.decayed, self.holds, self.hits, self.weights


@compiled("b1[::1](int64[:, :])")
def used_experts(counts_RE: IntArray) -> BoolArray:
    """The experts that a step uses on any rank, bool [E], from the pairs of each rank's tokens."""
    ranks, experts = counts_RE.shape
    used_E = np.zeros(experts, np.bool_)
    for rank in range(ranks):
        for expert in range(experts):
            used_E[expert] |= counts_RE[rank, expert] > 0
    return used_E


def note_use(history: UseHistory, used_E: BoolArray, step: int, slots: int | None = None) -> None:
    """Enter one step of a layer into its history, in place.

    Args:
        used_E: the experts that the step uses, on any rank.
        step: the layer's step, counted from 1.
        slots: slots of the layer, over all ranks. None: only the uses are entered, which is enough for policies that don't
            learn (``cache_policy.learns``).
    """
    arrays = (history.last_use, history.decayed, history.holds, history.follows, history.hits, history.weights)
    _note_use(*arrays, used_E, step, _USES_ONLY if slots is None else slots)


def expected_use(history: UseHistory) -> IntArray:
    """How likely each expert of a layer is used in the next step, as scores, int64 [E].

    A blend of the decay rows, each with the weight that it has earned on this traffic at this number of slots; to it is added
    how often each expert follows those just used. Weights halve with each bit of loss (weighted majority: Littlestone and
    Warmuth, Information and Computation 1994; for caches as in LeCaR, Vietri et al., HotStorage 2018). A row's loss is that of
    a simulated cache of the same size that evicts by the row alone. (Stack distances would flatter the slow rows: they don't
    see evictions.) The snapshot row serves cyclic use, where every order that follows the uses misses all experts, and a fixed
    order keeps those that fit.
    """
    score_E = np.empty_like(history.last_use)
    _expected_use(history.last_use, history.decayed, history.follows, history.hits, history.weights, score_E)
    return score_E


@compiled("void(b1[:, :], int64[::1], int64[::1], b1[::1], int64)")
def _weigh_rows(holds_DE: BoolArray, hits: IntArray, weights_D: IntArray, used_E: BoolArray, uses: int) -> None:
    """Count the step's hits of each row's cache, and set the rows' weights by their hits."""
    rows, experts = holds_DE.shape
    most = total = 0
    for row in range(rows):
        found = 0
        for expert in range(experts):
            found += holds_DE[row, expert] and used_E[expert]
        hits[row] += (found << _HITS_SHIFT) - (hits[row] >> _HITS_SHIFT)
        most = max(most, hits[row])
    hits[rows] += (uses << _HITS_SHIFT) - (hits[rows] >> _HITS_SHIFT)
    base = hits[rows] + (_FIRST_USES << _HITS_SHIFT)
    for row in range(rows):
        quarters = ((most - hits[row]) << (_HALVING_SHIFT + 2)) // base
        weights_D[row] = _FIRST_WEIGHTS_D[row] * _HALVED[min(quarters, _MOST_QUARTERS)]
        total += weights_D[row]
    for row in range(rows):
        weights_D[row] = weights_D[row] * _WEIGHT_SUM // total


@compiled("int64(int64[::1], int64, int64)")
def _select_nth(values: IntArray, count: int, nth: int) -> int:
    """The value at place ``nth`` of the first ``count`` in rising order; sorts in place as far as needed (Hoare's Find)."""
    left, right = 0, count - 1
    while left < right:
        pivot, low, high = values[nth], left, right
        while low <= high:
            while values[low] < pivot:
                low += 1
            while pivot < values[high]:
                high -= 1
            if low <= high:
                values[low], values[high] = values[high], values[low]
                low, high = low + 1, high - 1
        if high < nth:
            left = low
        if nth < low:
            right = high
    return int(values[nth])


@compiled("void(int64[:, :], int64[::1], b1[:, :], b1[::1], int64, int64)")
def _update_row_caches(
    decayed_DE: IntArray, last_use_E: IntArray, holds_DE: BoolArray, used_E: BoolArray, uses: int, slots: int
) -> None:
    """Each row's simulated cache after the step: used experts come in, the row's lowest are evicted.

    Where the step uses more experts than there are slots, used ones may be evicted, too: close to ``plan_evictions``.
    """
    rows, experts = holds_DE.shape
    score_E = np.empty(experts, np.int64)  # of the experts that may be evicted, one after the other
    for row in range(rows):
        held = places = 0
        for expert in range(experts):
            holds_DE[row, expert] |= used_E[expert]
            held += holds_DE[row, expert]
            if holds_DE[row, expert] and (uses > slots or not used_E[expert]):
                score_E[places] = (decayed_DE[row, expert] << STEP_BITS) + last_use_E[expert]
                places += 1
        evicted = held - slots
        if evicted <= 0:
            continue
        highest = _select_nth(score_E, places, evicted - 1)  # of the evicted experts
        ties = evicted
        for place in range(places):
            ties -= score_E[place] < highest
        for expert in range(experts):
            if holds_DE[row, expert] and (uses > slots or not used_E[expert]):
                score = (decayed_DE[row, expert] << STEP_BITS) + last_use_E[expert]
                ties -= score == highest
                holds_DE[row, expert] = score > highest or (score == highest and ties < 0)


@compiled("void(int16[:, :], int64[::1], int64[::1])")
def _predict_next(follows_EE: NDArray[np.int16], now_U: IntArray, share_E: IntArray) -> None:
    """Expected uses in the step after one that uses ``now_U``, in 2^-_FOLLOW_BITS; together as many as ``now_U`` has."""
    experts, total = len(share_E), 0
    share_E[:] = 0
    for now in now_U:
        for expert in range(experts):
            share_E[expert] += follows_EE[now, expert]
    for expert in range(experts):
        total += share_E[expert]
    for expert in range(experts):  # a step uses an expert once
        share_E[expert] = min(share_E[expert] * (len(now_U) << _FOLLOW_BITS) // max(1, total), 1 << _FOLLOW_BITS)


@compiled("int64(int64[::1], int64[::1])")
def _brier_score(share_E: IntArray, used_U: IntArray) -> int:
    """The quadratic score of shares (of 2^_FOLLOW_BITS) as a prediction, best for the true shares (Brier 1950)."""
    right = squares = 0
    for used in used_U:
        right += share_E[used]
    for share in share_E:
        squares += share * share
    return 2 * right - (squares >> _FOLLOW_BITS)


@compiled("void(int16[:, :], int64[:, :], int64[::1], int64[::1], int64[::1], int64)")
def _learn_follows(
    follows_EE: NDArray[np.int16], decayed_DE: IntArray, hits: IntArray, before_U: IntArray, used_U: IntArray, step: int
) -> None:
    """Enter which experts followed those of the last step; every COMPARE_EVERY steps, score the prediction first."""
    experts, lead = len(follows_EE), len(hits) - 1
    if max(len(before_U), len(used_U)) > max(1, experts // _FOLLOW_EXPERTS_SHARE):
        return
    if step % COMPARE_EVERY == 0:
        share_E = np.empty(experts, np.int64)
        _predict_next(follows_EE, before_U, share_E)
        gain = _brier_score(share_E, used_U) - (len(used_U) << (_FOLLOW_BITS - _LEAD_SHIFT))
        for expert in range(experts):
            share_E[expert] = decayed_DE[_COMPARED_ROW, expert] >> _COMPARED_SHIFT
        gain -= _brier_score(share_E, used_U)
        hits[lead] += gain - (hits[lead] >> _LEAD_DECAY_SHIFT)
    for before in before_U:
        for expert in range(experts):
            follows_EE[before, expert] -= follows_EE[before, expert] >> _FOLLOW_SHIFT
        for used in used_U:
            follows_EE[before, used] += _FOLLOWED


@compiled("void(int64[::1], int64[:, :], b1[:, :], int16[:, :], int64[::1], int64[::1], b1[::1], int64, int64)")
def _note_use(
    last_use_E: IntArray,
    decayed_DE: IntArray,
    holds_DE: BoolArray,
    follows_EE: NDArray[np.int16],
    hits: IntArray,
    weights_D: IntArray,
    used_E: BoolArray,
    step: int,
    slots: int,
) -> None:
    rows, experts = decayed_DE.shape
    used_U = np.nonzero(used_E)[0]
    evicts = 0 <= slots < experts
    if evicts:
        _weigh_rows(holds_DE, hits, weights_D, used_E, len(used_U))
    if slots != _USES_ONLY and step > 1:
        _learn_follows(follows_EE, decayed_DE, hits, np.nonzero(last_use_E == step - 1)[0], used_U, step)
    for row in range(rows - 1):
        shift = SHIFTS[row]
        for expert in range(experts):
            decayed_DE[row, expert] += (used_E[expert] << _USE_BITS) - (decayed_DE[row, expert] >> shift)
    for used in used_U:
        last_use_E[used] = step
    if step % SNAPSHOT_EVERY == 0 or step & (step - 1) == 0:
        for expert in range(experts):
            decayed_DE[rows - 1, expert] = decayed_DE[SLOWEST, expert]
    if evicts:
        _update_row_caches(decayed_DE, last_use_E, holds_DE, used_E, len(used_U), slots)


@compiled("void(int64[::1], int64[:, :], int16[:, :], int64[::1], int64[::1], int64[::1])")
def _expected_use(
    last_use_E: IntArray,
    decayed_DE: IntArray,
    follows_EE: NDArray[np.int16],
    hits: IntArray,
    weights_D: IntArray,
    score_E: IntArray,
) -> None:
    rows, experts = decayed_DE.shape
    score_E[:] = 0
    for row in range(rows):
        factor = weights_D[row] << SCALE_SHIFTS_D[row]
        for expert in range(experts):
            score_E[expert] += factor * decayed_DE[row, expert]
    share_E = np.zeros(experts, np.int64)
    now_U = np.nonzero(last_use_E == last_use_E.max())[0]
    if len(now_U) <= max(1, experts // _FOLLOW_EXPERTS_SHARE) and hits[-1] >= 0:
        _predict_next(follows_EE, now_U, share_E)
    for expert in range(experts):
        expected = (score_E[expert] >> SCORE_SHIFT) + (share_E[expert] << (_SHARE_BITS - _FOLLOW_BITS))
        score_E[expert] = (expected << STEP_BITS) + last_use_E[expert]
