"""A service's life as a process: bind, listen, load, serve, drain, end. ``command.py`` calls ``run_service``."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from cluster.job.signals import JobStopped, StopSignals
from cluster.serve.access_log import AccessLog
from cluster.serve.app import create_app
from cluster.serve.auth import ApiKeys
from cluster.serve.config import ServeConfig
from cluster.serve.served_model import ServedCluster
from cluster.serve.server import HttpServer, bind
from cluster.serve.service import Service
from epslots.streams import say

_LOOK_EVERY_S = 1.0  # at the cluster's failure
STOPPED, FAILED = 0, 3


class OpenedCluster(ServedCluster, Protocol):
    """A cluster that serves, and says how long its start took."""

    timeline: dict[str, float]


OpenCluster = Callable[[], AbstractContextManager[OpenedCluster]]


def run_service(config: ServeConfig, keys: ApiKeys, open_cluster: OpenCluster, model_type: str) -> int:
    """Serve until SIGTERM, Ctrl-C, or the cluster's failure; returns the exit code.

    Args:
        open_cluster: starts the ranks, which takes its time; the service listens meanwhile, and says so.
        model_type: the checkpoint's, as transformers calls it.

    Raises:
        ConfigError: the address can't be used.
        EpslotsError: the cluster can't be started.
    """
    config.check_exposure(bool(keys))
    bound = bind(config.host, config.port)
    service = Service(config, AccessLog() if config.log_requests else None)
    app = create_app(service, keys, local=config.is_local)
    began_s = time.monotonic()
    try:
        with StopSignals() as signals, HttpServer(app, bound, config) as server:
            say(f"listening at {server.url}; requests are taken when the model is loaded")
            with open_cluster() as cluster:
                try:
                    signals.take_back()
                    service.attach(cluster, model_type)
                    say(_ready_line(service, server.url, time.monotonic() - began_s, has_keys=bool(keys)))
                    reason = _wait_for_failure(cluster)
                except JobStopped as stopped:  # also at the ready line: requests are taken since ``attach``
                    _drain(service, server, str(stopped))
                    signals.ignore()
                    return STOPPED
                signals.ignore()
                say(f"error: {reason}")
                return FAILED
    except JobStopped as stopped:
        say(f"stopped by {stopped} before the model was loaded")
        return stopped.exit_code


def _wait_for_failure(cluster: ServedCluster) -> str:
    """Wait until the cluster can't go on; returns the reason."""
    never = threading.Event()
    while (failure := cluster.state().failure) is None:
        never.wait(_LOOK_EVERY_S)
    return failure


def _drain(service: Service, server: HttpServer, reason: str) -> None:
    """Let running requests end. A second signal cuts them off."""
    running = service.running
    again = f"; up to {service.config.drain_s:g} s for {_requests(running)}; once more to cut them off" if running else ""
    say(f"stopped by {reason}{again}")
    try:
        with StopSignals():
            cut = server.call(service.drain())
    except JobStopped:
        cut = server.call(service.drain(0))
    if cut:
        say(f"{_requests(cut)} cut off, with an error that says to try again")


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"


def _ready_line(service: Service, url: str, seconds: float, *, has_keys: bool) -> str:
    name = service.config.names[0]
    key = " -H 'Authorization: Bearer KEY'" if has_keys else ""
    if service.chats:
        path, body = "chat/completions", {"model": name, "messages": [{"role": "user", "content": "Hello"}]}
    else:
        path, body = "completions", {"model": name, "prompt": "import os\n"}
    command = f"curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d '{json.dumps(body)}'"
    ranks = "1 rank" if service.ranks == 1 else f"{service.ranks} ranks"
    return f"ready: {name} on {ranks} at {url}/v1, after {seconds:.1f} s; try: {command}"
