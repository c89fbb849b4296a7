"""The budget of a decoded layer: kernels of ours, host synchronisations, uploads, and the waits of its computing.

The model has the operations of Qwen3-MoE on an H100 in bf16. The figures are today's: they may only be lowered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import epslots
from epslots.cache.cuda_engine import CudaEngine
from epslots.device_copy import copy_to_device, prepare_uploads, to_device
from epslots.generation.engine import Engine
from epslots.generation.requests import Request
from epslots.runtime import runtime_of
from epslots.simulated_gpu import cuda_api
from epslots.simulated_gpu.cuda_api import simulated_gpus
from epslots.simulated_gpu.gpu_spec import GpuSpec
from epslots.simulated_gpu.machine import SimulatedMachine
from tests.support import zoo
from tests.support.simulated import decode, kernels_by_line, kernels_of, load_gpu, waits_of

STEPS, LAYERS = 6, 3
# A byte a nanosecond over the link, kernels of a millisecond, and a host that takes no time.
ROUND = GpuSpec("round", (9, 0), 1 << 30, 1e15, 1e15, 1e9, kernel_s=1e-3, copy_s=0.0, launch_s=0.0, wake_s=0.0, query_s=1e-9)
MB = 10**6


@pytest.fixture
def gpu() -> Iterator[SimulatedMachine]:
    with simulated_gpus(ROUND) as machine:
        yield machine


def qwen(folder: Path, store_dir: Path, slots: str) -> PreTrainedModel:
    return load_gpu(folder, store_dir, slots=slots, dtype="bfloat16", host_compute="off")


def put(slot: torch.Tensor, record: torch.Tensor) -> None:
    slot.copy_(record, non_blocking=True)


def uploads_of(gpu: SimulatedMachine) -> list[str]:
    """Source lines of copies to the device by a copy engine."""
    return [line for kind, line in gpu.copies if kind == "H2D"]


def test_all_resident_waits_for_nothing(checkpoint: Callable[[str], Path], shared_stores: Path):
    with simulated_gpus("h100") as gpu:
        decode(gpu, qwen(checkpoint("qwen3_moe"), shared_stores, "100%"), STEPS)
        assert kernels_of(gpu)["epslots"] <= 7 * STEPS * LAYERS, kernels_by_line(gpu)
        assert not gpu.syncs and not gpu.copies
        assert gpu.races == []


def test_misses_wait_for_the_counts_alone(checkpoint: Callable[[str], Path], shared_stores: Path):
    """One synchronisation a layer, and no copy to the device but those of records; small uploads are read by a kernel."""
    with simulated_gpus("h100") as gpu:
        model = qwen(checkpoint("qwen3_moe"), shared_stores, "50%")
        decode(gpu, model, STEPS)
        assert kernels_of(gpu)["epslots"] <= 12 * STEPS * LAYERS, kernels_by_line(gpu)
        assert waits_of(gpu) == {"peers.py": STEPS * LAYERS}
        assert {line.rpartition(":")[0] for line in uploads_of(gpu)} == {"epslots/cache/copy_engine.py"}
        assert gpu.kernels["epslots", "bitwise_or"] <= STEPS * LAYERS, "one upload"
        assert gpu.races == []


@pytest.mark.parametrize(("slots", "most"), [("100%", 11), ("50%", 18)])
def test_a_layer_of_a_captured_step(slots: str, most: int, checkpoint: Callable[[str], Path], shared_stores: Path):
    """The cost of a further layer: four kernels are the row cache's, for keys and values, the others the experts'."""
    kernels = []
    for name in ("qwen3_moe_short", "qwen3_moe"):
        with simulated_gpus("h100") as gpu:
            model = qwen(checkpoint(name), shared_stores / name, slots)
            engine = Engine(model, cache="rows", kv_tokens=256, max_requests=2)
            engine.batcher.add(Request("0", tuple(zoo.random_ids(1, 7, seed=1)[0].tolist()), max_new_tokens=20))
            for _ in range(8):
                engine.step()
            gpu.reset()
            for _ in range(STEPS):
                engine.step()
            assert engine.batcher.stats().replayed_steps > STEPS
            kernels.append(kernels_of(gpu)["epslots"])
            engine.batcher.close()
    assert 0 < kernels[1] - kernels[0] <= most * STEPS


def test_a_complete_layer_never_waits(checkpoint: Callable[[str], Path], shared_stores: Path):
    """Also where the next one may miss: its predictions come to the host while the layer's kernels are queued."""
    with simulated_gpus("h100") as gpu:
        model = qwen(checkpoint("qwen3_moe"), shared_stores, f"{47 * 64 * 32 * 3 * 2}B")
        complete = [runner.cache.holds_all for runner in runtime_of(model).runners]
        assert 0 < sum(complete) < LAYERS
        before = epslots.stats(model).total("prefetches")
        decode(gpu, model, STEPS)
        assert waits_of(gpu) == {"peers.py": STEPS * complete.count(False)}
        if complete[0] or complete[1]:
            assert epslots.stats(model).total("prefetches") > before


