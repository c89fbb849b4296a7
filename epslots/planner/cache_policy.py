"""Which resident expert to give up: pure functions of each expert's past uses.

A policy scores the experts of one layer; the lowest score is evicted first, ties by expert id. Scores are integers made
by shifts, adds and products, so that numpy on the host, a kernel on the device and the simulator agree to the bit.

The history behind them is kept by whoever runs the cache (``record_use`` once per step and layer):

    last_use   the layer's step number of the expert's last use, 0 = never
    decayed    uses, each step losing 1/2^shift of the sum, at several shifts: from what was just wanted to what the last
               thousand steps wanted. The last row is a *still*: a copy of the slowest sum, taken now and then.
    follows    how often a step that uses the one expert is followed by one that uses the other
    holds      what a cache would hold now, had that row of ``decayed`` been its policy: one for each row
    hits       how many uses each of these caches has hit; all uses; and by how much ``follows`` foretells the next step
               better than a row does
    weights    what each row counts in the adaptive policy's score, by its hits

LRU and LFU with exponential ageing are textbook; summing two decay rates is the idea of LRFU (Lee et al., IEEE Trans.
Computers 2001), whose single decay rate spans the range between LRU and LFU.

``adaptive`` doesn't choose among decay rates: it blends them by what each has proven to be worth on the traffic at hand and at
the size at hand (weights that halve with each bit of loss, as in weighted majority: Littlestone and Warmuth, Information and
Computation 1994; experts with a vote on what to evict as in LeCaR, Vietri et al., HotStorage 2018). A row's hits are those of
a cache of the same size that it rules alone, kept on paper. (Stack distances would flatter the slow rows: they know of no
expert that is gone.) A still order is one of the rows: where experts are used in turn, every order that follows the uses
misses them all, and one that stands still keeps those that fit. To the blend is added how often each expert follows those
just used: the experts of one token tell much of the next one's.

Legend of shape suffixes: E experts of the layer, D rows of ``decayed``, U experts that a step uses.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
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
SHIFTS = (1, 3, 4, 5, 7, 9)
_RECENT, _FREQUENT, _SLOWEST = SHIFTS.index(4), SHIFTS.index(7), len(SHIFTS) - 1
ROWS = len(SHIFTS) + 1
# From a sum to a share of the steps, the slowest row's sums as they are.
_SCALE_D = np.array([SHIFTS[-1] - shift for shift in (*SHIFTS, SHIFTS[-1])])
# Stills are taken at steps 1, 2, 4, .. and then every so often.
STILL_EVERY = 512
# Ties on a frequency go to the more recent: the low bits of a score hold the step number.
_STEP_BITS = 32

# What the rows hit counts less by 1/2^shift at every further step.
_HITS_SHIFT = 9
# Uses that the rows are taken to have hit alike before the first, and each row's weight then.
_FIRST_USES = 64
_FIRST_WEIGHTS_D = (1, 1, 1, 2, 16, 8, 1)
# A row's weight halves with every 1/2^shift of all uses that it hits less than the best row; here in quarters of that.
_HALVING_SHIFT = 9
_HALVED = tuple(round(2**30 * 2 ** (-quarter / 4)) for quarter in range(128))
_LEAST = len(_HALVED) - 1
_WEIGHT_BITS = 8
_WEIGHTS = 1 << _WEIGHT_BITS

# A row of ``follows`` forgets 1/2^shift at each use of its expert; one is what an expert has that follows always.
_FOLLOW_SHIFT = 5
_FOLLOW_BITS = 14
_FOLLOWED = np.int16(1 << (_FOLLOW_BITS - _FOLLOW_SHIFT))
# Steps that use more than one in so many experts say little of the next one's, and cost more to learn from.
_FEW = 4
# ``follows`` counts only while it foretells uses better than this row, by 1/2^shift of a use for each. One step in so many
# compares them, which counts less by 1/2^shift at every further one.
_RIVAL = SHIFTS.index(5)
_RIVAL_TRIM = _USE_BITS + SHIFTS[_RIVAL] - _FOLLOW_BITS
_WORTH_SHIFT = 7
COMPARE_EVERY = 16
_MARGIN_SHIFT = 6
# In place of a number of slots.
_LEARN_NOTHING = -1


@dataclass(frozen=True)
class UseHistory:
    """Past uses of every expert of every layer, or of one layer (a *row*): then all arrays lack their first axis.

    Attributes:
        last_use: int64 [layers, E].
        decayed: int64 [layers, D, E].
        holds: bool [layers, D, E].
        follows: int16 [layers, E, E]: by the expert used, then by the one in the step after.
        hits: int64 [layers, D + 2].
        weights: int64 [layers, D].
    """

    last_use: IntArray
    decayed: IntArray
    holds: BoolArray
    follows: NDArray[np.int16]
    hits: IntArray
    weights: IntArray

    @classmethod
    def empty(cls, layers: int, experts: int) -> UseHistory:
        return cls(
            np.zeros((layers, experts), np.int64),
            np.zeros((layers, ROWS, experts), np.int64),
            np.zeros((layers, ROWS, experts), bool),
            np.zeros((layers, experts, experts), np.int16),
            np.zeros((layers, ROWS + 2), np.int64),
            np.tile(np.array(_FIRST_WEIGHTS_D) * _WEIGHTS // sum(_FIRST_WEIGHTS_D), (layers, 1)),
        )

    def layer(self, layer: int, experts: int) -> UseHistory:
        """The row of one layer with ``experts`` experts, as views."""
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
        """Uses, each step losing 1/16 of the sum: what the last dozen steps wanted. int64 [.., E]."""
        return self.decayed[..., _RECENT, :]

    @property
    def frequent(self) -> IntArray:
        """Uses, each step losing 1/128: what the text at hand wants. int64 [.., E]."""
        return self.decayed[..., _FREQUENT, :]

    def pack(self) -> bytes:
        """A row as bytes, for ``unpack``; but for ``follows``, which is large and soon learned again."""
        return b"".join(array.tobytes() for array in self._packed())

    def unpack(self, content: bytes) -> None:
        """Make a row what another one was, in place; nothing follows anything yet. So whoever packed it must unpack it too.

        Raises:
            ConfigError: these are not the bytes of a history of as many experts.
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


