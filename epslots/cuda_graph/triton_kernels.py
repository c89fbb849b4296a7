"""``TritonKernels``: the device's decisions about slots (``triton_decisions.py``) and its copies. Optional: needs ``triton``.

Tests hold them to ``torch_kernels.TorchKernels`` by Triton's interpreter (``TRITON_INTERPRET=1``), and compile them for GPUs;
no test of the project runs them on one.

``_gather`` is a fixed grid of programs that share out the misses' bytes, however many there are, and read them from the host
store in place: memory that ``cudaHostRegister`` pinned is mapped into the GPU's addresses; a record begins on a page of it.
Of prefetches a program looks before every piece whether it is still wanted. Neither kernel waits for the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from epslots.cache.expert_loader import ExpertLoader
from epslots.cuda_graph.device_slots import DeviceLayer, Missing
from epslots.cuda_graph.triton_decisions import choose, decide
from epslots.layout import PAGE, TENSOR_ALIGNMENT
from epslots.planner.use_history import SHIFTS

# Programs that copy, and 8-byte words that each copies at a time. They are enough for a link of 64 GB/s with 2 us of latency
# (128 KB in flight), and few enough to leave the grid resident on small GPUs.
GATHER_PROGRAMS = 128
GATHER_WORDS = 1024
GATHER_WARPS = 8
WORD_BYTES = 8
# One warp's registers hold a layer of up to this many experts.
ONE_WARP_EXPERTS = 128


@triton.jit(do_not_specialize=["page"])  # type: ignore[untyped-decorator]
def _gather(  # type: ignore[no-untyped-def]
    store,
    memory,
    missing_expert,
    missing_slot,
    missing_count,
    arrived,
    dropped,
    page,
    page_words,
    stride,
    record_words,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Copy experts' records into their slots, in order. Grid: any number of programs.

    Args:
        store: the host store as int64 words, in pinned host memory.
        memory: the slots, record_words words each.
        missing_expert, missing_slot, missing_count: the tensors of ``Missing``, or those of ``DevicePrefetches``.
        arrived, dropped: of ``DevicePrefetches``; used where AHEAD.
        page: the page of the store on which the layer's first record begins.
        page_words: words of a page.
        stride: words from one record of the layer to the next.
        record_words: words of a record.
        BLOCK: words that a program copies at a time: a chunk.
        AHEAD: whether to count chunks, and to leave out those of dropped records.
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
        if AHEAD:
            wanted = tl.load(dropped + turn, volatile=True) == 0
            inside = inside & wanted
        begin = page.to(tl.int64) * page_words + expert * stride
        tl.store(memory + slot * record_words + word, tl.load(store + begin + word, mask=inside), mask=inside)
        if AHEAD:
            tl.atomic_add(arrived + turn, wanted.to(tl.int64))
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
        self.chunks = triton.cdiv(self._memory.shape[1], GATHER_WORDS)
        self._nbytes = pool.layout.nbytes
        self._shifts = torch.tensor([*SHIFTS, 63], device=pool.device)  # nothing is lost by a shift of 63

    def decide(self, layer: DeviceLayer, ids_N: torch.Tensor, missing: Missing) -> None:
        experts, slots = layer.slot_of_E.shape[0], layer.expert_of_Q.shape[0]
        block_E, block_Q = triton.next_power_of_2(experts), triton.next_power_of_2(slots)
        decide[(1,)](
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
            layer.left,
            layer.ahead.expert_F,
            layer.ahead.slot_F,
            layer.ahead.count,
            layer.ahead.arrived_F,
            layer.ahead.dropped_F,
            ids_N.shape[0],
            experts,
            slots,
            layer.start,
            layer.decayed_DE.stride(0),
            self.chunks,
            self._nbytes,
            BLOCK_E=block_E,
            BLOCK_Q=block_Q,
            num_warps=_warps(block_E),
        )

    def choose(self, layer: DeviceLayer, usage_E: torch.Tensor, running: torch.Tensor) -> None:
        ahead, experts, slots = layer.ahead, layer.slot_of_E.shape[0], layer.expert_of_Q.shape[0]
        block_E = triton.next_power_of_2(experts)
        choose[(1,)](
            usage_E,
            running,
            layer.slot_of_E,
            layer.expert_of_Q,
            layer.last_use_E,
            layer.decayed_DE,
            layer.step,
            layer.factors_D,
            layer.tally_3,
            layer.left,
            ahead.expected_E,
            ahead.verdict_3,
            ahead.expert_F,
            ahead.slot_F,
            ahead.count,
            ahead.arrived_F,
            ahead.dropped_F,
            ahead.fetched,
            experts,
            slots,
            layer.start,
            layer.decayed_DE.stride(0),
            self._nbytes,
            ahead.expert_F.shape[0],
            BLOCK_E=block_E,
            BLOCK_Q=triton.next_power_of_2(slots),
            num_warps=_warps(block_E),
        )

    def copy(self, layer: DeviceLayer, missing: Missing) -> None:
        self._gather(layer, missing, missing.count, missing.count, ahead=False)

    def copy_ahead(self, layer: DeviceLayer) -> None:
        ahead = layer.ahead
        listed = Missing(ahead.expert_F, ahead.slot_F, ahead.count)
        self._gather(layer, listed, ahead.arrived_F, ahead.dropped_F, ahead=True)

    def _gather(
        self, layer: DeviceLayer, listed: Missing, arrived: torch.Tensor, dropped: torch.Tensor, *, ahead: bool
    ) -> None:
        _gather[(GATHER_PROGRAMS,)](
            self._store,
            self._memory,
            listed.expert_M,
            listed.slot_M,
            listed.count,
            arrived,
            dropped,
            self._pages[layer.number],
            PAGE // WORD_BYTES,
            self._stride,
            self._memory.shape[1],
            BLOCK=GATHER_WORDS,
            AHEAD=ahead,
            num_warps=GATHER_WARPS,
        )


def _warps(block_E: int) -> int:
    """Warps of a decision: one needs no barrier to agree on a victim."""
    return 1 if block_E <= ONE_WARP_EXPERTS else 4
