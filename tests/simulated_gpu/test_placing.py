"""Which GPU a process uses, of several; and how it pins its store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from epslots.cache import pinning
from epslots.devices import cpu_share, resolve_device, wait_for_freed_memory
from epslots.errors import ConfigError
from epslots.host_limits import usable_cores
from epslots.runtime import runtime_of
from epslots.simulated_gpu.cuda_api import simulated_gpus
from tests.support import zoo
from tests.support.simulated import greedy_on, load_gpu


def test_another_gpu_than_the_first_is_the_only_one(checkpoint: Callable[[str], Path], shared_stores: Path):
    """Triton would launch on the current GPU, and a context on the first one would cost half a gigabyte."""
    folder, ids = checkpoint("qwen3_moe"), zoo.random_ids(1, 9, seed=1)
    with simulated_gpus(count=2) as gpu:
        model = load_gpu(folder, shared_stores, device="cuda:1")
        assert torch.cuda.current_device() == 1
        assert greedy_on(model, ids, 3) == greedy_on(zoo.reference(folder), ids, 3)
        assert gpu.contexts == {1}
        assert gpu.races == []


@pytest.mark.parametrize(("count", "local_rank", "found"), [(1, "3", 0), (4, "3", 3), (4, None, 0), (1, None, 0)])
def test_a_lone_gpu_is_taken(count: int, local_rank: str | None, found: int, monkeypatch: pytest.MonkeyPatch):
    """Slurm shows each process its own GPU alone, which is the first one there."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with simulated_gpus(count=count):
        assert resolve_device("cuda") == torch.device("cuda", found)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with simulated_gpus(count=2), pytest.raises(ConfigError, match="2 GPUs here"):
        resolve_device("cuda")


class Freeing:
    """A clock by which a killed process's memory comes back bit by bit until a moment; sleeping is what makes it pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, until_s: float) -> None:
        self.now, total = 0.0, 80 << 30
        free = lambda device: (int(total * min(0.5, 0.1 + 0.4 * self.now / until_s)), total)  # noqa: E731
        monkeypatch.setattr(torch.cuda, "mem_get_info", free)
        wait_for_freed_memory(torch.device("cuda:0"), clock=lambda: self.now, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_replacement_plans_with_all_that_is_freed(monkeypatch: pytest.MonkeyPatch):
    """The driver takes its time; half of the memory stays another's."""
    assert 4.0 < Freeing(monkeypatch, until_s=3.5).now < 4.9
    assert Freeing(monkeypatch, until_s=1e9).now < 1.5, "nothing worth a wait"


def test_an_empty_gpu_is_not_waited_for():
    with simulated_gpus():
        wait_for_freed_memory(torch.device("cuda:0"), sleep=lambda _: pytest.fail("it sleeps"))
        wait_for_freed_memory(torch.device("cpu"), sleep=lambda _: pytest.fail("it sleeps"))


def test_gpu_ranks_share_the_nodes_cores():
    """Ray would leave each one thread."""
    assert cpu_share(torch.device("cuda:0"), 1) == usable_cores()
    assert cpu_share(torch.device("cuda:0"), 10**6) == 1
    assert cpu_share(torch.device("cpu"), 1) == 0


def pin_some(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Let the runtime refuse to pin more than a share of the store."""
    real, asked = torch.cuda.cudart, []

    def runtime() -> Any:
        found = real()
        register = found.cudaHostRegister

        def refuse(address: int, nbytes: int, flags: int) -> int:
            asked.append(nbytes)
            return 2 if len(asked) > share * 48 else register(address, nbytes, flags)

        found.cudaHostRegister = refuse
        return found

    monkeypatch.setattr(torch.cuda, "cudart", runtime)
    monkeypatch.setattr(pinning, "PIECE_BYTES", 1)


@pytest.mark.parametrize("kind", ["file", "half pinned"])
def test_a_store_that_is_not_pinned_is_staged_by_a_thread(
    kind: str, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Never copied from pageable memory, which would make the host wait for the stream; what is pinned crosses directly."""
    folder, ids = checkpoint("qwen3_moe"), zoo.random_ids(1, 9, seed=1)
    with simulated_gpus() as gpu, monkeypatch.context() as patch:
        if kind == "half pinned":
            pin_some(patch, 0.5)
        model = load_gpu(folder, tmp_path, slots="50%", host_store="file" if kind == "file" else "memory")
        store = runtime_of(model).store
        assert 0 < store.pinned_bytes < store.nbytes if kind == "half pinned" else not store.pinned_bytes
        gpu.reset()
        assert greedy_on(model, ids, 6) == greedy_on(zoo.reference(folder), ids, 6)
        runtime_of(model).check_integrity()
        waits = {line.rpartition(":")[0] for what, line in gpu.syncs if what.startswith("H2D")}
        assert not {line for line in waits if line.startswith("epslots/cache")}
        assert gpu.races == []
