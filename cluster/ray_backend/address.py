"""Finds a running Ray, and asks it for access. Ray's own attempt takes minutes, and fills the terminal."""

from __future__ import annotations

import logging
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

import grpc
import ray
from ray._common.utils import get_ray_address_file
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from cluster.errors import ClusterError
from epslots.errors import ConfigError

logger = logging.getLogger("epslots.cluster")

_PROBE_S = 5.0
_HEAD_EVERY_S = 5.0

START_HINT = "start one with `ray start --head`, or have a local one: give no address (a job: --address local)"
TOKEN_HINT = (
    "give this process the cluster's token, in ~/.ray/auth_token (or where RAY_AUTH_TOKEN_PATH says, or in RAY_AUTH_TOKEN), "
    "and set RAY_AUTH_MODE=token, without which Ray sends no token to an address that was spelled out"
)


def check_address(address: str | None) -> None:
    """Refuse an address of a wrong form (ConfigError)."""
    if address is None or address == "auto" or ("://" not in address and address.rpartition(":")[2].isdigit()):
        return
    raise ConfigError(
        f'address={address!r}; allowed: None (a local Ray), "auto" (the running one), "host:port" of its head. This process '
        f"becomes a part of the cluster, so ray:// won't do: run it on a node, for example through `ray job submit`"
    )


def find_running(address: str) -> str:
    """The "host:port" of a running Ray that this process may join.

    Raises:
        ClusterError: there is none; the message says what to do.
    """
    found = _resolve(address)
    with init_grpc_channel(found) as channel:
        try:
            version = NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=_PROBE_S).ray_version
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                message = f"the Ray at {found} refuses this process's token, or asks for one: {TOKEN_HINT}"
                raise ClusterError(message) from error
            raise ClusterError(f"no Ray answers at {found} ({error.code().name.lower()}): {START_HINT}") from error
    if version != ray.__version__:
        raise ClusterError(
            f"the Ray at {found} is version {version}, and this process has {ray.__version__}: install the same on all nodes"
        )
    return found


def _check_file(file: Path) -> None:
    """Refuse Ray's note of the running cluster if it is no file. In a folder for all users, a FIFO would make Ray wait."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(file.stat().st_mode):
            raise ClusterError(f'address="auto": {file} is no file; remove it, or give the "host:port" of the Ray to join')


def _resolve(address: str) -> str:
    rays = logging.getLogger("ray")
    level = rays.level
    rays.setLevel(logging.ERROR)  # it would log hints about tokens and other clusters
    asked_auto = address == "auto"
    if asked_auto:
        address = os.environ.get("RAY_ADDRESS", address)  # Ray sets it for a job: several clusters may run here
    try:
        if address == "auto":
            _check_file(Path(get_ray_address_file(None)))
        found: str | None = canonicalize_bootstrap_address(address)
        if address == "auto":
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    except (ConnectionError, ValueError, OSError) as error:
        raise ClusterError(f"address={address!r}: no running Ray was found here; {START_HINT}") from error
    finally:
        rays.setLevel(level)
    if found is None:
        raise ClusterError(f"address={address!r}: no running Ray was found here; {START_HINT}")
    return found


class HeadWatch:
    """Watches whether the head of a joined Ray can be reached, and logs every change."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._next_s = 0.0
        self._reached = True

    def look(self, now_s: float) -> None:
        """Try to reach the head, if the last try was long enough ago."""
        if now_s < self._next_s:
            return
        self._next_s = now_s + _HEAD_EVERY_S
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_HEAD_EVERY_S).close()
            reached = True
        except OSError:
            reached = False
        if self._reached and not reached:
            logger.warning(
                "the head of the Ray at %s can't be reached. Ranks serve on, but none can be replaced. Ray ends its nodes, "
                "and all ranks with them, if the head isn't back in a minute (its gcs_rpc_server_reconnect_timeout_s)",
                self._address,
            )
        elif reached and not self._reached:
            logger.warning("the head of the Ray at %s is back", self._address)
        self._reached = reached
