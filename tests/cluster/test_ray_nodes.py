"""Several nodes: where bundles go, what is refused and what is advised, and nodes that are lost and join."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import ray

from cluster.driver.backend import WorkerDied
from cluster.errors import ClusterError
from cluster.ray_backend.connect import RANK_RESOURCE
from cluster.ray_backend.nodes import Node, NoRoom, choose_nodes, count_bundles, need_of_bundle
from tests.support.rank_helpers import PATIENCE_S, until
from tests.support.ray_helpers import PatientDriver, RayNodes, drive, node_hosts

CPU = {"CPU": 1.0}
GPU = {"GPU": 1.0, "CPU": 1.0}
RACK = {"epslots/rack": "r1"}


def node(name: str, total: dict[str, float], **free: float) -> Node:
    return Node(name, f"10.0.0.{name}", f"box{name}", total, total | free)


TWO = [node("1", {"CPU": 4}), node("2", {"CPU": 4}, CPU=1)]


def test_a_place_takes_a_gpu_if_there_are_any():
    gpus = [node("1", {"CPU": 4}), node("2", {"CPU": 4, "GPU": 2})]
    assert need_of_bundle(gpus, None) == need_of_bundle(gpus, "cuda") == GPU
    assert need_of_bundle(gpus, "cpu") == need_of_bundle(TWO, None) == CPU
    own = [node("1", {"CPU": 3, RANK_RESOURCE: 1000, "GPU": 2})]
    assert need_of_bundle(own, None) == {"GPU": 1, RANK_RESOURCE: 1}
    assert need_of_bundle(own, "cpu") == {RANK_RESOURCE: 1}
    with pytest.raises(ClusterError, match=r'Ray knows of no GPU on node 10.0.0.1 \(box1\), .*device="cpu"'):
        need_of_bundle(TWO, "cuda")


def test_places_are_what_the_scarcest_resource_allows():
    assert count_bundles({"CPU": 8, "GPU": 3}, GPU) == 3
    assert count_bundles({"CPU": 2.5, "GPU": 3}, GPU) == 2
    assert count_bundles({"CPU": 8}, GPU) == 0


@pytest.mark.parametrize(
    ("ranks", "strategy", "taken", "selector"),
    [
        (5, "PACK", [], None),
        (5, "SPREAD", [], None),
        (4, "STRICT_PACK", [], None),
        (2, "STRICT_SPREAD", [], None),
        (1, "STRICT_PACK", ["1", "1"], "in(1)"),
        (1, "STRICT_SPREAD", ["1"], "!in(1)"),
        (1, "SPREAD", ["1"], "!in(1)"),  # the other node first
        (2, "SPREAD", ["1"], None),  # for which it has no room
        (2, "PACK", ["1"], None),
    ],
)
def test_where_places_may_go(ranks: int, strategy: str, taken: list[str], selector: str | None):
    assert choose_nodes(TWO, CPU, ranks, strategy, taken) == selector


@pytest.mark.parametrize(
    ("ranks", "strategy", "taken", "later"),
    [
        (6, "PACK", [], True),
        (9, "PACK", [], False),
        (6, "SPREAD", ["1", "1", "1"], False),
        (5, "STRICT_PACK", [], False),
        (2, "STRICT_PACK", ["2", "2"], True),
        (3, "STRICT_SPREAD", [], False),
        (2, "STRICT_SPREAD", ["1"], False),
    ],
)
def test_what_does_not_fit_is_refused(ranks: int, strategy: str, taken: list[str], later: bool):
    with pytest.raises(NoRoom) as caught:
        choose_nodes(TWO, CPU, ranks, strategy, taken)
    assert caught.value.later == later


def test_a_refusal_has_the_numbers_and_advice():
    with pytest.raises(NoRoom) as caught:
        choose_nodes([node("1", {"CPU": 8, "GPU": 2}, GPU=1)], GPU, 2, "STRICT_PACK", [])
    assert str(caught.value) == (
        "no room for 2 ranks, on one node: each takes 1 GPU and 1 CPU, and the cluster has\n"
        "  node 10.0.0.1 (box1): 1 of 2 GPUs free and 8 of 8 CPUs free\n"
        "What helps: ask for fewer ranks, or start more nodes (`ray start --address=...`), or end what holds the rest "
        '(`ray status -v` shows it), or take strategy="PACK".'
    )
    with pytest.raises(NoRoom) as caught:
        choose_nodes(TWO, CPU, 8, "PACK", ["1"])
    assert "no room for 8 more ranks: each takes 1 CPU" in str(caught.value)
    assert "node 10.0.0.1 (box1): 4 of 4 CPUs free, 1 taken by ranks of this cluster" in str(caught.value)
    assert "--num-cpus" in str(caught.value)


def hosts_of(driver: PatientDriver, ranks: int) -> list[str]:
    hosts = node_hosts()
    return [hosts[driver.call(driver.backend._bundles.placed(bundle))] for bundle in range(ranks)]


def test_ranks_on_two_nodes_meet(ray_nodes: RayNodes):
    with ray_nodes.further(), drive(ranks=2, address=ray_nodes.address, strategy="STRICT_SPREAD") as driver:
        workers = [driver.start_worker(bundle) for bundle in range(2)]
        assert [driver.call(driver.backend.neighbours(bundle)) for bundle in range(2)] == [1, 1]
        assert [worker.where.partition(",")[0] for worker in workers] == [f"node {host}" for host in hosts_of(driver, 2)]
        assert len(set(hosts_of(driver, 2))) == 2
        assert driver.meet(workers, 0) == [bytes([0, 1])] * 2
        with pytest.raises(ClusterError, match="no room for 1 more rank, each on a node of its own"):
            driver.call(driver.backend.resize(3))
        # A node that joins is used.
        with ray_nodes.further() as third:
            driver.call(driver.backend.resize(3))
            assert hosts_of(driver, 3)[2] == third.node_ip_address
            assert driver.command(driver.start_worker(2), b"here") == b"here"


def test_a_lost_nodes_rank_moves_to_a_node_that_joins(ray_nodes: RayNodes):
    with (
        ray_nodes.further(num_cpus=1) as lost,
        drive(ranks=2, address=ray_nodes.address, strategy="STRICT_SPREAD", place_s=PATIENCE_S) as driver,
    ):
        bundle = hosts_of(driver, 2).index(lost.node_ip_address)
        workers = [driver.start_worker(0), driver.start_worker(1)]
        hear = driver.begin_events(workers[bundle])
        ray_nodes.kill(lost)
        with pytest.raises(WorkerDied, match="its node is gone"):
            hear()
        assert driver.command(workers[1 - bundle], b"here") == b"here"
        gone = f"the node of rank {bundle} is gone, and Ray found no place on another"
        with driver.skipping(), pytest.raises(ClusterError, match=gone):
            driver.start_worker(bundle)
        with ray_nodes.further() as joined:
            assert f"node {joined.node_ip_address}," in driver.start_worker(bundle).where


def test_pack_and_spread(ray_nodes: RayNodes):
    with ray_nodes.further(3, labels=RACK) as first_in_rack, drive(ranks=0, address=ray_nodes.address):
        for strategy, counts in (("PACK", [2]), ("STRICT_PACK", [2]), ("SPREAD", [1, 1])):
            until(lambda: ray.available_resources().get("CPU") == 5)  # what was there before is gone
            with drive(ranks=2, address=ray_nodes.address, strategy=strategy) as driver:
                assert list(Counter(hosts_of(driver, 2)).values()) == counts
        until(lambda: ray.available_resources().get("CPU") == 5)
        with drive(ranks=1, address=ray_nodes.address, strategy="SPREAD") as driver:
            driver.call(driver.backend.resize(2))
            assert len(set(hosts_of(driver, 2))) == 2
        until(lambda: ray.available_resources().get("CPU") == 5)
        with drive(ranks=4, address=ray_nodes.address, groups=2) as driver:  # three together would divide the second group
            first, second, third, fourth = hosts_of(driver, 4)
            assert first == second != third == fourth
        with ray_nodes.further(1, labels=RACK) as next_in_rack:  # together with the first one it has room for four
            until(lambda: ray.available_resources().get("CPU") == 6)
            with drive(ranks=4, address=ray_nodes.address) as driver:
                found = Counter(hosts_of(driver, 4))
                assert found == {node_hosts()[first_in_rack._node_id]: 3, node_hosts()[next_in_rack._node_id]: 1}


def test_too_many_ranks_are_refused_with_who_holds_the_rest(ray_nodes: RayNodes):
    with (
        drive(address=ray_nodes.address) as driver,
        pytest.raises(ClusterError, match=r"no room for 3 ranks: .*\n  node 127.\d+.0.\d+ .*: 2 of 2 CPUs free\n.*--num-cpus"),
    ):
        driver.open(3)
    with (
        drive(ranks=2, address=ray_nodes.address),
        drive(address=ray_nodes.address) as second,
        second.skipping(),
        pytest.raises(ClusterError, match=rf"0 of 2 CPUs free(.|\n)*process {os.getpid()} on .*: 2 ranks"),
    ):
        second.open(1)


def test_an_environment_can_be_had_of_a_node_without_agents(ray_nodes: RayNodes):
    """The stand-in becomes the agent, and the first question is answered."""
    with drive(ranks=0, address=ray_nodes.address):
        look = ray.remote(lambda: os.environ["OF_THE_TEST"]).options(runtime_env={"env_vars": {"OF_THE_TEST": "one"}})
        assert ray.get(look.remote(), timeout=PATIENCE_S) == "one"


def test_a_model_that_a_node_lacks_is_said_by_node(ray_nodes: RayNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The nodes' processes have different working folders, and so this path leads to different places."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "other").mkdir()
    path = "/proc/self/cwd/model"
    monkeypatch.chdir(tmp_path / "other")
    with ray_nodes.further() as lacking:
        monkeypatch.chdir(tmp_path)
        with ray_nodes.further() as having, drive(address=ray_nodes.address, strategy="STRICT_SPREAD", path=path) as driver:
            with pytest.raises(ClusterError) as caught:
                driver.open(3)
            assert f"node {lacking.node_ip_address}" in str(caught.value)
            assert f"node {having.node_ip_address}" not in str(caught.value)
            assert "has no such folder" in str(caught.value)
            assert not [group for group in ray.util.placement_group_table().values() if group["state"] == "CREATED"]
