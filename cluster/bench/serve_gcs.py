"""Restarts of Ray's GCS under HTTP load, with Ray's own fault tolerance. The GCS keeps its state in a store.

By default in RocksDB on this machine's disk, in the head's process: Ray calls that alpha. Redis, which Ray supports fully, is
a server of its own: where its program is given, it is started here.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import msgspec
import psutil

from cluster.bench.common import RANKS, open_cluster, pids, prompts
from cluster.bench.http_load import HttpLoad, Reached, WaveAnswers, wave_of
from cluster.bench.serve_here import bodies_of, serving_here
from epslots.bench.report import BenchReport

_REQUESTS, _NEW_TOKENS = 16, 200
_PARTS_BEFORE = 5
_DOWN_S = (0.5, 8.0)
_ENDS_WITHIN_S = 10.0
_LOOK_EVERY_S = 0.05


def measure_gcs_restarts(report: BenchReport, cache_dir: Path, *, redis: str = "") -> None:
    """Kill the GCS amid streams, for a moment or for seconds; then kill a rank.

    In a process of its own, because a process has one Ray token for its life.

    Args:
        redis: program of a Redis server, in which the GCS keeps its state; "" = RocksDB.

    Raises:
        AssertionError: a request was lost, or has another text.
    """
    folder = tempfile.mkdtemp(prefix="gcs-")  # short: the paths of sockets are limited
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_gcs_rpc_server_reconnect_timeout_s": "120",  # so long may it be away
    }
    if not redis:
        environment |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": f"{folder}/gcs"}
    try:
        command = [sys.executable, "-m", "cluster.bench.serve_gcs", folder, str(cache_dir), redis]
        done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, check=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = msgspec.json.decode(done.stdout.splitlines()[-1])
    store = "Redis" if redis else "RocksDB"
    report.table(f"the GCS, with {store}, restarts amid {_REQUESTS} streams of {_NEW_TOKENS} tokens", rows)
    assert not any(row["lost"] or row["different"] for row in rows), f"requests were lost or different: {rows}"


def _measure(folder: str, cache_dir: Path, redis: str) -> list[dict[str, Any]]:
    """The rows of the table."""
    with (
        _Head(folder, redis) as head,
        open_cluster(cache_dir, address=head.address) as cluster,
        serving_here(cluster) as (url, _),
        HttpLoad(url) as load,
    ):
        bodies = bodies_of(prompts(_REQUESTS), _NEW_TOKENS, stream=True)
        right = [answer.text for answer in load.ask(bodies).answers]
        rows = []
        for down_s in (*_DOWN_S, None):
            load.tell(wave_of(bodies, tell_at=_PARTS_BEFORE))
            assert isinstance(load.hear(), Reached)
            if down_s is None:
                os.kill(pids(cluster)[0], signal.SIGKILL)
            else:
                head.restart_gcs(down_s)
            rows.append(_row("a rank is killed afterwards" if down_s is None else f"GCS away for {down_s:g} s", load, right))
        began_s = time.monotonic()
        cluster.scale(RANKS)
        rows[-1]["until a new rank has joined, s"] = time.monotonic() - began_s
    return rows


def _row(name: str, load: HttpLoad, right: list[str]) -> dict[str, Any]:
    found = load.hear()
    assert isinstance(found, WaveAnswers)
    return {
        "": name,
        "lost": sum(not answer.whole for answer in found.answers),
        "different": sum(answer.text != text for answer, text in zip(found.answers, right, strict=True)),
        "longest gap in any stream, s": max(answer.longest_gap_s for answer in found.answers),
        "until a new rank has joined, s": "",
    }


class _Head:
    """A Ray of one node whose GCS keeps its state elsewhere. As a context manager, it ends with the block.

    Args:
        folder: only of this Ray: its processes are found by it.
        redis: program of a Redis server for that state; "" = the environment says where.
    """

    def __init__(self, folder: str, redis: str = "") -> None:
        self._folder, self._redis = folder, redis
        self._started: list[subprocess.Popen[bytes]] = []
        self._port = _free_port()
        self.address = f"127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        Path(self._folder, "gcs").mkdir()
        options = {"port": self._port, "num-cpus": 2 * RANKS, "include-dashboard": "false", "temp-dir": f"{self._folder}/ray"}
        environment = dict(os.environ)
        if self._redis:
            environment["RAY_REDIS_ADDRESS"], options["redis-password"] = self._start_redis()
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats"]
        command += [f"--{name}={value}" for name, value in options.items()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        return self

    def _start_redis(self) -> tuple[str, str]:
        """A Redis server only for this machine; returns its address and password."""
        port, password = _free_port(), secrets.token_hex(16)
        settings = f'port {port}\nbind 127.0.0.1\nrequirepass {password}\ndir {self._folder}\nsave ""\n'
        self._start([self._redis, "-"], input=settings.encode())
        while True:  # until it listens
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                return f"127.0.0.1:{port}", password
            if (code := self._started[-1].poll()) is not None:
                raise RuntimeError(f"{self._redis} ended with code {code}")
            time.sleep(_LOOK_EVERY_S)  # Redis doesn't say when it listens

    def _start(self, command: list[str], input: bytes = b"", **settings: Any) -> None:
        started = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **settings
        )
        assert started.stdin is not None
        with started.stdin:
            started.stdin.write(input)
        self._started.append(started)

    def restart_gcs(self, down_s: float) -> None:
        """SIGKILL the GCS, and start it again as it was."""
        (gcs,) = [process for process in self._processes() if process.name() == "gcs_server"]
        command, environment, folder = gcs.cmdline(), gcs.environ(), gcs.cwd()
        gcs.kill()
        time.sleep(down_s)  # it is away for so long
        self._start(command, env=environment, cwd=folder)

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if f"{self._folder}/" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def __exit__(self, *_: object) -> None:
        for process in (ending := self._processes()):
            process.kill()
        psutil.wait_procs(ending, timeout=_ENDS_WITHIN_S)
        for started in self._started:
            started.kill()
            started.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


if __name__ == "__main__":
    found = _measure(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    sys.stdout.buffer.write(b"\n" + msgspec.json.encode(found) + b"\n")
