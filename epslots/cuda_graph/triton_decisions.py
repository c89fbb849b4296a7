"""The device's decisions about slots as Triton kernels. Optional: needs ``triton``. ``triton_kernels.py`` launches them.

``decide`` and ``choose`` are one program each, which holds a whole layer in its registers: some hundreds of experts at most.
They read nothing that they wrote themselves. While prefetches are copied, ``decide`` of their layer reads how much of each has
arrived, and writes which are dropped.

Legend of shape suffixes: D rows of ``UseHistory.decayed``, E experts, Q slots of a layer, P pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from epslots.cuda_graph.device_slots import MOST_PREFETCHES, SLOWEST, STILL
from epslots.planner import prefetch_policy as prefetch
from epslots.planner.use_history import ROWS, SCORE_SHIFT, SNAPSHOT_EVERY, STEP_BITS, USE

# Pairs that are compared with all experts at once.
_PAIRS = tl.constexpr(16)
_FAR = tl.constexpr((1 << 63) - 1)
_USE = tl.constexpr(USE)
_ROWS = tl.constexpr(ROWS)
_BLOCK_D = tl.constexpr(triton.next_power_of_2(ROWS))
_SLOWEST = tl.constexpr(SLOWEST)
_STILL = tl.constexpr(STILL)
_STILL_EVERY = tl.constexpr(SNAPSHOT_EVERY)
_STEP_BITS = tl.constexpr(STEP_BITS)
_TRIM = tl.constexpr(SCORE_SHIFT)
_MOST_PREFETCHES = tl.constexpr(MOST_PREFETCHES)
_CERTAIN, _LEAST_JUDGED, _HALVE_AT = (
    tl.constexpr(number) for number in (prefetch.CERTAIN, prefetch.LEAST_JUDGED, prefetch.HALVE_AT)
)
_WORTH_A_TRY, _LIKELY = tl.constexpr(prefetch.WORTH_A_TRY), tl.constexpr(prefetch.LIKELY)
_STOP_USED, _STOP_PREDICTED = (tl.constexpr(part) for part in prefetch.STOP_BELOW)
_START_USED, _START_PREDICTED = (tl.constexpr(part) for part in prefetch.START_ABOVE)


@triton.jit  # type: ignore[untyped-decorator]
def _mark_needed(ids, pairs, number_E, real_E, BLOCK_E: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether each expert is among the ids: bool [BLOCK_E]."""
    needed_E = tl.zeros([BLOCK_E], tl.int32)
    first = 0
    while first < pairs:
        pair = first + tl.arange(0, _PAIRS)
        id_P = tl.load(ids + pair, mask=pair < pairs, other=-1)
        needed_E = tl.maximum(needed_E, tl.max((number_E[:, None] == id_P[None, :]).to(tl.int32), axis=1))
        first += _PAIRS
    return (needed_E > 0) & real_E


@triton.jit
def _count_use(last_E, decayed_DE, shift_D, number_D, needed_E, now):  # type: ignore[no-untyped-def]
    """last_E and decayed_DE after step number ``now``: the rule of ``note_use`` on the host."""
    use_DE = tl.where((number_D[:, None] != _STILL) & needed_E[None, :], _USE, 0)
    decayed_DE = decayed_DE - (decayed_DE >> shift_D[:, None]) + use_DE
    slowest_E = tl.sum(tl.where(number_D[:, None] == _SLOWEST, decayed_DE, 0), axis=0)
    still = ((now % _STILL_EVERY) == 0) | ((now & (now - 1)) == 0)
    decayed_DE = tl.where((number_D[:, None] == _STILL) & still, slowest_E[None, :], decayed_DE)
    return tl.where(needed_E, now, last_E), decayed_DE


@triton.jit
def _scores(last_E, decayed_DE, factor_D):  # type: ignore[no-untyped-def]
    """The eviction policy's scores, int64 [BLOCK_E]."""
    return ((tl.sum(decayed_DE * factor_D[:, None], axis=0) >> _TRIM) << _STEP_BITS) + last_E


