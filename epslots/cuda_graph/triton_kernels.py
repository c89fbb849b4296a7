"""The device's slot decision and its copies as Triton kernels. Optional: needs ``triton``.

Tests hold them to ``device_slots.TorchKernels`` by Triton's interpreter (``TRITON_INTERPRET=1``), and compile them for GPUs;
no test of the project runs them on one.

``_decide`` is one program that holds a whole layer in its registers: some hundreds of experts at most. It reads nothing that
it wrote itself. ``_gather`` is a fixed grid of programs that share out the misses' bytes, however many there are, and read
them from the host store in place: memory that ``cudaHostRegister`` pinned is mapped into the GPU's addresses, and a record
begins on a page of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from epslots.cache.expert_loader import ExpertLoader
from epslots.cuda_graph.device_slots import SLOWEST, STILL, DeviceLayer, Missing
from epslots.layout import PAGE, TENSOR_ALIGNMENT
from epslots.planner.use_history import ROWS, SCORE_SHIFT, SHIFTS, SNAPSHOT_EVERY, STEP_BITS, USE

# Programs that copy, and 8-byte words that each copies at a time. They are enough for a link of 64 GB/s with 2 us of latency
# (128 KB in flight), and few enough to leave the grid resident on small GPUs.
GATHER_PROGRAMS = 128
GATHER_WORDS = 1024
GATHER_WARPS = 8
WORD_BYTES = 8
# One warp's registers hold a layer of up to this many experts.
ONE_WARP_EXPERTS = 128
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
    """last_E and decayed_DE after step number ``now``: the rule of ``record_use`` on the host."""
    use_DE = tl.where((number_D[:, None] != _STILL) & needed_E[None, :], _USE, 0)
    decayed_DE = decayed_DE - (decayed_DE >> shift_D[:, None]) + use_DE
    slowest_E = tl.sum(tl.where(number_D[:, None] == _SLOWEST, decayed_DE, 0), axis=0)
    still = ((now % _STILL_EVERY) == 0) | ((now & (now - 1)) == 0)
    decayed_DE = tl.where((number_D[:, None] == _STILL) & still, slowest_E[None, :], decayed_DE)
    return tl.where(needed_E, now, last_E), decayed_DE


# One kernel, because its parts share a layer's tables in registers; each launch would cost as much as the decision.
@triton.jit(do_not_specialize=["pairs", "experts", "slots", "start", "row"])  # type: ignore[untyped-decorator]
def _decide(  # type: ignore[no-untyped-def]
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
    pairs,
    experts,
    slots,
    start,
    row,
    BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One layer's step, the same as ``device_slots.TorchKernels.decide``. Grid: 1.

    Args:
        ids: int64 [pairs], the experts needed.
        slot_of .. missing_count: the tensors of ``DeviceLayer`` and ``Missing``, all int64.
        shifts: int64 [D], the decay of each row of ``decayed``.
        experts, slots: E and Q.
        start: the layer's first slot.
        row: words from one row of ``decayed`` to the next.
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

    last_E, decayed_DE = _count_use(last_E, decayed_DE, shift_D, number_D, needed_E, now)
    score_E = ((tl.sum(decayed_DE * factor_D[:, None], axis=0) >> _TRIM) << _STEP_BITS) + last_E

    resident_E = slot_E >= 0
    missing_E = needed_E & (slot_E < 0)
    score_E = tl.where(resident_E & (needed_E == 0), score_E, _FAR)  # of the experts that may be evicted
    needed = tl.sum(needed_E.to(tl.int64), axis=0)
    misses = tl.sum(missing_E.to(tl.int64), axis=0)
    hits_before = tl.load(tally)
    misses_before = tl.load(tally + 1)
    evictions = tl.load(tally + 2)
    tl.debug_barrier()  # every read comes before every write

    done = misses * 0
    while done < misses:
        expert = tl.min(tl.where(missing_E, number_E, _FAR), axis=0)
        missing_E = missing_E & (number_E != expert)
        empty = tl.min(tl.where(real_Q & (occupant_Q < 0), number_Q, _FAR), axis=0)
        lowest = tl.min(score_E, axis=0)
        victim = tl.min(tl.where(score_E == lowest, number_E, _FAR), axis=0)
        victim = tl.where(empty < slots, -1, victim)
        slot = tl.where(empty < slots, start + empty, tl.max(tl.where(number_E == victim, slot_E, -1), axis=0))
        score_E = tl.where(number_E == victim, _FAR, score_E)
        slot_E = tl.where(number_E == victim, -1, tl.where(number_E == expert, slot, slot_E))
        occupant_Q = tl.where(number_Q == slot - start, expert, occupant_Q)
        evictions += (victim >= 0).to(tl.int64)
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


@triton.jit(do_not_specialize=["page"])  # type: ignore[untyped-decorator]
def _gather(  # type: ignore[no-untyped-def]
    store, memory, missing_expert, missing_slot, missing_count, page, page_words, stride, record_words, BLOCK: tl.constexpr
):
    """Copy the missing experts' records into their slots. Grid: any number of programs.

    Args:
        store: the host store as int64 words, in pinned host memory.
        memory: the slots, record_words words each.
        missing_expert, missing_slot, missing_count: the tensors of ``Missing``.
        page: the page of the store on which the layer's first record begins.
        page_words: words of a page.
        stride: words from one record of the layer to the next.
        record_words: words of a record.
        BLOCK: words that a program copies at a time.
    """
    chunks = tl.cdiv(record_words, BLOCK)
    total = tl.load(missing_count) * chunks
    work = tl.program_id(0).to(tl.int64)
    while work < total:
        turn = work // chunks
        expert = tl.load(missing_expert + turn)
        slot = tl.load(missing_slot + turn)
        word = (work % chunks) * BLOCK + tl.arange(0, BLOCK)
        inside = word < record_words
        begin = page.to(tl.int64) * page_words + expert * stride
        tl.store(memory + slot * record_words + word, tl.load(store + begin + word, mask=inside), mask=inside)
        work += tl.num_programs(0)


class TritonKernels:
    """``device_slots.Kernels`` for a pool on a GPU whose store is pinned."""

    def __init__(self, loader: ExpertLoader) -> None:
        pool, shape = loader.pool, loader.store.shape
        # Copies of 16 bytes are never split, and every record begins on a page.
        assert pool.layout.nbytes % TENSOR_ALIGNMENT == 0
        self._pages = [shape.layer_offset[index] // PAGE for index in loader.store_layers]
        self._stride = pool.layout.stride // WORD_BYTES
        self._store = loader.store.memory.view(torch.int64)
        self._memory = pool.memory.view(torch.int64)
        self._shifts = torch.tensor([*SHIFTS, 63], device=pool.device)  # nothing is lost by a shift of 63

    def decide(self, layer: DeviceLayer, ids_N: torch.Tensor, missing: Missing) -> None:
        experts, slots = layer.slot_of_E.shape[0], layer.expert_of_Q.shape[0]
        block_E, block_Q = triton.next_power_of_2(experts), triton.next_power_of_2(slots)
        _decide[(1,)](
            ids_N,
            layer.slot_of_E,
            layer.expert_of_Q,
            layer.last_use_E,
            layer.decayed_DE,
            layer.step,
            layer.factors_D,
            self._shifts,
            layer.tally_3,
            missing.expert_M,
            missing.slot_M,
            missing.count,
            ids_N.shape[0],
            experts,
            slots,
            layer.start,
            layer.decayed_DE.stride(0),
            BLOCK_E=block_E,
            BLOCK_Q=block_Q,
            num_warps=1 if block_E <= ONE_WARP_EXPERTS else 4,  # one warp needs no barrier to agree on a victim
        )

    def copy(self, layer: DeviceLayer, missing: Missing) -> None:
        _gather[(GATHER_PROGRAMS,)](
            self._store,
            self._memory,
            missing.expert_M,
            missing.slot_M,
            missing.count,
            self._pages[layer.number],
            PAGE // WORD_BYTES,
            self._stride,
            self._memory.shape[1],
            BLOCK=GATHER_WORDS,
            num_warps=GATHER_WARPS,
        )
