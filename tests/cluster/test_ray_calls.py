"""Calls to Ray that may never return, and looks at its head and its processes; no Ray is started."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.driver.backend import WorkerDied
from cluster.errors import ClusterError
from cluster.ray_backend import calls
from cluster.ray_backend.address import HeadWatch
from cluster.ray_backend.calls import ask
from cluster.ray_backend.handles import RayControllerHandle
from cluster.ray_backend.processes import Watch, users_of
from tests.support.rank_helpers import PATIENCE_S


@pytest.fixture
def head() -> Iterator[threading.Event]:
    """Calls wait for it, as they do for the head of a Ray."""
    event = threading.Event()
    yield event
    event.set()


def test_a_call_without_an_answer_ends_at_its_deadline(head: threading.Event):
    with pytest.raises(ClusterError, match=r"Ray did not answer within 0.01 s; its head may be gone"):
        asyncio.run(ask(head.wait, deadline_s=0.01))


def test_calls_that_are_stuck_are_bounded(head: threading.Event):
    async def many() -> None:
        for _ in range(calls._MOST_LATE):
            with pytest.raises(ClusterError, match="did not answer"):
                await ask(head.wait, deadline_s=0.001)
        with pytest.raises(ClusterError, match="16 calls wait for its head, which may be gone"):
            await ask(head.wait, deadline_s=0.001)

    asyncio.run(many())
    head.set()
    for thread in [thread for thread in threading.enumerate() if thread.name == "epslots-ray-call"]:
        thread.join()
    assert asyncio.run(ask(int, "7")) == 7


class Silent:
    """An actor that never answers."""

    @property
    def call(self) -> Silent:
        return self

    def options(self) -> Silent:
        return self

    def remote(self, *_: object) -> asyncio.Future[bytes]:
        return asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_call_to_a_ray_that_has_ended_is_over(cancelled: bool):
    """Or the next controller would be a minute late. A caller that cancels it as well sees that it is cancelled."""

    async def ask_and_forget() -> None:
        controller = RayControllerHandle(Silent())
        asking = asyncio.ensure_future(controller.call(b"order"))
        await asyncio.sleep(0)  # it is asked
        controller.forget()
        if cancelled:
            asking.cancel()
        async with asyncio.timeout(PATIENCE_S):
            await asking

    with pytest.raises(asyncio.CancelledError if cancelled else WorkerDied):
        asyncio.run(ask_and_forget())


def test_what_ray_raises_is_an_error_of_ours():
    def refuse(error: Exception) -> None:
        raise error

    with pytest.raises(ClusterError, match="Ray refuses: ConnectionError: no head"):
        asyncio.run(ask(refuse, ConnectionError("no head")))
    with pytest.raises(ClusterError, match=r"^no room$"):
        asyncio.run(ask(refuse, ClusterError("no room")))


def test_a_head_that_goes_and_comes_is_said_once_each(caplog: pytest.LogCaptureFixture):
    listening = socket.create_server(("127.0.0.1", 0))
    host, port = listening.getsockname()
    watch = HeadWatch(f"{host}:{port}")
    watch.look(0.0)
    assert not caplog.records
    listening.close()
    watch.look(1.0)  # it is too early to look again
    assert not caplog.records
    for now in (10.0, 20.0, 30.0):
        watch.look(now)
    with socket.create_server((host, port)):
        watch.look(40.0)
        watch.look(50.0)
    said = [record.message.partition(". ")[0] for record in caplog.records]
    assert said == [f"the head of the Ray at {host}:{port} can't be reached", f"the head of the Ray at {host}:{port} is back"]


def test_a_process_that_has_ended_is_found_also_as_a_zombie(tmp_path: Path):
    code = "import sys; open(sys.argv[1], 'w'); file = open(sys.argv[1]); print('ready', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        process = psutil.Process(child.pid)
        watch = Watch({psutil.Process(): "driver", process: "raylet"})
        assert watch.ended() == ""
        assert users_of(tmp_path) == [process]
        process.suspend()
        assert watch.ended() == ""
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # its exit status hasn't been read
        assert process.status() == psutil.STATUS_ZOMBIE
        assert watch.ended() == f"its raylet (pid {child.pid}) has ended"