def record_use(history: UseHistory, used_E: BoolArray, step: int, slots: int | None = None) -> None:
    """Enter one step of one layer into ``history`` (a row), in place.

    Args:
        used_E: the experts that the step uses; on any rank.
        step: counts from 1.
        slots: of the layer, over all ranks. None: nothing is learned but the uses, as is enough for policies that don't adapt.
    """
    arrays = (history.last_use, history.decayed, history.holds, history.follows, history.hits, history.weights)
    _record_use(*arrays, used_E, step, _LEARN_NOTHING if slots is None else slots)


@compiled("void(b1[:, :], int64[::1], int64[::1], b1[::1], int64)")
def _look(holds_DE: BoolArray, hits: IntArray, weights_D: IntArray, used_E: BoolArray, uses: int) -> None:
    """Count what the step's uses hit in each row's cache, and weigh the rows by it."""
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
        weights_D[row] = _FIRST_WEIGHTS_D[row] * _HALVED[min(quarters, _LEAST)]
        total += weights_D[row]
    for row in range(rows):
        weights_D[row] = weights_D[row] * _WEIGHTS // total


@compiled("int64(int64[::1], int64, int64)")
def _nth(values: IntArray, count: int, nth: int) -> int:
    """The one of the first ``count`` values that ``nth`` others precede; sorts them as far as that takes (Hoare's Find)."""
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
def _settle_rows(
    decayed_DE: IntArray, last_use_E: IntArray, holds_DE: BoolArray, used_E: BoolArray, uses: int, slots: int
) -> None:
    """Each row's cache after the step: what is used has come in, and the row's lowest give way.

    Where the step uses more than there are slots, that may be what it used: ``residency.settle`` comes close to it.
    """
    rows, experts = holds_DE.shape
    score_E = np.empty(experts, np.int64)  # of those that may give way, one after the other
    for row in range(rows):
        held = places = 0
        for expert in range(experts):
            holds_DE[row, expert] |= used_E[expert]
            held += holds_DE[row, expert]
            if holds_DE[row, expert] and (uses > slots or not used_E[expert]):
                score_E[places] = (decayed_DE[row, expert] << _STEP_BITS) + last_use_E[expert]
                places += 1
        going = held - slots
        if going <= 0:
            continue
        highest = _nth(score_E, places, going - 1)  # of those that go
        ties = going
        for place in range(places):
            ties -= score_E[place] < highest
        for expert in range(experts):
            if holds_DE[row, expert] and (uses > slots or not used_E[expert]):
                score = (decayed_DE[row, expert] << _STEP_BITS) + last_use_E[expert]
                ties -= score == highest
                holds_DE[row, expert] = score > highest or (score == highest and ties < 0)


