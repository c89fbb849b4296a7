"""A program in place of each of a lean Ray node's two agents.

An agent takes half a second of CPU and 100 MiB, and most nodes never ask one for anything.

The program is given the agent's name and command. It imports nothing of ours or of Ray's, so that it starts at once.

Without a dashboard, the dashboard's agent serves nothing. The other one makes runtime environments, which ranks have none of:
the program listens in its place, and becomes the agent when one is asked for (a driver below ``uv run`` has one). The raylet
asks again until the agent answers. The program ends with the raylet, as agents do.
"""

from __future__ import annotations

import os
import select
import socket
import sys
from pathlib import Path

UNUSED_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
USED_PORT = "runtime_env_agent_port"
"""The files in which a raylet looks for its agents' ports have these names, and the node's id."""
_NO_PORT = -1
_PARENT_POLL_S = 1.0  # where the end of a process can't be waited for


def main(agent: str, command: list[str]) -> None:
    """Stand in for an agent until the raylet ends.

    Args:
        agent: ``"dashboard_agent"`` or ``"runtime_env_agent"``.
        command: the agent's script and its options, each as ``--name=value``.
    """
    options = dict(option.removeprefix("--").split("=", 1) for option in command[1:] if "=" in option)
    folder, node = Path(options["session-dir"]), options["node-id"]
    if agent == "dashboard_agent":
        for name in UNUSED_PORTS:
            _tell_port(folder / f"{name}_{node}", _NO_PORT)
        _wait(None)
        return
    address = options["node-ip-address"]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, int(options["runtime-env-agent-port"])), family=family) as listening:
        port = listening.getsockname()[1]
        _tell_port(folder / f"{USED_PORT}_{node}", port)
        asked = _wait(listening)
    if asked:
        os.execv(sys.executable, [sys.executable, "-u", *command, f"--runtime-env-agent-port={port}"])


def _tell_port(file: Path, port: int) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_text(str(port))
    part.rename(file)  # whole or absent


def _wait(listening: socket.socket | None) -> bool:
    """Wait until a client connects, or the raylet ends; returns whether a client has connected."""
    raylet = int(os.environ["RAY_RAYLET_PID"])
    events, timeout_ms = select.poll(), None
    if listening is not None:
        events.register(listening, select.POLLIN)
    try:
        events.register(os.pidfd_open(raylet), select.POLLIN)
    except (AttributeError, OSError):  # another system than Linux, or an old one; or the raylet has ended
        timeout_ms = 1000 * _PARENT_POLL_S
    while os.getppid() == raylet:
        found = events.poll(timeout_ms)
        if listening is not None and any(descriptor == listening.fileno() for descriptor, _ in found):
            return True
    return False


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
