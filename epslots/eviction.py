"""Which resident expert to give up: pure functions of each expert's past uses.

A policy scores the experts of one layer; the lowest score is evicted first, ties by expert id. Scores are integers made
by shifts, adds and products, so that numpy on the host, a kernel on the device and the simulator agree to the bit.

The history behind them is kept by whoever runs the cache (``record_use`` once per step and layer):

    last_use   the layer's step number of the expert's last use, 0 = never
    decayed    uses, each step losing 1/2^shift of the sum, at several shifts: from what was just wanted to what the last
               thousand steps wanted. The last row is a *still*: a copy of the slowest sum, taken now and then.
    follows    how often a step that uses the one expert is followed by one that uses the other
    hits       how many uses each row of ``decayed`` would have hit, had it been the policy; all uses; and by how much
               ``follows`` foretells the next step better than a row does
    weights    what each row counts in the adaptive policy's score, by its hits

LRU and LFU with exponential ageing are textbook; summing two decay rates is the idea of LRFU (Lee et al., IEEE Trans.
Computers 2001), whose single decay rate spans the range between LRU and LFU.

``adaptive`` doesn't choose among decay rates: it blends them by what each has proven to be worth on the traffic at hand and at
the size at hand (weights that halve with each bit of loss, as in weighted majority: Littlestone and Warmuth, Information and
Computation 1994; experts with a vote on what to evict as in LeCaR, Vietri et al., HotStorage 2018). A row's hits come from
stack distances (``reuse.py``) in one step of so many. A still order is one of the rows: where experts are used in turn, every
order that follows the uses misses them all, and one that stands still keeps those that fit. To the blend is added how often
each expert follows those just used: the experts of one token tell much of the next one's.

Legend of shape suffixes: E experts of the layer, D rows of ``decayed``, U experts that a step uses.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from epslots.errors import ConfigError

IntArray = NDArray[np.int64]

# One use, in fixed point.
_USE_BITS = 16
USE = 1 << _USE_BITS
SHIFTS = (1, 3, 4, 5, 7, 9)
_RECENT, _FREQUENT, _SLOWEST = SHIFTS.index(4), SHIFTS.index(7), len(SHIFTS) - 1
ROWS = len(SHIFTS) + 1
# The still loses nothing: a shift by so much leaves zero of any sum.
_LOSS_D1 = np.array([*SHIFTS, 63])[:, None]
# From a sum to a share of the steps, the slowest row's sums as they are.
_SCALE_D = np.array([SHIFTS[-1] - shift for shift in (*SHIFTS, SHIFTS[-1])])
# Stills are taken at steps 1, 2, 4, .. and then every so often.
STILL_EVERY = 512
# Ties on a frequency go to the more recent: the low bits of a score hold the step number.
_STEP_BITS = 32
_ABOVE_ALL = 1 << 62

# One step in so many, and each of the first ones, says what the rows would have hit. They count less by 1/2^shift at every
# such look.
LOOK_EVERY = 4
_LOOKS_AT_FIRST = 256
_HITS_SHIFT = 8
# Uses that the rows are taken to have hit alike before any look, and each row's weight then.
_FIRST_USES = 64
_FIRST_WEIGHTS_D = (1, 1, 1, 2, 16, 8, 1)
# A row's weight halves with every 1/2^shift of all uses that it hits less than the best row; here in quarters of that.
_HALVING_SHIFT = 8
_HALVED = tuple(round(2**30 * 2 ** (-quarter / 4)) for quarter in range(128))
_LEAST = len(_HALVED) - 1
_WEIGHT_BITS = 8
_WEIGHTS = 1 << _WEIGHT_BITS
_IN_WAVES_D = np.array([_WEIGHTS if row == _FREQUENT else 0 for row in range(ROWS)])

# A row of ``follows`` forgets 1/2^shift at each use of its expert; one is what an expert has that follows always.
_FOLLOW_SHIFT = 5
_FOLLOW_BITS = 14
_FOLLOWED = np.int16(1 << (_FOLLOW_BITS - _FOLLOW_SHIFT))
# Steps that use more than one in so many experts say little of the next one's, and cost more to learn from.
_FEW = 4
# ``follows`` counts only while it foretells uses better than this row, by 1/2^shift of a use for each. One step in so many
# compares them, which counts less by 1/2^shift at every further one.
_RIVAL = SHIFTS.index(5)
_WORTH_SHIFT = 7
COMPARE_EVERY = 16
_MARGIN_SHIFT = 6


@dataclass(frozen=True)
class UseHistory:
    """Past uses of every expert of every layer, or of one layer (a *row*): then all arrays lack their first axis.

    Attributes:
        last_use: int64 [layers, E].
        decayed: int64 [layers, D, E].
        follows: int16 [layers, E, E]: by the expert used, then by the one in the step after.
        hits: int64 [layers, D + 2].
        weights: int64 [layers, D].
    """

    last_use: IntArray
    decayed: IntArray
    follows: NDArray[np.int16]
    hits: IntArray
    weights: IntArray

    @classmethod
    def empty(cls, layers: int, experts: int) -> UseHistory:
        return cls(
            np.zeros((layers, experts), np.int64),
            np.zeros((layers, ROWS, experts), np.int64),
            np.zeros((layers, experts, experts), np.int16),
            np.zeros((layers, ROWS + 2), np.int64),
            np.tile(np.array(_weights([0] * ROWS, 0)), (layers, 1)),
        )

    def layer(self, layer: int, experts: int) -> UseHistory:
        """The row of one layer with ``experts`` experts, as views."""
        return UseHistory(
            self.last_use[layer, :experts],
            self.decayed[layer, :, :experts],
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
            array[...] = np.frombuffer(content, np.int64, array.size, start).reshape(array.shape)
            start += array.nbytes
        self.follows[...] = 0

    def _packed(self) -> Iterator[IntArray]:
        yield from (self.last_use, self.decayed, self.hits, self.weights)


def record_use(history: UseHistory, used_E: NDArray[np.bool_], step: int, slots: int | None = None) -> None:
    """Enter one step of one layer into ``history`` (a row), in place.

    Args:
        used_E: the experts that the step uses; on any rank.
        step: counts from 1.
        slots: of the layer, over all ranks. None: nothing is learned but the uses, as is enough for policies that don't adapt.
    """
    if slots is not None:
        if step % LOOK_EVERY == 0 or step <= _LOOKS_AT_FIRST:
            _look(history, used_E, step, slots)
        if step > 1:
            _learn_follows(history, used_E, step)
    decayed_DE = history.decayed
    decayed_DE -= decayed_DE >> _LOSS_D1
    np.add(decayed_DE[:-1], USE, out=decayed_DE[:-1], where=used_E)
    history.last_use[used_E] = step
    if step % STILL_EVERY == 0 or step & (step - 1) == 0:
        decayed_DE[-1] = decayed_DE[_SLOWEST]


def _look(history: UseHistory, used_E: NDArray[np.bool_], step: int, slots: int) -> None:
    """Count what the step's uses would have hit in each row's order, and weigh the rows by it."""
    experts = len(used_E)
    last_E, uses = history.last_use == step - 1, int(np.count_nonzero(used_E))
    if slots >= experts:
        return  # nothing gives way
    if uses > slots or int(np.count_nonzero(last_E)) > slots:
        # Experts pass through in waves, of which stack distances know nothing; most of what is used is gone again at once.
        history.weights[:] = _IN_WAVES_D
        return
    # What the last step used had slots, whatever its score.
    order_DE = (history.decayed << _STEP_BITS) + np.where(last_E, _ABOVE_ALL, history.last_use)
    lowest_D1 = np.partition(order_DE, experts - slots, axis=1)[:, experts - slots, None]
    hits = history.hits[:-1]
    hits -= hits >> _HITS_SHIFT
    hits[:-1] += np.count_nonzero((order_DE >= lowest_D1) & used_E, axis=1) << _HITS_SHIFT
    hits[-1] += uses << _HITS_SHIFT
    history.weights[:] = _weights(hits[:-1].tolist(), int(hits[-1]))


def _weights(hits_D: Sequence[int], uses: int) -> list[int]:
    """What each row counts, of ``_WEIGHTS`` in all but for rounding."""
    most: int = max(hits_D)
    base = uses + (_FIRST_USES << _HITS_SHIFT)
    quarters_D = [((most - hits) << (_HALVING_SHIFT + 2)) // base for hits in hits_D]
    parts = [first * _HALVED[min(q, _LEAST)] for first, q in zip(_FIRST_WEIGHTS_D, quarters_D, strict=True)]
    total = sum(parts)
    return [part * _WEIGHTS // total for part in parts]


def _learn_follows(history: UseHistory, used_E: NDArray[np.bool_], step: int) -> None:
    """Enter what follows the experts of the last step; now and then, after comparing it with what was expected to."""
    before_U = (history.last_use == step - 1).nonzero()[0]
    most = max(1, len(used_E) // _FEW)
    if len(before_U) > most or np.count_nonzero(used_E) > most:
        return
    rows_UE = history.follows.take(before_U, 0)
    if step % COMPARE_EVERY == 0:
        rival_E = history.decayed[_RIVAL] >> (_USE_BITS + SHIFTS[_RIVAL] - _FOLLOW_BITS)
        margin = _quadratic_score(_expected_next(rows_UE), used_E) - _quadratic_score(rival_E, used_E)
        margin -= int(np.count_nonzero(used_E)) << (_FOLLOW_BITS - _WORTH_SHIFT)
        history.hits[-1] += margin - (history.hits[-1] >> _MARGIN_SHIFT)
    rows_UE -= rows_UE >> _FOLLOW_SHIFT
    np.add(rows_UE, _FOLLOWED, out=rows_UE, where=used_E)
    history.follows[before_U] = rows_UE


def _expected_next(rows_UE: NDArray[np.int16]) -> IntArray:
    """What rows of ``follows`` expect together, in 2^-_FOLLOW_BITS, int64 [E]: as many uses as there are rows."""
    sum_E: IntArray = np.add.reduce(rows_UE, axis=0, dtype=np.int64)
    share_E = sum_E * (len(rows_UE) << _FOLLOW_BITS) // max(1, int(sum_E.sum()))
    return np.minimum(share_E, 1 << _FOLLOW_BITS)  # a step uses an expert once


def _quadratic_score(share_E: IntArray, used_E: NDArray[np.bool_]) -> int:
    """How well shares (of 2^_FOLLOW_BITS) foretold a step; proper, so that the true ones score best (Brier 1950)."""
    return 2 * int(share_E[used_E].sum()) - int(share_E @ share_E >> _FOLLOW_BITS)


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
    expected_E = ((history.weights << _SCALE_D) @ history.decayed) >> _TRIM
    last_use = history.last_use
    now_U = (last_use == last_use.max()).nonzero()[0]
    if len(now_U) <= max(1, len(last_use) // _FEW) and history.hits[-1] >= 0:
        expected_E += _expected_next(history.follows.take(now_U, 0)) << (_SHARE_BITS - _FOLLOW_BITS)
    return (expected_E << _STEP_BITS) + last_use


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
        return policy
    if policy not in POLICIES:
        raise ConfigError(f"policy={policy!r}: allowed: {', '.join(POLICIES)}, or a function of a UseHistory")
    return POLICIES[policy]