def test_a_small_upload_passes_bulk_copies(gpu: SimulatedMachine):
    """A copy engine would serve it after the record: all hits would wait for the misses."""
    engine, slot = CudaEngine(torch.device("cuda:0")), torch.zeros(5 * MB, dtype=torch.uint8, device="cuda")
    row = torch.zeros(16, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    (transfer,) = engine.start([slot], [torch.ones(5 * MB, dtype=torch.uint8).pin_memory()], put, urgent=True)
    began = gpu.now_s
    numbers = torch.arange(16).numpy()
    copy_to_device(numbers, row)
    sent = to_device(torch.arange(5, dtype=torch.int16).numpy(), row.device)
    numbers[:] = 0  # the host goes on at once
    assert row.tolist() == list(range(16)) and sent.tolist() == list(range(5))
    assert gpu.now_s - began < 5e-3
    engine.wait(transfer)
    assert int(slot[0]) == 1
    assert gpu.now_s - began >= 5e-3
    assert gpu.races == []


def test_uploads_never_share_a_buffer_in_use(gpu: SimulatedMachine):
    """The device reads late: each upload has memory of its own until then, and memory is used again after."""
    device = torch.device("cuda:0")
    sent = [to_device(torch.full((7,), number).numpy(), device) for number in range(20)]
    assert [int(one[3]) for one in sent] == list(range(20))
    pinned = gpu.pinned_blocks
    for number in range(20):
        torch.cuda.synchronize()
        to_device(torch.full((7,), number).numpy(), device)
    assert gpu.pinned_blocks == pinned
    assert gpu.races == []


def test_compute_never_waits_for_a_dropped_guess(gpu: SimulatedMachine):
    """Its copy can't be taken back; but the next copy into the slot is all that comes after it."""
    engine = CudaEngine(torch.device("cuda:0"))
    slots = [torch.zeros(5 * MB, dtype=torch.uint8, device="cuda") for _ in range(2)]
    prefetch, record = (torch.full((5 * MB,), value, dtype=torch.uint8).pin_memory() for value in (1, 2))
    torch.cuda.synchronize()

    (prefetched,) = engine.start(slots[:1], [prefetch], put, urgent=False)
    began = gpu.now_s
    assert engine.cancel(prefetched)
    other = torch.ones(1, device="cuda").item()
    assert other == 1 and gpu.now_s - began < 5e-3
    (needed,) = engine.start(slots[:1], [record], put, urgent=True)
    engine.wait(needed)
    assert int(slots[0][0]) == 2
    assert gpu.now_s - began >= 10e-3
    assert gpu.races == []


def test_other_writers_come_after_a_dropped_guess(gpu: SimulatedMachine):
    """A peer's copy into the slot, or the device's own."""
    engine, slot = CudaEngine(torch.device("cuda:0")), torch.zeros(5 * MB, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    record = torch.ones(5 * MB, dtype=torch.uint8).pin_memory()
    (prefetched,) = engine.start([slot], [record], put, urgent=False)
    engine.cancel(prefetched)
    engine.wait_cancelled([slot])
    slot.fill_(3)
    assert gpu.races == []
    assert int(slot[0]) == 3


@pytest.mark.parametrize("fault", ["torch refuses the address", "the device reads other memory"])
def test_an_upload_by_a_kernel_is_tried_before_it_is_used(fault: str, gpu: SimulatedMachine, monkeypatch: pytest.MonkeyPatch):
    """Where the first one fails, the copy engine serves them: from pinned memory, so the host still waits for nothing."""

    def refuse(interface: dict[str, object], number: int) -> torch.Tensor:
        if fault.startswith("torch"):
            raise RuntimeError("The specified pointer resides on host memory")
        return torch.zeros(interface["shape"], dtype=torch.int64, device="cuda")  # type: ignore[call-overload]

    monkeypatch.setattr(cuda_api, "mapped", refuse)
    device, row = torch.device("cuda:0"), torch.zeros(16, dtype=torch.int64, device="cuda")
    prepare_uploads(device)
    gpu.reset()
    numbers = torch.arange(16).numpy()
    copy_to_device(numbers, row)
    sent = [to_device(torch.full((7,), number).numpy(), device) for number in range(20)]
    numbers[:] = 0
    assert not gpu.syncs and len(uploads_of(gpu)) == 1
    assert row.tolist() == list(range(16))
    assert [one.tolist() for one in sent] == [[number] * 7 for number in range(20)]
    assert gpu.races == []
