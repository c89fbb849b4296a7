"""Ray for tests: several nodes on this machine, and a backend on them that tests can use without a loop of their own."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import ray._private.utils as ray_utils
from ray._common.utils import get_ray_address_file
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import _enable_token_auth
from ray._private.grpc_utils import init_grpc_channel
from ray._private.node import Node
from ray._raylet import AuthenticationTokenLoader
from ray.cluster_utils import Cluster as RayCluster
from ray.core.generated.common_pb2 import NodeDeathInfo
from ray.core.generated.gcs_service_pb2 import UnregisterNodeRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from cluster.messages.rank import Contact, Contacts, Form, decode_events, encode
from cluster.ray_backend import address, bundles
from cluster.ray_backend.calls import CALL_THREAD
from cluster.ray_backend.handles import RayWorkerHandle
from cluster.ray_backend.lean_node import lean_nodes
from cluster.ray_backend.processes import FOLDER_PREFIX
from tests.support.clock_loop import ClockLoop
from tests.support.rank_helpers import PATIENCE_S, free_port
from tests.support.ray_driver import Driver, driving, pids_below

logger = logging.getLogger(__name__)

# No node that is only slow is taken for dead. Of one that is killed, Ray is told (``RayNodes.kill``).
_CHECKS = {"health_check_timeout_ms": 1000 * int(PATIENCE_S)}

# Each node has an address of its own, where Ray's agents listen on fixed ports: with pytest-xdist's process, and a number.
_PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_NUMBERS = count(2)


class RayNodes:
    """Ray nodes on this machine, each with an address of its own. Token authentication is on.

    Attributes:
        address: of the head, for ``RayBackend``.
    """

    def __init__(self, folder: str, *, dashboard: bool = False) -> None:
        self._folder = folder
        self._dashboard = dashboard
        self._cluster = RayCluster()
        self.head = self.add()
        self.address: str = self._cluster.address

    def add(self, num_cpus: int = 2, labels: Mapping[str, str] | None = None) -> Node:
        first = self._cluster.head_node is None
        serves_jobs = first and self._dashboard
        with nullcontext() if serves_jobs else lean_nodes():
            return self._cluster.add_node(
                num_cpus=num_cpus,
                labels=dict(labels or {}),
                node_ip_address=f"127.{_PROCESS}.0.{next(_NUMBERS)}",
                temp_dir=self._folder,
                object_store_memory=80 * 2**20,
                include_dashboard=serves_jobs,
                include_log_monitor=False,  # its lines for drivers are never read, and there are no other nodes
                no_monitor=True,
                dashboard_port=0,  # a free one
                dashboard_agent_listen_port=free_port(),  # Ray's own is the same for all nodes and addresses
                **({"_system_config": _CHECKS} if first else {}),
            )

    def replace_lost(self) -> None:
        """Add a node for each but the head whose raylet has ended by itself, as Ray's may on a busy machine; tells why."""
        for node in list(self._cluster.worker_nodes):
            if any(info.process.poll() is not None for info in node.all_processes.get(ray_constants.PROCESS_TYPE_RAYLET, [])):
                for log in Path(node.get_logs_dir_path()).glob("raylet*"):
                    logger.warning("a Ray node has ended; %s: %s", log, log.read_text(errors="replace")[-3000:])
                self.kill(node)
                self.add()

    def kill(self, node: Node) -> None:
        """SIGKILL to all that Ray runs there, and have Ray know, as it would after some missed health checks."""
        self._cluster.remove_node(node, allow_graceful=False)
        request = UnregisterNodeRequest(node_id=bytes.fromhex(node._node_id))
        request.node_death_info.reason = NodeDeathInfo.UNEXPECTED_TERMINATION
        with init_grpc_channel(self.address) as channel:
            NodeInfoGcsServiceStub(channel).UnregisterNode(request)

    @contextmanager
    def further(self, num_cpus: int = 2, labels: Mapping[str, str] | None = None) -> Iterator[Node]:
        """One more node, for a while."""
        node = self.add(num_cpus, labels)
        try:
            yield node
        finally:
            if node in self._cluster.worker_nodes:
                self.kill(node)
            self._cluster.wait_for_nodes()

    def close(self) -> None:
        """Asserts that no process of the nodes is left."""
        services = [each for node in self._cluster.list_all_nodes() for each in node.all_processes.values()]
        started = [info.process for infos in services for info in infos]
        alive = [psutil.Process(each.pid) for each in started if each.poll() is None]
        alive += [child for each in alive for child in each.children(recursive=True)]
        self._cluster.shutdown()
        _, alive = psutil.wait_procs(alive, timeout=PATIENCE_S)
        assert not alive


