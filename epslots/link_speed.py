"""What things cost on this machine: short measurements at the start, from which the ranks' common ``Costs`` follow.

Every rank measures; the largest figure of all ranks counts, because the slowest is waited for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import msgspec
import torch

from epslots.costs import Costs
from epslots.fetch import Mover
from epslots.kernel import ExpertKernel
from epslots.transport import Transport

_REPEATS = 7
# Enough that starting the work is a small part of it, few enough to be done in milliseconds.
_ROWS = 128


def measure_costs(transport: Transport, mover: Mover, kernel: ExpertKernel, slots: int) -> Costs:
    """Measure, and agree with all ranks. All ranks call it together.

    Args:
        mover: of the pool whose experts are measured.
        kernel: of one of the pool's layers, with ``slots`` slots.
    """
    device, nbytes = transport.device, mover.pool.layout.nbytes
    here, there = torch.zeros(nbytes, dtype=torch.uint8, device=device), mover.store.record(mover.store_layers[0], 0)
    gone = torch.zeros_like(here)
    rank, size = transport.rank, transport.size
    after, before = (rank + 1) % size, (rank - 1) % size
    one, many = [1] * size, [_ROWS] * size
    rows = torch.zeros(_ROWS * size, kernel.hidden_size, dtype=kernel.dtype, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def compute(count: int) -> None:
        ends = torch.full((slots,), count, dtype=torch.int32, device=device)
        kernel(rows[:count], ends, torch.zeros(count, dtype=torch.int64, device=device))

    host = _time(lambda: here.copy_(there), wait)
    peer = _time(lambda: transport.exchange([(after, gone)], [(before, here)], agreed=True), wait)
    exchange = _time(lambda: transport.all_to_all(rows[:size], one, one, agreed=True), wait)
    full = _time(lambda: transport.all_to_all(rows, many, many, agreed=True), wait)
    gather = _time(lambda: transport.all_gather(rows[:1]), wait)
    scatter = _time(lambda: transport.reduce_scatter(rows[:size]), wait)
    one_row, all_rows = (_time(lambda n=n: compute(n), wait) for n in (1, _ROWS))  # type: ignore[misc]
    mine = Costs(
        host_fetch=max(1, host),
        peer_fetch=max(1, peer),
        pair_transfer=max(1, (full - exchange) // (_ROWS * max(1, size - 1))),
        pair_compute=max(1, (all_rows - one_row) // (_ROWS - 1)),
        expert_compute=max(1, one_row),
        exchange=max(1, exchange),
        gather=max(1, (gather + scatter) // 2),
    )
    return agree_on_costs(transport, mine)


def agree_on_costs(transport: Transport, mine: Costs) -> Costs:
    """The largest figures of all ranks. All ranks call it together."""
    return largest([msgspec.msgpack.decode(m, type=Costs) for m in transport.gather_bytes(msgspec.msgpack.encode(mine))])


def largest(costs: Sequence[Costs]) -> Costs:
    """Each figure's largest."""
    return Costs(**{name: max(getattr(c, name) for c in costs) for name in Costs.__struct_fields__})


def _time(action: Callable[[], object], wait: Callable[[], None]) -> int:
    """Nanoseconds of one call: the median of a few, after two that don't count."""
    taken = []
    for _ in range(2 + _REPEATS):
        wait()
        began = time.perf_counter_ns()
        action()
        wait()
        taken.append(time.perf_counter_ns() - began)
    return int(statistics.median(taken[2:]))
