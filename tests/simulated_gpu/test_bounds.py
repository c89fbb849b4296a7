"""Each moment has one reason, on timelines that are written out by hand."""

from __future__ import annotations

import pytest
import torch

from epslots.simulated_gpu.bounds import bounds_of
from epslots.simulated_gpu.gpu_spec import GpuSpec
from epslots.simulated_gpu.timeline import Operation, Timeline
from epslots.simulated_gpu.true_sizes import TrueSizes

# Bytes and products at one a second; a kernel takes at least a second.
SPEC = GpuSpec("round", (9, 0), 1 << 30, 1.0, 1.0, 1.0, kernel_s=1.0, node_s=0.0)


def kernel(queued_s: float, seconds: float, nbytes: int = 0, stream: int = 1, after: tuple[Operation, ...] = ()) -> Operation:
    return Operation("kernel", stream, "SM:0", queued_s, seconds, nbytes, after=after)


def run(*operations: Operation) -> list[Operation]:
    timeline = Timeline()
    for operation in operations:
        timeline.queue(operation)
    timeline.run(float("inf"))
    return list(operations)


def test_kernels_are_bound_by_bytes_products_or_their_floor():
    found = bounds_of(run(kernel(0, 5, 5), kernel(0, 4, 1), kernel(0, 1)), [], SPEC, 0, 10)
    assert (found.hbm, found.compute, found.floor) == (5, 4, 1)
    assert found.total == 10 and found.largest == "HBM"


def test_a_late_host_is_busy_or_was_waiting():
    """3 seconds of a wait, and 2 of work behind it, before the second kernel is queued."""
    found = bounds_of(run(kernel(0, 2, 2), kernel(7, 1)), [(0.5, 5)], SPEC, 0, 8)
    assert (found.sync, found.host, found.hbm, found.floor) == (3, 2, 2, 1)


def test_a_kernel_behind_a_copy_waits_for_the_link():
    copy = Operation("H2D", 2, "H2D:0", 0, 6, 6)
    found = bounds_of(run(copy, kernel(0, 2, 2), kernel(3, 1, after=(copy,))), [], SPEC, 0, 7)
    assert (found.hbm, found.host, found.link, found.floor) == (2, 1, 3, 1)
    assert found.link_busy == 6 and found.total == 7


def test_a_kernel_that_reads_the_host_is_the_links():
    """Captured decoding copies missing experts by a kernel; where nothing is missing it is as short as any."""
    some, nothing = kernel(0, 4), kernel(0, 1)
    some.over_link = nothing.over_link = True
    found = bounds_of(run(some, nothing), [], SPEC, 0, 5)
    assert (found.link, found.floor, found.link_busy) == (4, 1, 4)


@pytest.mark.parametrize(("began_s", "ended_s"), [(0, 9), (1, 4), (2.5, 6)])
def test_the_reasons_add_up_to_the_time(began_s: float, ended_s: float):
    copy = Operation("H2D", 2, "H2D:0", 1, 3, 3)
    operations = run(copy, kernel(0, 2, 2), kernel(2.5, 1, after=(copy,)), kernel(6, 2, 1))
    found = bounds_of(operations, [(0.5, 1.5), (4, 5)], SPEC, began_s, ended_s)
    assert found.total == pytest.approx(ended_s - began_s)
    assert min(found.by_reason.values()) >= 0


def test_tiny_widths_weigh_as_the_true_ones():
    sizes = TrueSizes({40: 2048, 24: 128})
    sizes.add(6720, 9_437_184)
    assert sizes.numel((1, 32, 300, 24)) == 32 * 300 * 128
    assert sizes.nbytes(torch.zeros(3, 40, dtype=torch.bfloat16)) == 3 * 2048 * 2
    assert sizes.nbytes(torch.zeros(3, 1).expand(3, 40)) == 3 * 4, "read once"
    assert sizes.nbytes(torch.zeros(6720, dtype=torch.uint8)) == 9_437_184
    with pytest.raises(AssertionError, match="24 stands for 128 and 64"):
        sizes.add(24, 64)