@compiled("void(int16[:, :], int64[::1], int64[::1])")
def _expect_next(follows_EE: NDArray[np.int16], now_U: IntArray, share_E: IntArray) -> None:
    """What the rows of ``follows`` of these experts expect together, in 2^-_FOLLOW_BITS: as many uses as there are rows."""
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
def _quadratic_score(share_E: IntArray, used_U: IntArray) -> int:
    """How well shares (of 2^_FOLLOW_BITS) foretold a step; proper, so that the true ones score best (Brier 1950)."""
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
    """Enter what follows the experts of the last step; now and then, after comparing it with what was expected to."""
    experts, margin = len(follows_EE), len(hits) - 1
    if max(len(before_U), len(used_U)) > max(1, experts // _FEW):
        return
    if step % COMPARE_EVERY == 0:
        share_E = np.empty(experts, np.int64)
        _expect_next(follows_EE, before_U, share_E)
        gain = _quadratic_score(share_E, used_U) - (len(used_U) << (_FOLLOW_BITS - _WORTH_SHIFT))
        for expert in range(experts):
            share_E[expert] = decayed_DE[_RIVAL, expert] >> _RIVAL_TRIM
        gain -= _quadratic_score(share_E, used_U)
        hits[margin] += gain - (hits[margin] >> _MARGIN_SHIFT)
    for before in before_U:
        for expert in range(experts):
            follows_EE[before, expert] -= follows_EE[before, expert] >> _FOLLOW_SHIFT
        for used in used_U:
            follows_EE[before, used] += _FOLLOWED


@compiled("void(int64[::1], int64[:, :], b1[:, :], int16[:, :], int64[::1], int64[::1], b1[::1], int64, int64)")
def _record_use(
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
    gives_way = 0 <= slots < experts
    if gives_way:
        _look(holds_DE, hits, weights_D, used_E, len(used_U))
    if slots != _LEARN_NOTHING and step > 1:
        _learn_follows(follows_EE, decayed_DE, hits, np.nonzero(last_use_E == step - 1)[0], used_U, step)
    for row in range(rows - 1):
        shift = SHIFTS[row]
        for expert in range(experts):
            decayed_DE[row, expert] += (used_E[expert] << _USE_BITS) - (decayed_DE[row, expert] >> shift)
    for used in used_U:
        last_use_E[used] = step
    if step % STILL_EVERY == 0 or step & (step - 1) == 0:
        for expert in range(experts):
            decayed_DE[rows - 1, expert] = decayed_DE[_SLOWEST, expert]
    if gives_way:
        _settle_rows(decayed_DE, last_use_E, holds_DE, used_E, len(used_U), slots)


def lru(history: UseHistory) -> IntArray:
    """Least recently used goes first."""
    return history.last_use


def lfu(history: UseHistory) -> IntArray:
    """Least frequently used goes first, uses ageing by 1/128 a step (decay 0.992)."""
    return (history.frequent << _STEP_BITS) + history.last_use


def lrfu(history: UseHistory) -> IntArray:
    """Least recent *and* frequent goes first: the long-run frequency, lifted by a burst of recent uses."""
    return ((history.frequent + (history.recent << 1)) << _STEP_BITS) + history.last_use


# Shares of the steps come as 2^25 times _WEIGHTS: what is left of it, so that a score with its step number is an int64.
_SHARE_BITS = 29
_TRIM = _USE_BITS + SHIFTS[-1] + _WEIGHT_BITS - _SHARE_BITS


def adaptive(history: UseHistory) -> IntArray:
    """What is expected least often goes first: by a blend of all decay rates, and by what follows the experts just used."""
    score_E = np.empty_like(history.last_use)
    _adaptive(history.last_use, history.decayed, history.follows, history.hits, history.weights, score_E)
    return score_E


@compiled("void(int64[::1], int64[:, :], int16[:, :], int64[::1], int64[::1], int64[::1])")
def _adaptive(
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
        factor = weights_D[row] << _SCALE_D[row]
        for expert in range(experts):
            score_E[expert] += factor * decayed_DE[row, expert]
    share_E = np.zeros(experts, np.int64)
    now_U = np.nonzero(last_use_E == last_use_E.max())[0]
    if len(now_U) <= max(1, experts // _FEW) and hits[-1] >= 0:
        _expect_next(follows_EE, now_U, share_E)
    for expert in range(experts):
        expected = (score_E[expert] >> _TRIM) + (share_E[expert] << (_SHARE_BITS - _FOLLOW_BITS))
        score_E[expert] = (expected << _STEP_BITS) + last_use_E[expert]


Policy = Callable[[UseHistory], IntArray]
POLICIES: dict[str, Policy] = {"lru": lru, "lfu": lfu, "lrfu": lrfu, "adaptive": adaptive}
DEFAULT_POLICY = "adaptive"


def learns(policy: Policy) -> bool:
    """Whether a policy may look at what ``record_use`` learns from the number of slots."""
    return policy not in (lru, lfu, lrfu)


def policy_name(policy: str | Policy) -> str:
    """What tells a policy from others: its name, and of a function its code as well."""
    if isinstance(policy, str):
        return policy
    code = getattr(policy, "__code__", None)
    name = f"{getattr(policy, '__module__', '')}.{getattr(policy, '__qualname__', type(policy).__qualname__)}"
    return name if code is None else f"{name} ({zlib.crc32(code.co_code + repr(code.co_consts).encode()):08x})"


def resolve_policy(policy: str | Policy) -> Policy:
    """A policy by name, or the user's own function of a ``UseHistory`` row [experts] to int64 scores [experts].

    Raises:
        ConfigError: no policy of that name.
    """
    if callable(policy):
        told = policy(UseHistory.empty(1, 4).layer(0, 4))
        if not isinstance(told, np.ndarray) or told.dtype != np.int64 or told.shape != (4,) or not told.flags.c_contiguous:
            what = f"{told.dtype} {list(told.shape)}" if isinstance(told, np.ndarray) else type(told).__name__
            raise ConfigError(f"policy={policy_name(policy)}: of 4 experts it makes {what}; allowed: contiguous int64 [4]")
        return policy
    if policy not in POLICIES:
        raise ConfigError(f"policy={policy!r}: allowed: {', '.join(POLICIES)}, or a function of a UseHistory")
    return POLICIES[policy]
