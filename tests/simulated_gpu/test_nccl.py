"""Ranks on simulated GPUs, over a stand-in for NCCL that holds them to its rules."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import epslots
from epslots.cache.cuda_engine import CudaEngine
from epslots.config import LOAD_DEADLINE_S
from epslots.errors import PeerLost, RankUnusable
from epslots.group.join import join
from epslots.runtime import runtime_of
from epslots.simulated_gpu.cuda_api import simulated_gpus
from epslots.simulated_gpu.machine import DeviceHangsError, SimulatedMachine
from epslots.simulated_gpu.nccl_group import NcclHub, OutOfOrderError, SimulatedNcclGroup
from epslots.transport import forming, nccl, rendezvous
from epslots.transport.torch_transport import TorchTransport
from tests.support import zoo
from tests.support.grouped_ranks import COPIES_TRAVEL, TOKENS_TRAVEL
from tests.support.rank_helpers import PATIENCE_S
from tests.support.simulated import greedy_on, load_gpu
from tests.support.simulated_ranks import nccl_stand_in, on_ranks

CUDA = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def nccl_environment() -> Iterator[None]:
    with nccl_stand_in():
        yield


@pytest.fixture
def gpus() -> Iterator[SimulatedMachine]:
    with simulated_gpus("h100", count=2) as machine:
        yield machine


def test_operations_move_the_right_bytes(gpus: SimulatedMachine):
    def work(transport: TorchTransport) -> Any:
        rank, device = transport.rank, transport.device
        mine = torch.arange(3, device=device) + 10 * rank
        gathered = transport.to_host(transport.all_gather(mine))
        rows = transport.all_to_all(mine, [1 + rank, 2 - rank], [1, 2] if rank == 0 else [2, 1], agreed=True)
        summed = transport.reduce_scatter(torch.stack([mine, 2 * mine]))
        sent = torch.full((4,), rank + 1, dtype=torch.uint8, device=device)
        received = torch.zeros_like(sent)
        transport.exchange([(1 - rank, sent)], [(1 - rank, received)], agreed=True)
        return gathered.tolist(), *(transport.to_host(one).tolist() for one in (rows, summed, received))

    first, second = on_ranks(NcclHub(2), work)
    assert first == ([[0, 1, 2], [10, 11, 12]], [0, 10, 11], [10, 12, 14], [2] * 4)
    assert second == ([[0, 1, 2], [10, 11, 12]], [1, 2, 12], [20, 24, 28], [1] * 4)
    assert gpus.races == []


def test_ranks_out_of_order_are_found(gpus: SimulatedMachine):
    def work(transport: TorchTransport) -> None:
        numbers = torch.zeros(2, device=transport.device)
        (transport.all_gather if transport.rank else transport.reduce_scatter)(numbers)

    with pytest.raises(OutOfOrderError):
        on_ranks(NcclHub(2), work)


@pytest.mark.parametrize("costs", [TOKENS_TRAVEL, COPIES_TRAVEL])
def test_two_ranks_answer_as_plain_transformers(costs: Any, checkpoint: Callable[[str], Path], shared_stores: Path):
    """Tokens or experts travel; the host waits for the counts, and nothing races."""
    folder, ids = checkpoint("qwen3_moe"), zoo.random_ids(1, 9, seed=1)
    expected = greedy_on(zoo.reference(folder), ids, 4)
    with simulated_gpus("h100", count=2) as gpu:
        models = [load_gpu(folder, shared_stores, slots="50%", device=f"cuda:{rank}") for rank in range(2)]
        gpu.reset()

        def work(transport: TorchTransport) -> Any:
            model = models[transport.rank]
            join(model, transport, settings={}, costs=costs)
            with torch.no_grad(), epslots.sync_ranks(model):
                return greedy_on(model, ids, 4)

        assert on_ranks(NcclHub(2), work) == [expected] * 2
        assert gpu.races == []
        blocking = {line for _, line in gpu.syncs if "epslots/" in line}
        assert not blocking, "the one place where a rank waits looks at an event"
        for model in models:
            runtime_of(model).check_integrity()


def test_a_groups_layer_waits_for_the_counts_alone(
    checkpoint: Callable[[str], Path], shared_stores: Path, monkeypatch: pytest.MonkeyPatch
):
    """And a step for its header: nothing else makes the host of a rank wait, though tokens travel and experts are fetched."""
    waits, wait_until, steps = [0, 0], TorchTransport.wait_until, 3

    def counted(transport: TorchTransport, done: Callable[[], bool]) -> None:
        waits[transport.rank] += 1
        wait_until(transport, done)

    monkeypatch.setattr(TorchTransport, "wait_until", counted)
    with simulated_gpus("h100", count=2) as gpu:
        settings: dict[str, Any] = {"slots": "25%", "dtype": "bfloat16", "host_compute": "off"}
        models = [load_gpu(checkpoint("qwen3_moe"), shared_stores, device=f"cuda:{rank}", **settings) for rank in range(2)]

        @torch.no_grad()
        def work(transport: TorchTransport) -> tuple[int, int]:
            model, rank = models[transport.rank], transport.rank
            join(model, transport, settings={}, costs=TOKENS_TRAVEL)
            before = 0
            with epslots.sync_ranks(model):
                for step in range(2 + steps):  # in the first one, sizes are checked
                    before = waits[rank] if step == 2 else before
                    model(zoo.random_ids(1, 3, seed=10 * rank + step).to(model.device), use_cache=False)
                counted_waits = waits[rank] - before
            return counted_waits, epslots.stats(model).total("misses")

        found = on_ranks(NcclHub(2), work)
        layers = len(runtime_of(models[0]).runners)
        assert [count for count, _ in found] == [steps * (layers + 1)] * 2
        assert sum(misses for _, misses in found) > 0
        assert not {line for _, line in gpu.syncs if "epslots/moe" in line or "epslots/transport" in line}
        assert gpu.races == []


def test_a_lost_peer_is_raised_at_the_deadline(gpus: SimulatedMachine):
    """The device never ends the operation; only a look at an event finds out."""
    hub = NcclHub(2)

    def work(transport: TorchTransport) -> str:
        if transport.rank == 1:
            hub.lose(1)
            return ""
        result = transport.all_gather(torch.zeros(2, device=transport.device))
        with pytest.raises(DeviceHangsError):
            result.cpu()
        with pytest.raises(PeerLost) as caught:
            transport.to_host(result)
        with pytest.raises(PeerLost):
            transport.to_host(result)
        return str(caught.value)

    assert "the device didn't finish what was queued within 0.2 s" in on_ranks(hub, work, deadline_s=0.2)[0]


def test_a_broken_connection_is_raised_at_once(gpus: SimulatedMachine):
    """The watchdog sees it; the device itself never ends the operation. Aborting then names the error once more."""
    hub = NcclHub(2)

    def work(transport: TorchTransport) -> str:
        if transport.rank == 1:
            hub.lose(1)
            return ""
        result = transport.all_gather(torch.zeros(2, device=transport.device))
        transport._group.broken = True  # type: ignore[attr-defined]
        with pytest.raises(PeerLost) as caught:
            transport.to_host(result)
        return str(caught.value)

    told = on_ranks(hub, work, deadline_s=20.0)[0]
    assert re.match(r"a peer is gone or silent: NCCL reports COMM_ERROR, \S+ s into a wait", told)


def test_no_wait_outlives_an_abort(gpus: SimulatedMachine):
    """That of the staging thread's caller, as an example: its copy waits for a stream that never ends."""
    hub, aborted = NcclHub(2), threading.Event()

    def work(transport: TorchTransport) -> None:
        if transport.rank == 1:
            hub.lose(1)
            return
        transport.all_gather(torch.zeros(2, device=transport.device))
        engine = CudaEngine(transport.device)
        engine.wait_by(transport.wait_until)
        looks = iter([False] * 3)

        def done() -> bool:
            if next(looks, None) is None:
                transport.abort("a rank is gone")
                aborted.set()
            return False

        with pytest.raises(PeerLost, match="a rank is gone"):
            engine._host_wait(done)

    on_ranks(hub, work)
    assert aborted.is_set()


