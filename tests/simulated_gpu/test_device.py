"""The simulated device itself: it finds races and hidden waits, refuses what CUDA refuses, and times what it is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from epslots.simulated_gpu.cuda_api import simulated_gpus
from epslots.simulated_gpu.gpu_spec import GpuSpec
from epslots.simulated_gpu.launching import LinkRead, launch_kernel
from epslots.simulated_gpu.machine import DeviceHangsError, DeviceWork, SimulatedMachine

# Round numbers: a byte a nanosecond over the link, kernels of a millisecond, and a host that takes no time.
ROUND = GpuSpec("round", (9, 0), 1 << 30, 1e15, 1e15, 1e9, kernel_s=1e-3, copy_s=0.0, launch_s=0.0, wake_s=0.0, query_s=1e-9)
MB = 10**6


@pytest.fixture
def gpu() -> Iterator[SimulatedMachine]:
    with simulated_gpus(ROUND, count=2) as machine:
        yield machine


def pinned(numbers: int) -> torch.Tensor:
    return torch.zeros(numbers, dtype=torch.uint8, pin_memory=True)


def waits(gpu: SimulatedMachine) -> list[str]:
    return [what for what, _ in gpu.syncs]


def test_torch_is_left_as_it_was():
    names = ("Stream", "is_available", "current_stream")
    before = [getattr(torch.cuda, name) for name in names]
    with simulated_gpus():
        assert torch.cuda.is_available()
    assert [getattr(torch.cuda, name) for name in names] == before
    assert torch.arange(3).sum().item() == 3
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_values_are_those_of_the_cpu(gpu: SimulatedMachine):
    left, right = torch.randn(5, 8), torch.randn(8, 3)
    product = left.to("cuda") @ right.cuda()
    assert product.device == torch.device("cuda:0") and product.is_cuda
    assert torch.equal(product.cpu(), left @ right)
    product[1:3].zero_()
    product += 1
    assert torch.equal(product[1:3].cpu(), torch.ones(2, 3))


def test_a_race_names_both_lines(gpu: SimulatedMachine):
    slot, side = torch.zeros(100, device="cuda"), torch.cuda.Stream()
    with torch.cuda.stream(side):
        slot.fill_(1)
    slot.sum()
    (race,) = [race for race in gpu.races if race.second.startswith("sum")]
    assert race.kind == "read and write"
    assert "fill_ on stream" in race.first and race.first.count("test_device.py:") == race.second.count("test_device.py:") == 1


def test_events_and_waits_order_streams(gpu: SimulatedMachine):
    slot, side = torch.zeros(100, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        slot[:50].fill_(1)
        done = side.record_event()
        slot[50:].fill_(2)
    torch.cuda.current_stream().wait_event(done)
    slot[:50].sum()
    assert not gpu.races, "the other half is no matter"
    slot[50:].sum()
    assert len(gpu.races) == 1
    side.synchronize()
    slot.add_(1)
    assert len(gpu.races) == 1, "the host has waited"


def test_the_host_mustnt_touch_what_is_being_copied(gpu: SimulatedMachine):
    buffer, on_device = pinned(MB), torch.zeros(MB, dtype=torch.uint8, device="cuda")
    on_device.copy_(buffer, non_blocking=True)
    buffer.fill_(1)
    assert [race.kind for race in gpu.races] == ["read and write"]
    back = pinned(MB)
    back.copy_(on_device, non_blocking=True)
    assert back.numpy()[0] == 0
    assert len(gpu.races) == 2
    torch.cuda.synchronize()
    back.numpy()
    buffer.fill_(2)
    assert len(gpu.races) == 2


def test_memory_is_freed_only_after_its_last_use(gpu: SimulatedMachine):
    side = torch.cuda.Stream()
    temporary = torch.zeros(10, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        temporary.add_(1)
    del temporary
    assert [race.kind for race in gpu.races] == ["freed in use"]


@pytest.mark.parametrize(
    ("wait", "what"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: x.cpu(), "D2H"),
        (lambda x: x.tolist(), "D2H"),
        (lambda x: bool((x == 0).all()), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "by a mask"),
        (lambda x: x[torch.tensor([1])], "indices on the host"),
        (lambda x: x.copy_(torch.zeros(4), non_blocking=True), "H2D"),
        (lambda x: x.copy_(torch.zeros(4).pin_memory()), "H2D"),
        (lambda x: torch.tensor([1.0], device="cuda"), "H2D"),
        (lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64).pin_memory().to("cuda", non_blocking=True)), "repeat"),
        (lambda x: torch.cuda.synchronize(), "device"),
    ],
)
def test_hidden_waits_are_counted(gpu: SimulatedMachine, wait: Any, what: str):
    x = torch.zeros(4, device="cuda")
    assert not gpu.syncs
    wait(x)
    assert [found for found in waits(gpu) if what in found], waits(gpu)
    assert all("test_device.py:" in line for _, line in gpu.syncs)


def test_what_waits_for_nothing(gpu: SimulatedMachine):
    x = torch.zeros(4, device="cuda")
    x.copy_(torch.zeros(4).pin_memory(), non_blocking=True)
    torch.zeros(4, pin_memory=True).copy_(x, non_blocking=True)
    x[torch.zeros(2, dtype=torch.int64, device="cuda")] = 1
    (x * 2 + torch.tensor(3.0)).sort()
    assert not gpu.syncs
    assert not gpu.races


def test_devices_are_not_mixed(gpu: SimulatedMachine):
    x = torch.zeros(4, device="cuda")
    for other in (torch.zeros(4), torch.zeros(4, device="cuda:1")):
        with pytest.raises(RuntimeError, match="same device"):
            x + other
    assert (x + torch.tensor(1)).is_cuda, "a number of the host is an argument"
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


@pytest.mark.parametrize(("name", "fast"), [("a100", False), ("4090", False), ("h100", True), ("b200", True), ("5090", False)])
def test_grouped_products_are_fast_on_some_kinds(name: str, fast: bool):
    """torch asks the host for the groups' ends on all others, and for all other types."""
    with simulated_gpus(name) as gpu:
        rows, weights = torch.zeros(4, 16, device="cuda"), torch.zeros(3, 16, 16, device="cuda")
        ends = torch.full((3,), 4, dtype=torch.int32, device="cuda")
        F.grouped_mm(rows.bfloat16(), weights.bfloat16(), offs=ends)
        assert (not gpu.syncs) is fast
        gpu.reset()
        before = gpu.now_s
        F.grouped_mm(rows, weights, offs=ends)
        assert len(gpu.syncs) == 1
        assert gpu.now_s - before >= 3 * gpu.spec.launch_s, "a loop over all groups"


