"""``epslots serve`` as a process of its own: what SIGKILLs of it cost, and its processor time without requests."""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from cluster.bench.common import RANKS, SETTINGS, prompts
from cluster.bench.serve_here import bodies_of
from epslots.bench.report import BenchReport, spread

_IDLE_S = 15.0
_ANSWERS_WITHIN_S = 300.0
_ENDS_WITHIN_S = 60.0
_ASK_EVERY_S = 0.02
_MARK = "EPSLOTS_BENCH_MARK"
"""A variable of the environment that all processes of a service inherit, however they are started: they are found by it."""
LIVE_PATH = "/live"
"""Where the live page gets its frames."""


class ServeProcess:
    """``epslots serve`` with the example model, and all processes that come of it.

    Args:
        cache_dir: of the host store.
        options: further ones of the command.
    """

    def __init__(self, cache_dir: Path, *options: str) -> None:
        self._mark = secrets.token_hex(8)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        ours = {"ranks": RANKS, "port": self.port, "cache-dir": cache_dir}
        ours |= {name: SETTINGS[name.replace("-", "_")] for name in ("dtype", "slots", "kv-tokens", "device")}
        named = [word for name, value in ours.items() for word in (f"--{name}", str(value))]
        self._command = [sys.executable, "-m", "epslots", "serve", *named, "--no-log-requests", *options]
        self.start()

    def start(self) -> None:
        """Run the command, the first time or again."""
        self._process = subprocess.Popen(
            self._command, env=os.environ | {_MARK: self._mark}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.driver = psutil.Process(self._process.pid)

    def kill(self) -> None:
        """SIGKILL the command's process."""
        self._process.kill()
        self._process.wait()

    def seconds_to_an_answer(self) -> float:
        """Ask again and again, from now on, until a request is answered.

        Raises:
            RuntimeError: the process has ended, or none is answered for minutes.
        """
        began_s, body = time.monotonic(), json.dumps(bodies_of(prompts(1), 4, stream=False)[0])
        while time.monotonic() - began_s < _ANSWERS_WITHIN_S:
            with suppress(OSError, http.client.HTTPException):
                if self.ask("POST", "/v1/completions", body).status == 200:
                    return time.monotonic() - began_s
            if self._process.poll() is not None:
                raise RuntimeError(f"epslots serve ended: {self._process.stderr.read()[-2000:]}")  # type: ignore[union-attr]
            time.sleep(_ASK_EVERY_S)  # a process that doesn't listen yet can't say when it will
        raise RuntimeError(f"no request was answered in {_ANSWERS_WITHIN_S:g} s")

    def ask(self, method: str, path: str, body: str | None = None) -> http.client.HTTPResponse:
        """An answer, whose body may be yet to come."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return connection.getresponse()

    def processes(self) -> dict[str, list[psutil.Process]]:
        """The service's processes that live: "driver", "ranks", "Ray's own"."""
        found: dict[str, list[psutil.Process]] = {"driver": [], "ranks": [], "Ray's own": []}
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(_MARK) != self._mark or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                name = " ".join(process.cmdline())
                kind = "driver" if process == self.driver else "ranks" if _is_rank(name) else "Ray's own"
                found[kind].append(process)
        return found

    def end(self) -> None:
        """SIGTERM, and the end of all processes; those that stay are killed."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDS_WITHIN_S)
        left = [process for kind in self.processes().values() for process in kind]
        _, stay = psutil.wait_procs(left, timeout=10)
        for process in stay:
            process.kill()
        if self._process.stderr is not None:
            self._process.stderr.close()


def _is_rank(name: str) -> bool:
    return bool(re.match(r"ray::(\w*\.)?\w*Worker\w*", name)) and "Controller" not in name


@contextmanager
def _serve(cache_dir: Path, *options: str) -> Iterator[ServeProcess]:
    process = ServeProcess(cache_dir, *options)
    try:
        yield process
    finally:
        process.end()


def measure_driver_kills(report: BenchReport, cache_dir: Path, *, kills: int) -> None:
    """SIGKILLs of ``epslots serve``, which is started again at once with the same name; ranks that stay keep their model.

    Raises:
        AssertionError: a rank was started anew, which loads the model.
    """
    seconds, loads = [], 0
    name = f"bench-{secrets.token_hex(4)}"
    with _serve(cache_dir, "--name", name, "--orphan-s", "600") as service:
        first_s = service.seconds_to_an_answer()
        for number in range(kills):
            before = set(service.processes()["ranks"])
            assert len(before) == RANKS, f"{len(before)} ranks are found; there should be {RANKS}"
            service.kill()
            service.start()
            seconds.append(service.seconds_to_an_answer())
            loads += len(set(service.processes()["ranks"]) - before)
            print(f"kill {number + 1} of {kills}: answered after {seconds[-1]:.2f} s", flush=True)
    rows: list[dict[str, Any]] = [
        {"": "from SIGKILL and start to an answer", **spread(seconds), "most": max(seconds)},
        {"": "(from the first start)", **spread([first_s]), "most": first_s},
    ]
    report.table(f"{kills} SIGKILLs of the driver, seconds", rows)
    report.table("loads of the model by these", [{"loads": loads}])
    assert not loads, f"{loads} ranks were started anew"


def measure_idle(report: BenchReport, cache_dir: Path) -> None:
    """Processor time of a service without requests, with its page closed and open."""
    with _serve(cache_dir) as service:
        service.seconds_to_an_answer()
        closed = _spent(service)
        rows = [{"page": "closed", **closed}]
        live = service.ask("GET", LIVE_PATH)
        if live.status == 200:
            rows.append({"page": "open", **_spent(service, live)})
        else:
            print(f"the page's frames: status {live.status} at {LIVE_PATH}; left out", flush=True)
        live.close()
    report.table(f"processor time over {_IDLE_S:g} s without requests, milliseconds a second", rows)


def _spent(service: ServeProcess, live: http.client.HTTPResponse | None = None) -> dict[str, float]:
    """Milliseconds of processor time a second, by kind of process.

    Args:
        live: an open stream, which is read meanwhile.
    """
    processes = service.processes()
    before = {kind: _seconds(some) for kind, some in processes.items()}
    ends_s = time.monotonic() + _IDLE_S
    while (left_s := ends_s - time.monotonic()) > 0:
        if live is None:
            time.sleep(left_s)  # processor time is measured while nothing happens
        else:
            live.readline()
    return {kind: (_seconds(some) - before[kind]) / _IDLE_S * 1e3 for kind, some in processes.items()}


def _seconds(processes: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total
