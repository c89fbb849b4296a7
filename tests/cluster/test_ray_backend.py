"""The backend on a Ray of its own: workers come up, talk, meet, die and are replaced; and nothing of it stays."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import msgspec
import psutil
import pytest

from cluster.driver.backend import WorkerDied
from cluster.errors import ClusterError
from cluster.messages.controller import Explain, address, decode_reply, encode
from cluster.ray_backend import backend as ray_backend
from cluster.ray_backend.backend import RayBackend
from cluster.ray_backend.bundles import Bundles
from cluster.ray_backend.handles import RayControllerHandle, RayWorkerHandle
from epslots.host_limits import usable_cores
from tests.support.echo_loop import FACTS, FAIL, TELL
from tests.support.rank_helpers import PATIENCE_S
from tests.support.ray_driver import pids_below
from tests.support.ray_helpers import PatientDriver, drive, process_of_own_ray


@pytest.fixture(scope="module")
def local(ray_tokens: None) -> Iterator[PatientDriver]:
    """Two bundles on a Ray of this process alone."""
    before = pids_below()
    with drive(ranks=2) as driver:
        yield driver
    assert pids_below() <= before


@pytest.fixture(scope="module")
def workers(local: PatientDriver) -> list[RayWorkerHandle]:
    """One on each bundle. A test that ends one puts another in its place."""
    return [local.start_worker(bundle) for bundle in range(2)]


def test_it_answers_and_tells(local: PatientDriver, workers: list[RayWorkerHandle]):
    assert local.command(workers[0], b"hello") == b"hello"
    hear = local.begin_events(workers[0])
    local.command(workers[0], TELL + b"news")
    assert hear() == b"news"
    big = bytes(300_000)  # more than Ray sends within an answer
    local.command(workers[0], TELL + big)
    assert local.events(workers[0]) == big


def test_where_a_worker_is(workers: list[RayWorkerHandle]):
    for worker in workers:
        assert worker.process is not None
        assert worker.where == f"node {worker.process.host}, pid {worker.process.pid}"
        assert psutil.Process(worker.process.pid).is_running()


def test_places_share_the_node_and_its_cores(local: PatientDriver, workers: list[RayWorkerHandle]):
    assert [local.call(local.backend.neighbours(bundle)) for bundle in range(2)] == [2, 2]
    for worker in workers:
        facts = msgspec.msgpack.decode(local.command(worker, FACTS))
        assert facts["threads"] == max(1, usable_cores() // 2)
        assert facts["interface"] == "lo"


def test_an_error_of_the_loop_is_the_workers_end(local: PatientDriver, workers: list[RayWorkerHandle]):
    with pytest.raises(WorkerDied, match="ValueError: told to fail"):
        local.command(workers[0], FAIL)
    assert local.command(workers[0], b"here") == b"here"


def test_ranks_meet_and_listen_on_the_loopback_alone(local: PatientDriver, workers: list[RayWorkerHandle]):
    before = [listening(worker) for worker in workers]
    for generation in range(2):
        assert local.meet(workers, generation) == [bytes([0, 1])] * 2
    for worker, known in zip(workers, before, strict=True):
        assert {address.ip for address in listening(worker) - known} == {"127.0.0.1"}


def listening(worker: RayWorkerHandle) -> set[Any]:
    assert worker.process is not None
    connections = psutil.Process(worker.process.pid).net_connections("tcp")
    return {connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("waiting", ["events", "command"])
def test_a_killed_worker_is_noticed_and_replaced(local: PatientDriver, workers: list[RayWorkerHandle], waiting: str):
    worker = workers[1]
    assert worker.process is not None
    hear = local.begin_events(worker)
    os.kill(worker.process.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="its process has ended"):
        hear() if waiting == "events" else local.command(worker, b"")
    workers[1] = local.start_worker(1)
    assert local.command(workers[1], b"new") == b"new"


def test_a_stopped_worker_is_killed_all_the_same(local: PatientDriver, workers: list[RayWorkerHandle]):
    worker = workers[1]
    assert worker.process is not None
    process = psutil.Process(worker.process.pid)
    hear = local.begin_events(worker)
    process.suspend()
    worker.kill()
    worker.kill()
    with pytest.raises(WorkerDied):
        hear()
    process.wait(PATIENCE_S)
    workers[1] = local.start_worker(1)


def test_places_come_and_go(local: PatientDriver):
    local.call(local.backend.resize(4))
    third = local.start_worker(3)
    assert local.call(local.backend.neighbours(0)) == 4
    local.call(local.backend.resize(3))
    assert local.call(local.backend.neighbours(0)) == 3
    local.call(local.backend.resize(2))
    with pytest.raises(WorkerDied, match="its placement group was removed"):
        local.events(third)


def test_a_worker_that_can_not_be_made_says_why(ray_tokens: None, local: PatientDriver):
    with (
        drive(ranks=1, loop="tests.support.echo_loop:BrokenLoop") as broken,
        pytest.raises(WorkerDied, match=r"^ValueError: this node has no such thing$"),
    ):
        broken.start_worker(0)


def test_a_controller_takes_no_place_and_another_can_be_had(local: PatientDriver, workers: list[RayWorkerHandle]):
    controller = local.call(local.backend.start_controller())
    process = psutil.Process(int(controller.where.rpartition("pid ")[2]))
    assert "ControllerActor" in process.name()
    assert decode_reply(local.call(controller.call(address(0, encode(Explain()))))).state == "waiting"
    with pytest.raises(WorkerDied, match="ValidationError: Expected `object`"):
        local.call(controller.call(b"no order"))
    process.suspend()
    controller.kill()
    controller.kill()
    with pytest.raises(WorkerDied):
        local.call(controller.call(address(0, encode(Explain()))))
    process.wait(PATIENCE_S)
    another = local.call(local.backend.start_controller())
    assert decode_reply(local.call(another.call(address(0, encode(Explain()))))).state == "waiting"
    process = psutil.Process(int(another.where.rpartition("pid ")[2]))
    process.kill()
    process.wait(PATIENCE_S)
    with pytest.raises(WorkerDied, match="its process has ended"):
        local.call(another.call(address(0, encode(Explain()))))
    assert local.command(workers[0], b"still here") == b"still here"


def test_a_controller_that_is_no_longer_wanted_leaves_no_process(local: PatientDriver, monkeypatch: pytest.MonkeyPatch):
    greeted, greet = asyncio.Queue[RayControllerHandle](), RayControllerHandle.wait_until_up

    async def told(controller: RayControllerHandle, deadline_s: float) -> None:
        greeted.put_nowait(controller)
        await greet(controller, deadline_s)

    async def cancel() -> RayControllerHandle:
        starting = asyncio.ensure_future(local.backend.start_controller())
        controller = await greeted.get()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        return controller

    monkeypatch.setattr(RayControllerHandle, "wait_until_up", told)
    controller = local.call(cancel())
    with pytest.raises(WorkerDied):
        local.call(controller.call(address(0, encode(Explain()))))


def test_fleets_of_one_process_share_its_ray(local: PatientDriver, workers: list[RayWorkerHandle]):
    with drive(ranks=3) as other:
        assert other.command(other.start_worker(2), b"here") == b"here"
    assert local.command(workers[0], b"still here") == b"still here"


def test_a_start_that_is_cancelled_leaves_no_process_and_no_task(
    local: PatientDriver, workers: list[RayWorkerHandle], monkeypatch: pytest.MonkeyPatch
):
    greeted, greet = asyncio.Queue[RayWorkerHandle](), RayWorkerHandle.wait_until_up

    async def told(worker: RayWorkerHandle, deadline_s: float) -> None:
        greeted.put_nowait(worker)
        await greet(worker, deadline_s)

    async def cancel() -> RayWorkerHandle:
        before = asyncio.all_tasks()
        starting = asyncio.ensure_future(local.backend.start_worker(1))
        worker = await greeted.get()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert asyncio.all_tasks() == before
        return worker

    workers[1].kill()
    with monkeypatch.context() as patch:
        patch.setattr(RayWorkerHandle, "wait_until_up", told)
        worker = local.call(cancel())
    with pytest.raises(WorkerDied):
        local.command(worker, b"")
    workers[1] = local.start_worker(1)


def test_a_head_that_ends_is_started_again(local: PatientDriver, workers: list[RayWorkerHandle]):
    """And all else of its Ray ends. The last test of that one."""
    head, node = process_of_own_ray("gcs_server"), process_of_own_ray("raylet")
    others = [node, *node.children(recursive=True)]
    head.kill()
    assert f"its gcs_server (pid {head.pid}) has ended" in local.call(local.backend.lost())
    local.call(local.backend.reopen(2))
    workers[:] = [local.start_worker(0)]
    assert local.command(workers[0], b"here") == b"here"
    _, alive = psutil.wait_procs(others, timeout=PATIENCE_S)
    assert not alive


def test_a_start_that_fails_twice_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """There is no place for the worker any more, and its greeting fails just when it is cancelled for that."""
    killed: list[RayWorkerHandle] = []

    async def wait_until_up(worker: RayWorkerHandle, _deadline_s: float) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise WorkerDied("its node is gone") from None

    looks = iter([False, True])

    async def placed(_bundles: Bundles, _bundle: int) -> str:
        if next(looks):
            await asyncio.sleep(0)  # it is looked up beside others, and fails after them
            raise ClusterError("no place")
        return "node"

    async def start_worker() -> None:
        backend = RayBackend(address=None, strategy="PACK", device="cuda", path="no/folder")
        backend._need = {"GPU": 1}
        with pytest.raises(ClusterError, match="no place"):
            await backend.start_worker(0)

    monkeypatch.setattr(ray_backend, "_worker_class", MagicMock())
    monkeypatch.setattr(ray_backend, "_LOOK_EVERY_S", 0)
    monkeypatch.setattr(RayWorkerHandle, "wait_until_up", wait_until_up)
    monkeypatch.setattr(RayWorkerHandle, "kill", lambda worker, **_: killed.append(worker))
    monkeypatch.setattr(Bundles, "placed", placed)
    monkeypatch.setattr(Bundles, "strategy", lambda *_, **__: None)
    asyncio.run(start_worker())
    gc.collect()
    assert len(killed) == 1
    assert not caplog.records


def test_each_group_of_a_packed_cluster_is_placed_by_itself():
    """Also where one group was started alone, and others came; Ray spreads single ranks without groups."""
    dealt = [0, 0, 1, 1]
    for size, given, found in ((2, (), dealt), (2, dealt, dealt), (None, (), [0] * 4), (None, dealt, dealt)):
        assert Bundles({}, "PACK", None, 1.0, size)._groups_of(4, given) == found
    assert Bundles({}, "SPREAD", None, 1.0, 2)._groups_of(4, dealt) == [0] * 4


def test_ranks_of_a_node_are_counted_in_all_groups():
    """They share its RAM, and one host store."""

    async def nodes() -> list[str]:
        return ["a", "a", "b", "a"]

    backend = RayBackend(address=None, strategy="PACK", device="cpu", path="", groups=2)
    backend._bundles.nodes = nodes  # type: ignore[method-assign]
    assert [asyncio.run(backend.neighbours(bundle)) for bundle in range(4)] == [3, 3, 1, 3]