@triton.jit
def _place(expert, slot_E, occupant_Q, score_E, number_E, number_Q, real_Q, slots, start):  # type: ignore[no-untyped-def]
    """Enter an absent expert in the tables: in the first empty slot, else in that of the lowest score.

    Returns:
        Its slot, whether an expert is evicted, and the tables and scores after it.
    """
    empty = tl.min(tl.where(real_Q & (occupant_Q < 0), number_Q, _FAR), axis=0)
    lowest = tl.min(score_E, axis=0)
    victim = tl.min(tl.where(score_E == lowest, number_E, _FAR), axis=0)
    victim = tl.where(empty < slots, -1, victim)
    slot = tl.where(empty < slots, start + empty, tl.max(tl.where(number_E == victim, slot_E, -1), axis=0))
    score_E = tl.where(number_E == victim, _FAR, score_E)
    slot_E = tl.where(number_E == victim, -1, tl.where(number_E == expert, slot, slot_E))
    occupant_Q = tl.where(number_Q == slot - start, expert, occupant_Q)
    return slot, (victim >= 0).to(tl.int64), slot_E, occupant_Q, score_E


_OF_A_LAYER = ["pairs", "experts", "slots", "start", "row", "chunks", "nbytes", "most"]


# One kernel, because its parts share a layer's tables in registers; each launch would cost as much as the decision.
@triton.jit(do_not_specialize=_OF_A_LAYER[:-1])  # type: ignore[untyped-decorator]
def decide(  # type: ignore[no-untyped-def]
    ids,
    slot_of,
    expert_of,
    last_use,
    decayed,
    step,
    factors,
    shifts,
    tally,
    missing_expert,
    missing_slot,
    missing_count,
    left,
    ahead_expert,
    ahead_slot,
    ahead_count,
    arrived,
    dropped,
    pairs,
    experts,
    slots,
    start,
    row,
    chunks,
    nbytes,
    BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One layer's step, the same as ``TorchKernels.decide``. Grid: 1.

    Args:
        ids: int64 [pairs], the experts needed.
        slot_of .. dropped: the tensors of ``DeviceLayer``, ``Missing`` and ``DevicePrefetches``, all int64.
        shifts: int64 [D], the decay of each row of ``decayed``.
        experts, slots: E and Q.
        start: the layer's first slot.
        row: words from one row of ``decayed`` to the next.
        chunks: pieces of a prefetched record.
        nbytes: bytes of a record.
        BLOCK_E, BLOCK_Q: powers of two, at least E and Q.
    """
    number_E = tl.arange(0, BLOCK_E).to(tl.int64)
    number_Q = tl.arange(0, BLOCK_Q).to(tl.int64)
    number_D = tl.arange(0, _BLOCK_D).to(tl.int64)
    real_E = number_E < experts
    real_Q = number_Q < slots

    needed_E = _mark_needed(ids, pairs, number_E, real_E, BLOCK_E)
    slot_E = tl.load(slot_of + number_E, mask=real_E, other=-1)
    occupant_Q = tl.load(expert_of + number_Q, mask=real_Q, other=0)
    last_E = tl.load(last_use + number_E, mask=real_E, other=0)
    place_DE = number_D[:, None] * row + number_E[None, :]
    real_DE = (number_D[:, None] < _ROWS) & real_E[None, :]
    decayed_DE = tl.load(decayed + place_DE, mask=real_DE, other=0)
    shift_D = tl.load(shifts + number_D, mask=number_D < _ROWS, other=0)
    factor_D = tl.load(factors + number_D, mask=number_D < _ROWS, other=0)
    now = tl.load(step) + 1

    listed = tl.load(ahead_count)
    turn = listed * 0
    while turn < listed:
        expert = tl.load(ahead_expert + turn)
        slot = tl.load(ahead_slot + turn)
        late = tl.load(arrived + turn, volatile=True) < chunks
        unneeded = tl.max(tl.where(number_E == expert, needed_E.to(tl.int32), 0), axis=0) == 0
        drop = late & unneeded & (tl.max(tl.where(number_E == expert, slot_E, -1), axis=0) == slot)
        slot_E = tl.where(drop & (number_E == expert), -1, slot_E)
        occupant_Q = tl.where(drop & (number_Q == slot - start), -1, occupant_Q)
        tl.store(dropped + turn, drop.to(tl.int64))
        turn += 1

    last_E, decayed_DE = _count_use(last_E, decayed_DE, shift_D, number_D, needed_E, now)
    score_E = _scores(last_E, decayed_DE, factor_D)

    resident_E = slot_E >= 0
    missing_E = needed_E & (slot_E < 0)
    score_E = tl.where(resident_E & (needed_E == 0), score_E, _FAR)  # of the experts that may be evicted
    needed = tl.sum(needed_E.to(tl.int64), axis=0)
    misses = tl.sum(missing_E.to(tl.int64), axis=0)
    hits_before = tl.load(tally)
    misses_before = tl.load(tally + 1)
    evictions = tl.load(tally + 2)
    left_before = tl.load(left)
    tl.debug_barrier()  # every read comes before every write

    done = misses * 0
    while done < misses:
        expert = tl.min(tl.where(missing_E, number_E, _FAR), axis=0)
        missing_E = missing_E & (number_E != expert)
        slot, evicted, slot_E, occupant_Q, score_E = _place(
            expert, slot_E, occupant_Q, score_E, number_E, number_Q, real_Q, slots, start
        )
        evictions += evicted
        tl.store(missing_expert + done, expert)
        tl.store(missing_slot + done, slot)
        done += 1

    tl.store(slot_of + number_E, slot_E, mask=real_E)
    tl.store(expert_of + number_Q, occupant_Q, mask=real_Q)
    tl.store(last_use + number_E, last_E, mask=real_E)
    tl.store(decayed + place_DE, decayed_DE, mask=real_DE)
    tl.store(step, now)
    tl.store(missing_count, misses)
    tl.store(tally, hits_before + needed - misses)
    tl.store(tally + 1, misses_before + misses)
    tl.store(tally + 2, evictions)
    tl.store(left, left_before - misses * nbytes)


@triton.jit
def _judge(verdict, expected_E, hit_E):  # type: ignore[no-untyped-def]
    """The verdict after one more step, as ``PrefetchPolicy.judge`` finds it: active, predicted, used."""
    active = tl.load(verdict) > 0
    predicted = tl.load(verdict + 1) + tl.sum(expected_E, axis=0)
    used = tl.load(verdict + 2) + _CERTAIN * tl.sum(hit_E.to(tl.int64), axis=0)
    goes_on = used * _STOP_USED >= predicted * _STOP_PREDICTED
    begins = used * _START_USED >= predicted * _START_PREDICTED
    expected = tl.sum(expected_E, axis=0) > 0
    judged = expected & (predicted >= _LEAST_JUDGED)
    active = tl.where(judged, (active & goes_on) | ((active == 0) & begins), active).to(tl.int64)
    halved = (expected & (predicted >= _HALVE_AT)).to(tl.int64)
    return active, predicted >> halved, used >> halved


@triton.jit(do_not_specialize=_OF_A_LAYER)  # type: ignore[untyped-decorator]
def choose(  # type: ignore[no-untyped-def]
    usage,
    running,
    slot_of,
    expert_of,
    last_use,
    decayed,
    step,
    factors,
    tally,
    left,
    expected,
    verdict,
    ahead_expert,
    ahead_slot,
    ahead_count,
    arrived,
    dropped,
    fetched,
    experts,
    slots,
    start,
    row,
    nbytes,
    most,
    BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One layer's prefetches, the same as ``TorchKernels.choose``. Grid: 1.

    Args:
        usage: int32 [experts], how likely each expert is used, in 256ths.
        running: int64 [1], misses of the layer that runs.
        slot_of .. fetched: the tensors of ``DeviceLayer`` and ``DevicePrefetches``, all int64.
        experts, slots: E and Q.
        start: the layer's first slot.
        row: words from one row of ``decayed`` to the next.
        nbytes: bytes of a record.
        most: prefetches at most.
        BLOCK_E, BLOCK_Q: powers of two, at least E and Q.
    """
    number_E = tl.arange(0, BLOCK_E).to(tl.int64)
    number_Q = tl.arange(0, BLOCK_Q).to(tl.int64)
    number_D = tl.arange(0, _BLOCK_D).to(tl.int64)
    real_E = number_E < experts
    real_Q = number_Q < slots

    usage_E = tl.load(usage + number_E, mask=real_E, other=0).to(tl.int64)
    slot_E = tl.load(slot_of + number_E, mask=real_E, other=-1)
    occupant_Q = tl.load(expert_of + number_Q, mask=real_Q, other=0)
    last_E = tl.load(last_use + number_E, mask=real_E, other=0)
    real_DE = (number_D[:, None] < _ROWS) & real_E[None, :]
    decayed_DE = tl.load(decayed + number_D[:, None] * row + number_E[None, :], mask=real_DE, other=0)
    factor_D = tl.load(factors + number_D, mask=number_D < _ROWS, other=0)
    expected_E = tl.load(expected + number_E, mask=real_E, other=0)
    active, predicted, used = _judge(verdict, expected_E, (expected_E > 0) & (last_E == tl.load(step)))
    left_before = tl.load(left)
    fetched_before = tl.load(fetched)
    evictions = tl.load(tally + 2)

    absent_E = real_E & (slot_E < 0)
    likely_E = usage_E >= tl.where(tl.load(running) > 0, _LIKELY, _WORTH_A_TRY)
    kept_E = real_E & (slot_E >= 0) & likely_E
    candidate_E = absent_E & likely_E
    score_E = tl.where((slot_E >= 0) & (kept_E == 0), _scores(last_E, decayed_DE, factor_D), _FAR)
    affordable = tl.maximum(left_before, 0) // nbytes
    room = slots - tl.sum(kept_E.to(tl.int64), axis=0)
    count = tl.minimum(tl.minimum(tl.sum(candidate_E.to(tl.int64), axis=0), most), tl.minimum(affordable, room)) * active
    expected_E = tl.where(absent_E & (usage_E >= _WORTH_A_TRY), usage_E, 0)
    tl.debug_barrier()  # every read comes before every write

    done = count * 0
    while done < count:
        likeliest = tl.max(tl.where(candidate_E, usage_E, -1), axis=0)
        expert = tl.min(tl.where(candidate_E & (usage_E == likeliest), number_E, _FAR), axis=0)
        candidate_E = candidate_E & (number_E != expert)
        slot, evicted, slot_E, occupant_Q, score_E = _place(
            expert, slot_E, occupant_Q, score_E, number_E, number_Q, real_Q, slots, start
        )
        evictions += evicted
        tl.store(ahead_expert + done, expert)
        tl.store(ahead_slot + done, slot)
        done += 1

    place = tl.arange(0, _MOST_PREFETCHES)
    tl.store(arrived + place, tl.zeros([_MOST_PREFETCHES], tl.int64), mask=place < most)
    tl.store(dropped + place, tl.zeros([_MOST_PREFETCHES], tl.int64), mask=place < most)
    tl.store(slot_of + number_E, slot_E, mask=real_E)
    tl.store(expert_of + number_Q, occupant_Q, mask=real_Q)
    tl.store(expected + number_E, expected_E, mask=real_E)
    tl.store(verdict, active)
    tl.store(verdict + 1, predicted)
    tl.store(verdict + 2, used)
    tl.store(ahead_count, count)
    tl.store(fetched, fetched_before + count)
    tl.store(tally + 2, evictions)
    tl.store(left, left_before - count * nbytes)
