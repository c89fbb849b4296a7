"""``epslots serve`` is killed: its ranks keep their model, and the next process adopts them; or all ends, their Ray too."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.api import Cluster
from cluster.errors import ClusterError
from epslots.example import example_model
from tests.support.http_service import COMPLETIONS, raw_request, read_until
from tests.support.rank_helpers import PATIENCE_S
from tests.support.ray_helpers import free_port

NAME = f"test-{os.getpid()}"
BODY = {"prompt": "def read(path):\n", "max_tokens": 60, "temperature": 0, "ignore_eos": True}


class Service:
    """One process of the command.

    Attributes:
        lines: of its standard error, until it was ready or ended.
    """

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self._port = process, port
        self.lines: list[str] = []

    def wait_until_ready(self) -> bool:
        """False if it ends before."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("ready:"):
                return True
        return False

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port), timeout=PATIENCE_S)

    def text(self) -> str:
        """Its answer to the test's request."""
        with self.connect() as connection:
            connection.sendall(raw_request(COMPLETIONS, BODY | {"stream": True}))
            found = read_until(connection, b"data: [DONE]\n\n")
        events = re.findall(rb"data: (\{.*\})", found)
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)


@contextmanager
def serve(folder: Path, port: int, *options: str) -> Iterator[Service]:
    arguments = ["--ranks", "2", "--slots", "4", "--port", str(port), "--name", NAME, "--cache-dir", str(folder / "stores")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "EPSLOTS_TEST": NAME}
    command = [sys.executable, "-m", "epslots", "serve", *arguments, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield Service(process, port)
        finally:
            process.kill()


def ours(part: str = "") -> list[psutil.Process]:
    """The processes that services of this test have started, themselves or through others."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("EPSLOTS_TEST") == NAME and part in " ".join(process.cmdline()):
                found.append(process)
    return found


def refusal(folder: Path, slots: int) -> str:
    """Why this process can't drive the ranks."""
    settings: Any = {"name": NAME, "orphan_s": 600, "ranks": 2, "slots": slots, "cache_dir": folder / "stores"}
    with pytest.raises(ClusterError) as caught, Cluster(example_model(), progress=False, **settings):
        pass
    return str(caught.value)


@pytest.fixture
def nothing_is_left(ray_tokens: None) -> Iterator[None]:
    yield
    for process in ours():
        process.kill()


@pytest.mark.usefixtures("nothing_is_left")
def test_ranks_outlive_their_service_and_end_without_another(tmp_path: Path):
    port = free_port()
    with serve(tmp_path, port) as first:
        assert first.wait_until_ready(), first.lines
        right = first.text()
        ranks = ours("ray::WorkerActor")
        assert len(ranks) == 2 and len(right) > 0
        with first.connect() as stream:
            stream.sendall(raw_request(COMPLETIONS, BODY | {"stream": True, "max_tokens": 300}))
            read_until(stream, b"data: {")
            first.process.kill()
            with suppress(ConnectionError):  # the request fails at once, and doesn't hang
                while stream.recv(65536):
                    pass
        assert first.process.wait(PATIENCE_S) == -signal.SIGKILL
    assert "were loaded with other settings: slots: 4, and 5 is wanted" in refusal(tmp_path, slots=5)
    with serve(tmp_path, port, "--orphan-s", "2") as second:
        assert second.wait_until_ready(), second.lines
        assert second.text() == right
        assert ours("ray::WorkerActor") == ranks  # the same processes, so nothing was loaded
        found = re.search(r"has a driver, which lives \(node [\d.]+, pid (\d+)\)", refusal(tmp_path, slots=4))
        assert found is not None and int(found[1]) == second.process.pid
        assert second.text() == right
        left = ours()
        second.process.kill()
        second.process.wait(PATIENCE_S)
    _, alive = psutil.wait_procs(left, PATIENCE_S)  # the ranks end, and their Ray with the last of them
    assert alive == []
