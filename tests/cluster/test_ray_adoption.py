"""On a real Ray, a driver adopts the last one's ranks, but for those that were to be ended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from cluster.lasting import ray_registry
from cluster.messages.rank import Load, Origin, encode
from cluster.ray_backend.adoption import Outliving
from cluster.ray_backend.calls import ask
from cluster.ray_backend.handles import RayWorkerHandle
from epslots.config import load_config
from tests.support.rank_helpers import PATIENCE_S
from tests.support.ray_helpers import PatientDriver, RayNodes

NAME = f"adoption-{os.getpid()}"
LOAD = Load(
    path="no/folder", config=load_config(slots=4), neighbours=1, ranks=2, threads=0, window_steps=0, origin=Origin("c", "1", 1)
)


@contextmanager
def drive(nodes: RayNodes, ranks: int, *, replace: bool = False, leave: bool = True) -> Iterator[PatientDriver]:
    """A driver, which leaves its ranks to the next one or ends them."""
    driver = PatientDriver(address=nodes.address, outliving=Outliving(NAME, 600.0, replace, LOAD))
    try:
        driver.open(ranks)
        yield driver
    finally:
        driver.call(driver.backend.close(leave_ranks=leave))
        driver.thread.end()


def process(worker: RayWorkerHandle) -> psutil.Process:
    assert worker.process is not None
    return psutil.Process(worker.process.pid)


def loaded(driver: PatientDriver, bundle: int) -> RayWorkerHandle:
    worker = driver.start_worker(bundle)
    driver.command(worker, encode(LOAD))
    return worker


def test_ranks_are_adopted_unless_they_were_to_be_ended(ray_nodes: RayNodes):
    with drive(ray_nodes, 2) as first:
        stays, doomed = (loaded(first, bundle) for bundle in range(2))
        ending, lasting = process(doomed), process(stays)
        first.call(ask(ray_registry.doom, NAME, doomed.name))  # and it is paused before it ends the rank
    with drive(ray_nodes, 2) as second:
        assert second.backend.survivors == {0}
        adopted = second.start_worker(0)
        assert adopted.adopted and process(adopted) == lasting
        ending.wait(PATIENCE_S)
        new = loaded(second, 1)
        assert second.command(new, b"here") == second.command(adopted, b"here") == b"here"
        ending = process(new)
        second.call(kill(new))  # it is this driver's
        ending.wait(PATIENCE_S)
    with drive(ray_nodes, 1, replace=True, leave=False) as third:
        assert third.backend.survivors == frozenset()
        lasting.wait(PATIENCE_S)
        anew = third.start_worker(0)
        assert third.command(anew, b"anew") == b"anew"
        last = process(anew)
    last.wait(PATIENCE_S)


async def kill(worker: RayWorkerHandle) -> None:
    worker.kill()
