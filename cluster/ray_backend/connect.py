"""Starts a Ray of only this process, or joins a running one: quietly, and without a trace at the end.

Both are context managers, which yield a function that says which part of Ray has ended. ``session.py`` enters them.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

import psutil
import ray
import ray._private.worker as ray_worker
from ray._raylet import Config  # type: ignore[attr-defined]  # compiled

from cluster.errors import ClusterError
from cluster.ray_backend.address import START_HINT, HeadWatch, find_running
from cluster.ray_backend.lean_node import lean_nodes
from cluster.ray_backend.processes import end, own_folder, protect_token, started_since, users_of, watch_joined, watch_own

FindEnded = Callable[[], str]
"""Returns the part of a Ray that has ended, for people; empty if none has."""

RANK_RESOURCE = "epslots_rank"
"""A resource of a Ray of our own, one for each rank: the number of ranks is limited by GPUs, or not at all."""

_PLENTY_OF_RANKS = 100_000
_STORE_BYTES = 80 * 2**20  # little more than Ray's minimum: messages are small
# Ray ends a process that hasn't reached the cluster's head for a minute, and raises nothing. We log it, and go on.
_PATIENCE_NAME, _PATIENCE_S = "gcs_rpc_server_reconnect_timeout_s", 10 * 365 * 86400
_SETTINGS = {
    "enable_metrics_collection": False,
    # End processes that were started beforehand and aren't needed; Ray would keep as many as there are CPUs.
    "num_workers_soft_limit": 0,
    "idle_worker_killing_time_threshold_ms": 10_000,
    _PATIENCE_NAME: _PATIENCE_S,
}
_SHUTDOWN_S = 20.0


def node_settings(ranks: int) -> dict[str, Any]:
    """Ray's settings of a node of our own, which starts processes for so many ranks beforehand."""
    return {
        "num_cpus": ranks + 1,  # one is for the controller
        "resources": {RANK_RESOURCE: _PLENTY_OF_RANKS},
        "object_store_memory": _STORE_BYTES,
        "include_dashboard": False,
        "_system_config": _SETTINGS,
    }


def use_token() -> None:
    """Have this process show Ray's token, unless the user forbids it; and outlive a head of our own.

    Before Ray does the same: it would read its settings again. The patience isn't in the environment, which Ray's helpers
    would inherit: those whose driver was killed would never end.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    Config.initialize(json.dumps({_PATIENCE_NAME: _PATIENCE_S}))


@contextmanager
def start_ray(ranks: int) -> Iterator[FindEnded]:
    """Start a Ray of only this process, and end it on exit.

    Args:
        ranks: number of worker processes that it starts beforehand.

    Raises:
        ClusterError: it can't be started.
    """
    with own_folder() as folder:
        protect_token()
        before = psutil.Process().children()
        use_token()
        try:
            with lean_nodes():
                ray.init(
                    address="local",
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=str(folder),
                    **node_settings(ranks),
                )
        except BaseException as error:
            ray.shutdown()
            raise ClusterError(f"a local Ray could not be started: {error}") from error
        with _silence():
            watch = watch_own()

            def ended() -> str:
                reason = watch.ended()
                return f"this process's own Ray has ended: {reason}" if reason else ""

            try:
                yield ended
            finally:
                started = started_since(before)
                if watch.ended():
                    started += users_of(folder)  # its node is no longer the parent of its processes
                _shut_down(started)


@contextmanager
def join_ray(address: str, *, own: bool = False) -> Iterator[FindEnded]:
    """Join a running Ray, and leave it on exit.

    Args:
        own: it is one of ours that outlives its driver.

    Raises:
        ClusterError: no Ray answers there, or it refuses this process; the message says what to do.
    """
    found = find_running(address)
    try:
        with _patience():
            ray.init(address=found, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        ray.shutdown()
        raise ClusterError(
            f"the Ray at {found} can't be joined: {error}. The driver must run on a node of the cluster "
            f"(`ray start --address={found}`), for example through `ray job submit`; or {START_HINT}"
        ) from error
    with _silence():
        try:
            if not own and RANK_RESOURCE in ray.cluster_resources():
                raise ClusterError(f"the Ray at {found} is another process's own, and will end with it; {START_HINT}")
            watch, head = watch_joined(), HeadWatch(found)

            def ended() -> str:
                head.look(time.monotonic())
                reason = watch.ended()
                return f"the node of this process has left the Ray at {found}: {reason}" if reason else ""

            yield ended
        finally:
            _shut_down([])


@contextmanager
def _patience() -> Iterator[None]:
    """Let this process outlive the head of a Ray that it joins now. Ray reads that setting only from the environment."""
    name = f"RAY_{_PATIENCE_NAME}"
    before = os.environ.get(name)
    os.environ.setdefault(name, str(_PATIENCE_S))
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _shut_down(processes: list[psutil.Process]) -> None:
    """Disconnect, and end these processes. Without a head, Ray takes some seconds for it."""
    stopped: Future[None] = Future()

    def stop() -> None:
        try:
            ray.shutdown()
        except BaseException as error:
            stopped.set_exception(error)
        else:
            stopped.set_result(None)

    threading.Thread(target=stop, name="epslots-ray-shutdown", daemon=True).start()
    wait([stopped], _SHUTDOWN_S)
    end(processes)
    stopped.result()  # it can't wait any more: the processes are gone


@contextmanager
def _silence() -> Iterator[None]:
    """Keep Ray's messages out of the user's output: lost ranks are logged by the supervisor."""
    before, ray_worker._worker_logs_enabled = ray_worker._worker_logs_enabled, False
    try:
        yield
    finally:
        ray_worker._worker_logs_enabled = before