def test_memory_is_bounded_and_freed():
    with simulated_gpus("h100", memory_bytes=1000) as gpu:
        x = torch.zeros(800, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(300, dtype=torch.uint8, device="cuda")
        assert torch.cuda.mem_get_info() == (200, 1000)
        del x
        assert torch.cuda.mem_get_info() == (1000, 1000)
        assert gpu.peak == [800]


# ---------------------------------------------------------------------- the clock


def test_a_copy_engine_serves_in_order_of_readiness(gpu: SimulatedMachine):
    """A small copy behind a large one waits for it, at any priority of its stream; kernels go on."""
    large, small, urgent = pinned(5 * MB), pinned(1), torch.cuda.Stream(priority=-1)
    targets = torch.empty(5 * MB, dtype=torch.uint8, device="cuda"), torch.empty(1, dtype=torch.uint8, device="cuda")
    gpu.reset()
    targets[0].copy_(large, non_blocking=True)
    with torch.cuda.stream(urgent):
        targets[1].copy_(small, non_blocking=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    first, second, kernel = gpu.timeline.operations
    assert first.end_s == second.start_s == pytest.approx(5e-3)
    assert (kernel.start_s, kernel.end_s) == (0.0, pytest.approx(1e-3))
    assert gpu.now_s == second.end_s


def test_what_becomes_ready_first_is_served_first(gpu: SimulatedMachine):
    """Not what is queued first: a copy that waits for a kernel lets a later one pass."""
    numbers = pinned(MB)
    late, early = (torch.empty(MB, dtype=torch.uint8, device="cuda") for _ in range(2))
    side = torch.cuda.Stream()
    gpu.reset()
    late.fill_(0)
    late.copy_(numbers, non_blocking=True)
    with torch.cuda.stream(side):
        early.copy_(numbers, non_blocking=True)
    torch.cuda.synchronize()
    kernel, second, first = gpu.timeline.operations
    assert (kernel.end_s, first.start_s, second.start_s) == (pytest.approx(1e-3), 0.0, pytest.approx(1e-3))


def test_an_event_is_reached_by_the_clock(gpu: SimulatedMachine):
    torch.zeros(1, device="cuda")
    event = torch.cuda.current_stream().record_event()
    assert not event.query()
    gpu.spend(1e-3)
    assert event.query()
    assert not gpu.syncs, "looking is not waiting"


def test_what_never_ends_is_an_error_where_the_host_waits(gpu: SimulatedMachine):
    x, stream = torch.zeros(1, device="cuda"), torch.cuda.current_stream()
    gpu.operate(DeviceWork("lost", seconds=float("inf")), stream.stream_id)
    assert not stream.query()
    with pytest.raises(DeviceHangsError, match="for ever"):
        x.cpu()


# ---------------------------------------------------------------------- captures


def captured(step: Any) -> Any:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph


def test_a_capture_changes_nothing_and_a_replay_repeats(gpu: SimulatedMachine):
    total, number, seen = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda"), []

    def step() -> None:
        seen.append(None)
        total.add_(number * 2)
        launch_kernel("ours", lambda t: t.mul_(2), total, reads=[total], writes=[total])

    graph = captured(step)
    assert total.tolist() == [0, 0, 0]
    gpu.reset()
    graph.replay()
    number.fill_(10)
    graph.replay()
    assert total.tolist() == [48, 48, 48]
    assert len(seen) == 1
    assert {name: count for (_, name), count in gpu.kernels.items()} == {"mul": 2, "add_": 2, "ours": 2, "fill_": 1}
    assert not gpu.races


def test_a_replayed_kernel_takes_the_time_of_its_values(gpu: SimulatedMachine):
    """A copy of missing experts by a kernel: as long as what is missing, in each replay anew."""
    count = torch.ones(1, device="cuda")

    def step() -> None:
        count.mul_(2)
        launch_kernel("ours", lambda _: None, count, reads=[count], link=LinkRead(lambda: 5 * MB * float(count.memory)))  # type: ignore[attr-defined]

    graph = captured(step)
    graph.replay()
    graph.replay()
    gpu.timeline.run(float("inf"))
    ours = [operation for operation in gpu.timeline.operations if operation.name == "ours"]
    assert [round(operation.duration_s * 1e3) for operation in ours] == [10, 20]


def test_rows_of_a_table_cost_what_they_are(gpu: SimulatedMachine):
    """An embedding reads its rows, and a scatter writes its own: not the whole table."""
    table, rows = torch.zeros(1000, 8, device="cuda"), torch.tensor([3, 5]).to("cuda")
    torch.nn.functional.embedding(rows, table)
    table.index_copy_(0, rows, torch.ones(2, 8, device="cuda"))
    moved = {operation.name: operation.nbytes for operation in gpu.timeline.operations}
    assert moved["embedding"] == 2 * 64 + rows.nbytes and moved["index_copy_"] == 2 * 64 + rows.nbytes


@pytest.mark.parametrize(
    "illegal",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.zeros(4), non_blocking=True),
        lambda x: x[x > 0],
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.current_stream().synchronize(),
        lambda x: F.grouped_mm(x.view(1, 4), x.view(1, 4, 1), offs=torch.ones(1, dtype=torch.int32, device="cuda")),
    ],
)
def test_no_capture_allows_a_wait(gpu: SimulatedMachine, illegal: Any):
    x = torch.zeros(4, device="cuda")
    with pytest.raises(RuntimeError, match=r"not permitted when stream is capturing.*test_device\.py"):
        captured(lambda: illegal(x))
    x.add_(1)
    assert x.tolist() == [1] * 4, "the stream is free again"


