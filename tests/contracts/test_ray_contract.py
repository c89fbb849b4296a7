"""The internals of Ray that are used, and why; a new version of Ray has to have all of them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import ray
import ray._private.state as ray_state
import ray._private.worker as ray_worker
from ray._common.usage import usage_lib
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.grpc_utils import init_grpc_channel
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.services import canonicalize_bootstrap_address, start_raylet
from ray._private.state import available_resources_per_node
from ray.actor import ActorHandle
from ray.core.generated.common_pb2 import JobConfig
from ray.core.generated.gcs_service_pb2 import CheckAliveReply
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import ActorDiedError
from ray.experimental import internal_kv

from cluster.ray_backend import idle_agent
from cluster.ray_backend.handles import reason_of
from cluster.ray_backend.nodes import NODE_LABEL


def test_version():
    assert ray.__version__.startswith("2.60.")


def test_messages_of_ray_can_be_switched_off():
    """``log_to_driver`` leaves those of the raylets, each of many lines."""
    assert ray_worker._worker_logs_enabled is True
    assert "_worker_logs_enabled" in inspect.getsource(ray_worker.print_worker_logs)


def test_a_running_ray_can_be_asked_before_it_is_joined():
    """``ray.init`` takes two minutes to find that no Ray is there, and 20 s for a wrong token."""
    assert next(iter(inspect.signature(canonicalize_bootstrap_address).parameters)) == "addr"
    assert next(iter(inspect.signature(init_grpc_channel).parameters)) == "address"
    assert "warn_if_disabled" in inspect.signature(maybe_enable_token_auth_if_token_available).parameters
    assert "CheckAlive" in inspect.getsource(NodeInfoGcsServiceStub)
    assert "ray_version" in CheckAliveReply.DESCRIPTOR.fields_by_name


def test_a_forked_child_can_end_without_ray():
    """Its exit handler would wait for threads that only the parent has; its destructors would crash, or end actors."""
    assert "worker.connected" in inspect.getsource(ActorHandle.__del__)
    assert "core_worker" in inspect.getsource(ray.ObjectRefGenerator.__del__)
    assert "if global_worker.mode == SCRIPT_MODE" in inspect.getsource(ray_worker.custom_excepthook)
    assert inspect.signature(ray_worker.global_worker.set_is_connected).parameters
    assert inspect.signature(ray_worker.shutdown).parameters["_exiting_interpreter"]
    assert "atexit.register(shutdown, _exiting_interpreter=True)" in inspect.getsource(ray_worker)
    assert ray_worker.global_worker is not None
    assert hasattr(ray_worker, "_global_node")
    assert hasattr(ray_state.state, "_global_state_accessor")


def test_folders_of_the_driver_are_known_where_they_come_first():
    assert "job_config._py_driver_sys_path.extend(code_paths)" in inspect.getsource(ray_worker)
    assert "py_driver_sys_path" in JobConfig.DESCRIPTOR.fields_by_name


def test_what_is_free_is_known_by_node():
    """The public function gives one sum."""
    assert not inspect.signature(available_resources_per_node).parameters


def test_nodes_have_a_label_for_themselves():
    assert ray._raylet.RAY_NODE_ID_KEY == NODE_LABEL


def test_a_claim_is_put_only_if_there_is_none():
    """Drivers of one name are told apart by it; no public store of Ray's is asked before it writes."""
    parameters = list(inspect.signature(internal_kv._internal_kv_put).parameters)
    assert parameters[:3] == ["key", "value", "overwrite"]
    for function in (internal_kv._internal_kv_get, internal_kv._internal_kv_del, internal_kv._internal_kv_list):
        assert "namespace" in inspect.signature(function).parameters


def test_a_ray_can_be_started_by_another_process_than_its_driver():
    """``ray.init`` would end it with the driver, and ``ray start`` leaves out none of Ray's helpers."""
    assert {"temp_dir"} <= inspect.signature(RayParams).parameters.keys()
    assert {"head", "shutdown_at_exit", "spawn_reaper"} <= inspect.signature(Node).parameters.keys()
    assert callable(usage_lib.set_usage_stats_enabled_via_env_var)
    assert hasattr(ray_state.state, "_connect_and_get_accessor")


def test_helpers_of_a_node_can_be_left_out():
    """``ray.init`` has no settings for them; it waits for the dashboard's process, and imports half of Ray there."""
    assert "self.start_monitor()" in inspect.getsource(Node.start_head_processes)
    assert "self.start_api_server(" in inspect.getsource(Node.start_head_processes)
    assert "self.start_log_monitor()" in inspect.getsource(Node.start_ray_processes)
    # A node that starts looks for itself until it is known, for 30 seconds.
    assert "node_info = ray._private.services.get_node(" in inspect.getsource(Node.__init__)
    assert "except RuntimeError" in inspect.getsource(Node.__init__)


def test_an_agent_can_be_stood_in_for(tmp_path: Path):
    """A raylet takes ports of -1 for services that aren't there; a lean node tells them without the agents (idle_agent.py)."""
    source = inspect.getsource(start_raylet)
    for agent in ("DASHBOARD_AGENT", "RUNTIME_ENV_AGENT"):
        assert re.search(rf"command_memory_profileable\(\s*ray_constants.PROCESS_TYPE_{agent}, session_dir", source)
    for option in ("session-dir", "node-id", "node-ip-address", "runtime-env-agent-port"):
        assert f'f"--{option}=' in source.partition("runtime_env_agent_command = [")[2]
    names = ray._raylet
    assert idle_agent.UNUSED_PORTS == (
        names.METRICS_AGENT_PORT_NAME,
        names.METRICS_EXPORT_PORT_NAME,
        names.DASHBOARD_AGENT_LISTEN_PORT_NAME,
    )
    assert names.RUNTIME_ENV_AGENT_PORT_NAME == idle_agent.USED_PORT
    assert ray_constants.PROCESS_TYPE_DASHBOARD_AGENT == "dashboard_agent"
    node = 28 * "1a"
    names.persist_port(str(tmp_path), node, "a_port", -1)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(f"a_port_{node}", "-1")]


def died(text: str, **state: bool) -> ActorDiedError:
    error = ActorDiedError()
    error.error_msg = text
    error._actor_init_failed = state.get("init_failed", False)
    return error


def test_reasons_are_cut_to_what_matters():
    head = "The actor died unexpectedly before finishing this task.\n\tpid: 7\nThe actor is dead because "
    ended = f"{head}its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
    assert reason_of(died(f"{head}its node has died. Node Id: 12.\n")) == "its node is gone"
    assert "for lack of memory" in reason_of(died(f"{ended}Worker unexpectedly exits with a connection error code 2. End of"))
    assert reason_of(died(f"{ended}Killed by the memory monitor. More\nlines")) == "Killed by the memory monitor"
    assert reason_of(died(f"{head}it was killed by `ray.kill`.")) == "it was killed by `ray.kill`."
    failed = 'The actor died ..., \x1b[36mray::Worker()\x1b[39m (pid=7)\n  File "x", line 1\n    raise\nValueError: two\nlines'
    assert reason_of(died(failed, init_failed=True)) == "ValueError: two\nlines"
