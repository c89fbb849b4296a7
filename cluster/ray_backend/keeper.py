"""The process that keeps a Ray of our own while its driver may come and go. It ends with the last process that uses that Ray.

``lasting_ray.py`` starts it. Each user of the Ray, a driver or a rank, holds a shared lock of the file ``users``, which the
system releases with the process; when the keeper gets that file for itself, no process is left.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from ray._common.usage import usage_lib
from ray._private.node import Node
from ray._private.parameter import RayParams

from cluster.ray_backend.connect import node_settings, use_token
from cluster.ray_backend.lean_node import lean_nodes
from cluster.ray_backend.processes import end, is_of_ray, protect_token, started_since, users_of, watch_own

USERS, ADDRESS = "users", "address"
_LOOK_EVERY_S = 0.3


def main() -> NoReturn:
    """Keep a Ray: its folder, with the lock that this process was given, and the number of ranks are arguments."""
    folder, ranks = Path(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the driver's terminal
    node = None
    try:
        node = _start(folder, ranks)
        _write(folder / ADDRESS, node.gcs_address)
        _tell({"address": node.gcs_address})
        _wait_for_end(folder)
    except Exception as error:
        _tell({"error": f"{type(error).__name__}: {error}"})
    finally:
        started = started_since([])
        if node is not None:
            with suppress(Exception):  # after any error, they are ended below
                node.kill_all_processes(check_alive=False, allow_graceful=True)
        end(started + [process for process in users_of(folder) if is_of_ray(process)])  # and no driver
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)


def _start(folder: Path, ranks: int) -> Node:
    protect_token()
    use_token()
    usage_lib.set_usage_stats_enabled_via_env_var(False)
    parameters = RayParams(temp_dir=str(folder / "r"), **node_settings(ranks))
    with lean_nodes():
        return Node(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True)


def _wait_for_end(folder: Path) -> None:
    """Wait until no process uses the Ray any more, or a part of it has ended."""
    never, watch = threading.Event(), watch_own()
    users = os.open(folder / USERS, os.O_RDWR | os.O_CLOEXEC)
    while not watch.ended():
        with suppress(OSError):
            fcntl.lockf(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return  # and keeps the lock: a newcomer has to wait for the next Ray
        never.wait(_LOOK_EVERY_S)


def _write(file: Path, text: str) -> None:
    """Write a file in one operation, as its readers see it."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.rename(file)


def _tell(message: dict[str, str]) -> None:
    """Tell the driver that waits for this process's start."""
    with suppress(OSError):  # it has ended
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()