@pytest.fixture(scope="session")
def ray_nodes(ray_tokens: None) -> Iterator[RayNodes]:
    """One node; tests add more."""
    with start_nodes() as nodes:
        yield nodes


@contextmanager
def start_nodes(*, dashboard: bool = False) -> Iterator[RayNodes]:
    """One node, with or without a dashboard, which jobs are submitted to. Nothing of it is left afterwards."""
    folder = tempfile.mkdtemp(prefix="ray-")  # short: the paths of sockets are limited
    with pytest.MonkeyPatch.context() as patch:
        # Here alone, where Ray's job agent looks first: elsewhere it would be what "auto" finds for all processes of the user,
        # and without it the agent would give a job the address of any Ray on this machine.
        note = Path(get_ray_address_file(folder))
        patch.setattr(ray_utils, "write_ray_address", lambda address, *_: note.write_text(address))
        try:
            nodes = RayNodes(folder, dashboard=dashboard)
            try:
                yield nodes
            finally:
                nodes.close()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_tokens() -> Iterator[None]:
    """A token for all Rays of the tests, the user's own is left alone; no messages, no haste, and no worker is slowed down."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles, "_FREE_S", PATIENCE_S)
        patch.setattr(address, "_PROBE_S", PATIENCE_S)
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_worker_niceness", "0")  # Ray's own 15 leaves workers nothing of a machine that other tests use, too
        _enable_token_auth()
        AuthenticationTokenLoader.instance().reset_cache()
        yield


class PatientDriver(Driver):
    """A driver whose time can be skipped, and whose workers can meet."""

    def new_loop(self) -> ClockLoop:
        return ClockLoop()

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Deadlines pass at once: only for what would wait for one in vain. Ray has all the time that it needs to answer."""
        over = threading.Event()
        loop = self.thread._loop
        assert isinstance(loop, ClockLoop)
        loop.skip_until(over.is_set, settled=lambda: not any(thread.name == CALL_THREAD for thread in threading.enumerate()))
        try:
            yield
        finally:
            over.set()

    def meet(self, workers: Sequence[RayWorkerHandle], epoch: int) -> list[bytes]:
        """Have them form a group; what each received of all."""
        for rank, worker in enumerate(workers):
            form = Form(
                epoch=epoch,
                rank=rank,
                size=len(workers),
                secret=b"of the test",
                form_s=PATIENCE_S,
                deadline_s=PATIENCE_S,
                fresh=True,
                costs=None,
            )
            self.command(worker, encode(form))
        contacts: dict[str, bytes] = {}
        for worker in workers:
            (contact,) = decode_events(self.events(worker))
            assert isinstance(contact, Contact)
            contacts[contact.key] = contact.value
        for worker in workers:
            self.command(worker, encode(Contacts(epoch, contacts)))
        return [self.events(worker) for worker in workers]


@contextmanager
def drive(ranks: int | None = None, **settings: Any) -> Iterator[PatientDriver]:
    """A backend; opened, if ``ranks`` says with how many."""
    with driving(PatientDriver, ranks, **settings) as driver:
        yield driver


def node_hosts() -> dict[str, str]:
    """The address of each node that is alive, by its id."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def process_of_own_ray(part: str) -> psutil.Process:
    """The process of a Ray of this process alone with this in its name; the nodes of other tests may be there, too."""
    mine = (process for process in pids_below() if part in process.name())
    (found,) = [process for process in mine if FOLDER_PREFIX in " ".join(process.cmdline())]
    return found
