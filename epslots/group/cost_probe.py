"""Short measurements at the start, from which the ranks' common ``Costs`` follow. ``join.py`` calls this.

Every rank measures; the largest figure of all ranks counts, because all wait for the slowest.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import msgspec
import torch

from epslots.cache.copy_engine import put_record
from epslots.cache.expert_loader import ExpertLoader
from epslots.cache.slot_pool import SlotPool
from epslots.moe.cpu_experts import CpuExperts
from epslots.moe.expert_compute import ExpertCompute
from epslots.planner.cost_model import HOST_COMPUTE, Costs
from epslots.transport.transport import Transport

_REPEATS = 7
# Enough that starting the work is a small part of it, few enough to be done in milliseconds.
_ROWS = 128
_SLOTS = 8


def measure_costs(transport: Transport, loader: ExpertLoader, experts: ExpertCompute, *, on_cpu: bool) -> Costs:
    """The costs that all ranks agree on: each figure is the largest of all ranks. All ranks call it together.

    Args:
        loader: of the pool whose experts are measured.
        experts: of the pool's first layer.
        on_cpu: whether the host's CPU may compute experts.
    """
    kernel, mine = experts.kernel, measure_alone(loader, experts, on_cpu=on_cpu)
    if transport.size == 1:
        return mine
    device = transport.device
    here = torch.zeros(loader.pool.layout.nbytes, dtype=torch.uint8, device=device)
    gone = torch.zeros_like(here)
    rank, size = transport.rank, transport.size
    after, before = (rank + 1) % size, (rank - 1) % size
    one, many = [1] * size, [_ROWS] * size
    rows = torch.zeros(_ROWS * size, kernel.hidden_size, dtype=kernel.dtype, device=device)
    wait = _wait_for(device)
    peer = _time(lambda: transport.exchange([(after, gone)], [(before, here)], agreed=True), wait)
    exchange = _time(lambda: transport.all_to_all(rows[:size], one, one, agreed=True), wait)
    full = _time(lambda: transport.all_to_all(rows, many, many, agreed=True), wait)
    gather = _time(lambda: transport.all_gather(rows[:1]), wait)
    scatter = _time(lambda: transport.reduce_scatter(rows[:size]), wait)
    mine = msgspec.structs.replace(
        mine,
        peer_fetch=max(1, peer),
        pair_transfer=max(1, (full - exchange) // (_ROWS * max(1, size - 1))),
        exchange=max(1, exchange),
        gather=max(1, (gather + scatter) // 2),
    )
    return agree_on_costs(transport, mine)


def measure_alone(loader: ExpertLoader, experts: ExpertCompute, *, on_cpu: bool) -> Costs:
    """The costs of a rank without others; every exchange counts as next to nothing.

    Args:
        loader: of the pool whose experts are measured.
        experts: of the pool's first layer.
        on_cpu: whether the host's CPU may compute experts.
    """
    kernel, slots, cpu = experts.kernel, experts.cache.slots, experts.cpu if on_cpu else None
    device, spec = loader.pool.device, loader.pool.layers[0]
    here = torch.zeros(loader.pool.layout.nbytes, dtype=torch.uint8, device=device)
    # One after the other, as misses come: from memory, and not from a cache.
    records = (loader.store.request(loader.store_layers[0], number % spec.num_experts) for number in itertools.count())
    rows = torch.zeros(_ROWS, kernel.hidden_size, dtype=kernel.dtype, device=device)
    wait = _wait_for(device)

    def fetch() -> None:
        for transfer in loader.link.start([here], [next(records)], put_record, urgent=True):
            loader.link.wait(transfer)

    turns = _slots_in_turn(loader.pool, slots)

    def compute(count: int) -> None:
        slot = next(turns)
        ends = torch.zeros(slots, dtype=torch.int32, device=device)
        ends[slot:] = count
        kernel(rows[:count], ends, torch.full((count,), slot, dtype=torch.int64, device=device))

    one_row, all_rows = (_time(lambda n=n: compute(n), wait) for n in (1, _ROWS))  # type: ignore[misc]
    host_expert, host_pair = (0, 0) if cpu is None else measure_cpu(cpu, rows, wait)
    return Costs(
        host_fetch=max(1, _time(fetch, wait)),
        peer_fetch=1,
        pair_transfer=1,
        pair_compute=max(1, (all_rows - one_row) // (_ROWS - 1)),
        expert_compute=max(1, one_row),
        exchange=1,
        gather=1,
        host_expert=host_expert,
        host_pair=host_pair,
    )


def _slots_in_turn(pool: SlotPool, slots: int) -> Iterator[int]:
    """The first layer's slots one after the other: experts come from memory, and not from a cache."""
    some = min(slots, _SLOTS)
    for slot in range(pool.slot_range(0).start, pool.slot_range(0).start + some):
        if pool.expert_of[slot] < 0:
            pool.memory[slot].zero_()  # or it may be no memory yet
    return itertools.cycle(range(some))


def _wait_for(device: torch.device) -> Callable[[], None]:
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def measure_cpu(cpu: CpuExperts, rows_NH: torch.Tensor, wait: Callable[[], None]) -> tuple[int, int]:
    """Nanoseconds of an expert on the CPU, and of one pair more; both at least 1.

    Args:
        rows_NH: hidden states on the device.
        wait: for the device.
    """
    experts = itertools.cycle(range(cpu.num_experts))

    def compute(count: int) -> None:
        expert = next(experts)
        cpu.compute(rows_NH[:count], torch.full((count,), expert, device=rows_NH.device), [expert], [count])

    one_row, all_rows = (_time(lambda n=n: compute(n), wait) for n in (1, len(rows_NH)))  # type: ignore[misc]
    return max(1, one_row), max(1, (all_rows - one_row) // (len(rows_NH) - 1))


def agree_on_costs(transport: Transport, mine: Costs) -> Costs:
    """The largest figures of all ranks. All ranks call it together."""
    return largest([msgspec.msgpack.decode(m, type=Costs) for m in transport.gather_bytes(msgspec.msgpack.encode(mine))])


def largest(costs: Sequence[Costs]) -> Costs:
    """Each figure's largest; hosts compute no experts unless all can."""
    found = {name: max(getattr(c, name) for c in costs) for name in Costs.__struct_fields__}
    if not all(c.computes_on_host for c in costs):
        found |= dict.fromkeys(HOST_COMPUTE, 0)
    return Costs(**found)


def _time(action: Callable[[], object], wait: Callable[[], None]) -> int:
    """Nanoseconds of one call: the median of a few, after two to warm up."""
    taken = []
    for _ in range(2 + _REPEATS):
        wait()
        began = time.perf_counter_ns()
        action()
        wait()
        taken.append(time.perf_counter_ns() - began)
    return int(statistics.median(taken[2:]))