def test_a_broken_batch_makes_the_rank_unusable(gpus: SimulatedMachine):
    """NCCL's group call stays open on the thread: a later group's operations would be collected and never begin."""

    def fail(name: str) -> None:
        raise RuntimeError("NCCL error: remote process exited\nin some file")

    def work(transport: TorchTransport) -> None:
        transport._group.fails = fail  # type: ignore[attr-defined]
        ours = torch.zeros(4, dtype=torch.uint8, device=transport.device)
        with pytest.raises(RankUnusable, match=r"in the middle of an exchange.*remote process exited$"):
            transport.exchange([(1 - transport.rank, ours)], [], agreed=True)
        with pytest.raises(PeerLost):
            transport.all_gather(ours)
        with pytest.raises(AssertionError, match="a group call is open"):
            SimulatedNcclGroup(NcclHub(2), 0, CUDA)

    on_ranks(NcclHub(2), work)


def test_a_broken_collective_is_a_lost_peer(gpus: SimulatedMachine):
    def fail(name: str) -> None:
        raise RuntimeError("NCCL error: remote process exited")

    def work(transport: TorchTransport) -> None:
        transport._group.fails = fail  # type: ignore[attr-defined]
        with pytest.raises(PeerLost, match="remote process exited"):
            transport.all_gather(torch.zeros(2, device=transport.device))

    on_ranks(NcclHub(2), work)