def test_a_capture_is_closed_to_other_streams(gpu: SimulatedMachine):
    x, outside = torch.zeros(4, device="cuda"), torch.cuda.Stream()
    before = outside.record_event()

    def forks_without_joining() -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)

    def forks_and_joins() -> None:
        side, here = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            x.add_(1)
        here.wait_stream(side)

    def uses_another_stream() -> None:
        with torch.cuda.stream(outside):
            x.add_(1)

    for step, error in (
        (lambda: torch.cuda.current_stream().wait_event(before), "uncaptured work"),
        (forks_without_joining, "unjoined"),
        (uses_another_stream, "another stream"),
    ):
        with pytest.raises(RuntimeError, match=error):
            captured(step)
    captured(forks_and_joins).replay()
    assert x.tolist() == [1] * 4


def test_forked_streams_run_beside_each_other(gpu: SimulatedMachine):
    """In a replay, too; and what nothing orders there is a race."""
    x, y = torch.zeros(5 * MB, dtype=torch.uint8, device="cuda"), torch.zeros(4, device="cuda")
    record = pinned(5 * MB)

    def step(*, again: bool) -> None:
        side, here = torch.cuda.Stream(), torch.cuda.current_stream()
        y.add_(1)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            x.copy_(record, non_blocking=True)
        y.add_(1)
        if again:
            x.add_(1)
        here.wait_stream(side)
        x.add_(1)

    graph = captured(lambda: step(again=False))
    gpu.reset()
    graph.replay()
    torch.cuda.synchronize()
    first, copy, beside, last = [one for one in gpu.timeline.operations if one.engine]
    assert first.end_s == copy.start_s == beside.start_s < beside.end_s < copy.end_s == last.start_s
    assert gpu.races == [] and y.tolist() == [2] * 4 and int(x[7]) == 1
    captured(lambda: step(again=True)).replay()
    assert [race.kind for race in gpu.races] == ["two writes"]