def test_a_group_needs_the_environment(gpus: SimulatedMachine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_NCCL_ENABLE_MONITORING", "1")
    with pytest.raises(AssertionError, match="TORCH_NCCL_ENABLE_MONITORING"):
        SimulatedNcclGroup(NcclHub(1), 0, CUDA)


def test_torch_reads_the_variables_that_are_set():
    """Each by its name in torch's headers; and none is left out by which the watchdog would act, wait or take traces."""
    headers = (Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d").glob("*.hpp")
    read = {name for path in headers for name in re.findall(r'"(TORCH_(?:NCCL|FR)_[A-Z_]+)"', path.read_text())}
    assert nccl.ENVIRONMENT.keys() <= read
    acting = ("ASYNC_ERROR", "MONITORING", "DUMP_ON_TIMEOUT", "PROPAGATE", "RETHROW", "TIMEOUT_DUMP", "BUFFER_SIZE")
    assert {name for name in read if any(word in name for word in acting)} <= nccl.ENVIRONMENT.keys()


# ---------------------------------------------------------------------- forming


def form(store: dist.Store, init: Callable[[], object], *, size: int = 1, deadline_s: float = 0.2, stop: Any = None) -> None:
    nccl.form_within(init, store, rank=0, size=size, device=CUDA, deadline_s=deadline_s, stop=stop)


def test_a_missing_rank_is_noticed_before_nccl_begins(gpus: SimulatedMachine):
    """Once it connects, NCCL waits for ever for a rank that isn't there."""
    begun: list[int] = []
    with pytest.raises(PeerLost, match=r"ranks \[1, 2\] of 3 didn't come within 0.2 s"):
        form(dist.HashStore(), lambda: begun.append(1), size=3)
    assert not begun


def test_a_hanging_connect_makes_the_rank_unusable(gpus: SimulatedMachine):
    hangs, ended = threading.Event(), Future[str]()
    with pytest.raises(RankUnusable, match="did not connect 1 ranks within"):
        form(dist.HashStore(), hangs.wait)
    ended.set_result("rank 2 is gone")
    with pytest.raises(PeerLost, match="rank 2 is gone"):
        form(dist.HashStore(), hangs.wait, stop=ended)
    hangs.set()


def test_ranks_that_met_connect_soon_or_never(gpus: SimulatedMachine, monkeypatch: pytest.MonkeyPatch):
    """Under torchrun they may take half an hour to begin, but one that ends while they connect mustn't cost as much."""
    hangs = threading.Event()
    monkeypatch.setattr(nccl, "CONNECT_DEADLINE_S", 0.1)
    with pytest.raises(RankUnusable, match=r"did not connect 1 ranks within 0.1 s after they met"):
        form(dist.HashStore(), hangs.wait, deadline_s=rendezvous.FORM_DEADLINE_S)
    hangs.set()


def test_torchruns_ranks_form_within_a_deadline(gpus: SimulatedMachine, monkeypatch: pytest.MonkeyPatch):
    """As a cluster's do: torch's own call would wait in NCCL for ever."""
    hangs, store = threading.Event(), dist.HashStore()
    monkeypatch.setattr(rendezvous, "FORM_DEADLINE_S", 0.2)
    monkeypatch.setattr(rendezvous, "rendezvous", lambda url, timeout: iter([(store, 0, 1)]))
    monkeypatch.setattr(forming.dist, "init_process_group", lambda *_, **__: hangs.wait())
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankUnusable, match="did not connect 1 ranks within"):
        rendezvous.find_transport(None, torch.device("cuda:1"))
    assert torch.cuda.current_device() == 1
    monkeypatch.setattr(rendezvous, "rendezvous", lambda url, timeout: iter([(store, 0, 2)]))
    with pytest.raises(PeerLost, match=r"ranks \[1\] of 2 didn't come within 0.2 s"):
        rendezvous.find_transport(None, CUDA)
    hangs.set()


def test_connecting_happens_on_the_ranks_gpu(gpus: SimulatedMachine):
    """In a thread of its own, whose current GPU is another by default."""
    found: list[int] = []
    nccl.form_within(
        lambda: found.append(torch.cuda.current_device()),
        dist.HashStore(),
        rank=0,
        size=1,
        device=torch.device("cuda:1"),
        deadline_s=PATIENCE_S,
        stop=None,
    )
    assert found == [1]
    with pytest.raises(ValueError, match="as it came"):
        form(dist.HashStore(), lambda: (_ for _ in ()).throw(ValueError("as it came")).__next__(), deadline_s=PATIENCE_S)


def test_a_users_group_gets_a_twin_for_epslots(gpus: SimulatedMachine, monkeypatch: pytest.MonkeyPatch):
    """With any backend, and made after the environment is set; the user's own group is left alone."""
    for name in nccl.ENVIRONMENT:
        monkeypatch.setenv(name, "1")
    made: list[dict[str, Any]] = []

    class Users(dist.ProcessGroup):
        def size(self) -> int:
            return 2

    def new_group(ranks: list[int], **settings: Any) -> Any:
        made.append({"ranks": ranks, **settings, "set": all(os.environ[n] == v for n, v in nccl.ENVIRONMENT.items())})
        return twin

    twin = Users(0, 2)
    monkeypatch.setattr(nccl.dist, "new_group", new_group)
    monkeypatch.setattr(nccl.dist, "get_process_group_ranks", lambda group: [3, 5])
    store, number = dist.HashStore(), next(nccl._own_groups) + 1
    monkeypatch.setattr(nccl, "_default_store", lambda: store)
    monkeypatch.setattr(rendezvous, "FORM_DEADLINE_S", 0.2)
    with pytest.raises(PeerLost, match=r"ranks \[1\] of 2 didn't come"):  # the other one hasn't got there yet
        rendezvous.find_transport(Users(0, 2), CUDA)
    assert not made
    store.set(f"epslots/3-5/{number + 1}/here/1", "here")
    monkeypatch.setattr(rendezvous, "TorchTransport", lambda group, device: (group, device))
    found, device = rendezvous.find_transport(Users(0, 2), CUDA)  # type: ignore[misc]
    assert found is twin and device == CUDA
    assert [one["ranks"] for one in made] == [[3, 5]] and made[0]["set"]
    assert made[0]["backend"] == "nccl" and made[0]["use_local_synchronization"]


def test_the_watchdog_never_comes_before_a_deadline():
    assert nccl.GROUP_TIMEOUT.total_seconds() > 10 * LOAD_DEADLINE_S
