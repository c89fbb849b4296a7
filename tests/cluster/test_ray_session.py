"""The connection to Ray: quiet, refused with advice where there is none, and gone without a trace however the process ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import ray

from cluster.errors import ClusterError
from cluster.ray_backend import backend as ray_backend
from cluster.ray_backend import fork, processes, session
from cluster.ray_backend.address import find_running
from cluster.ray_backend.backend import RayBackend
from cluster.ray_backend.processes import own_folder, protect_token
from cluster.ray_backend.session import RayUse
from epslots.errors import ConfigError
from tests.support import ROOT
from tests.support.forks import in_a_child
from tests.support.rank_helpers import PATIENCE_S
from tests.support.ray_driver import pids_below
from tests.support.ray_helpers import RayNodes, drive

# A process with a backend and a worker, which ends as by Ctrl-C.
DRIVER = """
import threading
import ray
from tests.support.ray_driver import Driver, driving
with driving(Driver, 1) as driver:
    worker = driver.start_worker(0)
    try:
        print("ready", worker.process.pid, ray.get_runtime_context().gcs_address, flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
worker.kill()
print("closed", flush=True)
"""

# A process that ends without having closed anything: it has only asked for that to be done at the end. A fork ends before it.
LEFT_OPEN = """
import atexit, os, sys
from cluster.errors import ClusterError
from cluster.ray_backend.session import RayUse
from tests.support.ray_driver import Driver
driver = Driver()
atexit.register(driver.close)
driver.open(1)
worker = driver.start_worker(0)
driver.call(driver.backend.start_controller())
child = os.fork()
if not child:
    atexit.unregister(driver.close)
    try:
        RayUse(None, 1)
    except ClusterError as error:
        sys.exit(7 if "was forked from one that uses Ray" in str(error) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert driver.command(worker, b"hello") == b"hello"
"""

# A process that says when Ray begins to start, and goes on after Ctrl-C.
STARTING = """
import ray
from tests.support.ray_driver import Driver, driving, pids_below
real = ray.init
def init(**settings):
    print("ready", 0, "-", flush=True)
    return real(**settings)
ray.init = init
try:
    with driving(Driver, 1):
        pass
except KeyboardInterrupt:
    print("closed", ray.is_initialized(), pids_below(), flush=True)
"""


@contextmanager
def run_driver(folder: Path, code: str = DRIVER) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """The process, its worker's pid, its Ray's address. Warnings are errors in it; its temporary files go to the folder."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        assert first.startswith("ready"), first + process.stdout.read()
        _, worker, address = first.split()
        yield process, int(worker), address
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def short_folder(ray_tokens: None) -> Iterator[Path]:
    """For temporary files; pytest's own has too long a path for sockets. Nothing may be left there."""
    folder = Path(tempfile.mkdtemp(prefix="e", dir="/tmp"))
    yield folder
    folder.rmdir()


def shared_memory(process: psutil.Process) -> set[str]:
    """The shared memory that a process has mapped and that would outlive it."""
    mapped = {line.split(maxsplit=5)[-1] for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()}
    return {path for path in mapped if path.startswith("/dev/shm/") and not path.endswith("(deleted)")}


def test_control_c_ends_all_and_says_nothing(short_folder: Path):
    with run_driver(short_folder) as (process, worker, address):
        below = pids_below(process.pid)
        assert worker in {p.pid for p in below}
        assert not any(shared_memory(p) for p in below)
        (folder,) = short_folder.iterdir()
        assert folder.stat().st_mode & 0o077 == 0
        with pytest.raises(ClusterError, match="is another process's own"), drive(ranks=1, address=address):
            pass
        psutil.Process(worker).suspend()  # one that doesn't react is no obstacle
        os.killpg(process.pid, signal.SIGINT)  # to all processes of the terminal, as Ctrl-C sends it
        assert process.wait(PATIENCE_S) == 0
        assert process.stdout is not None
        assert process.stdout.read().splitlines() == ["closed"]
        assert not [p for p in below if p.is_running()]


def command_of(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return list(process.cmdline())
    return []


def test_a_process_that_closes_nothing_ends_in_peace(short_folder: Path, tmp_path: Path):
    """It forks, and works in a folder of scripts that are called as what ranks import."""
    for name in ("cluster", "epslots", "torch", "numpy", "msgspec", "psutil", "types"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a script of the same name')")
    command = [sys.executable, "-P", "-W", "error", "-c", LEFT_OPEN]
    environment = {**os.environ, "TMPDIR": str(short_folder), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert not [p for p in psutil.process_iter() if str(short_folder) in " ".join(command_of(p))]
    assert not any(short_folder.iterdir())


def test_control_c_while_ray_starts_leaves_no_ray(short_folder: Path):
    with run_driver(short_folder, STARTING) as (process, _, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
        assert process.stdout is not None
        assert process.stdout.read().splitlines() == ["closed False set()"]


@dataclass
class FakeRay:
    """Starts and ends when the test says so."""

    called: threading.Event = field(default_factory=threading.Event)
    may_start: threading.Event = field(default_factory=threading.Event)
    may_end: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def start(self, _ranks: int) -> Iterator[Callable[[], str]]:
        self.called.set()
        assert self.may_start.wait(PATIENCE_S)
        yield lambda: ""
        assert self.may_end.wait(PATIENCE_S)
        self.ended.set()


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    fake = FakeRay()
    monkeypatch.setattr(session, "start_ray", fake.start)
    yield fake
    fake.may_start.set()
    fake.may_end.set()


def make_backend() -> RayBackend:
    return RayBackend(address=None, strategy="PACK", device="cpu", path="no/folder")


async def begin_and_cancel(backend: RayBackend, fake: FakeRay) -> None:
    opening = asyncio.ensure_future(backend.open(1))
    await asyncio.to_thread(fake.called.wait)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening


def test_a_ray_that_starts_when_nobody_waits_any_more_is_ended(fake_ray: FakeRay):
    fake_ray.may_end.set()
    asyncio.run(begin_and_cancel(make_backend(), fake_ray))  # and no loop is left
    fake_ray.may_start.set()
    assert fake_ray.ended.wait(PATIENCE_S)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_child_knows_of_a_ray_that_has_ended_and_comes_back(fake_ray: FakeRay):
    """It has what is left of it, and would hang at its exit."""
    use = RayUse(None, 1)
    fake_ray.may_start.set()
    asyncio.run(use.joined())
    assert not ray.is_initialized()
    assert in_a_child(lambda: fork.is_forked())
    left = use.leave()
    fake_ray.may_end.set()
    left.result(PATIENCE_S)
    assert not in_a_child(lambda: fork.is_forked())


def test_closing_that_is_interrupted_goes_on_with_the_next_call(fake_ray: FakeRay):
    async def interrupt() -> None:
        await begin_and_cancel(backend, fake_ray)
        closing = asyncio.ensure_future(backend.close())
        await asyncio.sleep(0)  # it begins to wait
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        closing = asyncio.ensure_future(backend.close())
        await asyncio.sleep(0)  # it begins to wait
        assert not closing.done()
        fake_ray.may_start.set()
        fake_ray.may_end.set()
        await closing
        assert fake_ray.ended.is_set()
        await backend.close()

    backend = make_backend()
    asyncio.run(interrupt())


def test_a_ray_that_does_not_end_is_not_waited_for_for_ever(
    fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    async def close() -> None:
        await begin_and_cancel(backend, fake_ray)
        fake_ray.may_start.set()
        await backend.close()
        with pytest.raises(ClusterError, match="the last Ray of this process has not ended within 0 s"):
            await backend.open(1)
        await backend.close()

    backend = make_backend()
    monkeypatch.setattr(ray_backend, "_START_RAY_S", 0.2)
    monkeypatch.setattr(ray_backend, "_END_RAY_S", 0.2)
    monkeypatch.setattr(session, "_LAST_END_S", 0)
    asyncio.run(close())
    assert "Ray did not end within" in caplog.text


def test_sigkill_ends_what_matters_and_the_next_clears_up(short_folder: Path, monkeypatch: pytest.MonkeyPatch):
    with run_driver(short_folder) as (process, worker, _):
        below = pids_below(process.pid)
        psutil.Process(worker).suspend()
        process.kill()
        _, alive = psutil.wait_procs(below, PATIENCE_S)
        assert not alive
    (left,) = short_folder.iterdir()
    assert any(left.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(short_folder))
    with own_folder() as mine:
        assert list(short_folder.iterdir()) == [mine.parent]
        with own_folder() as other:
            assert other.parent != mine.parent
            assert mine.parent.exists()


def lock_fifo(folder: Path) -> None:
    os.mkfifo(folder / "lock")


def lock_link(folder: Path) -> None:
    (folder / "lock").symlink_to("/dev/zero")


def lock_folder(folder: Path) -> None:
    (folder / "lock").mkdir()


def lock_socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "lock"))


def lock_huge(folder: Path) -> None:
    with open(folder / "lock", "wb") as file:
        file.truncate(2**40)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For a while, all users' folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(processes, "_LONGEST_ROOT", 1000)
    return tmp_path


@pytest.mark.parametrize("lock", [lock_fifo, lock_link, lock_folder, lock_socket])
def test_what_lies_among_temporary_files_hangs_no_start(temporary: Path, lock: Callable[[Path], None]):
    """As any user may put it there, under any name."""
    left = temporary / "epslots-ray-x"
    left.mkdir()
    lock(left)
    with own_folder() as mine:
        assert mine.parent.parent == temporary
    assert list(temporary.iterdir()) == [left]


def test_names_of_temporary_files_are_not_believed(temporary: Path):
    """A link to another folder of this user, a FIFO, a file, a link to itself and one to nothing."""
    kept = temporary / "mine"
    kept.mkdir()
    (kept / "lock").touch()
    (temporary / "epslots-ray-a").symlink_to(kept)
    os.mkfifo(temporary / "epslots-ray-b")
    (temporary / "epslots-ray-c").touch()
    (temporary / "epslots-ray-d").symlink_to("epslots-ray-d")
    (temporary / "epslots-ray-e").symlink_to("nothing")
    before = sorted(temporary.iterdir())
    with own_folder():
        pass
    assert sorted(temporary.iterdir()) == before
    assert (kept / "lock").exists()


def test_only_folders_of_this_user_are_cleared_up(temporary: Path, monkeypatch: pytest.MonkeyPatch):
    left = temporary / "epslots-ray-x"
    left.mkdir()
    lock_huge(left)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with own_folder():
            pass
    assert left.exists()
    with own_folder():
        assert not left.exists()


def test_a_folder_that_can_not_be_made_is_an_error_of_ours(temporary: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "nothing"))
    with (
        pytest.raises(ClusterError, match=r"no folder for Ray's sockets and logs can be made in .*: No such file"),
        own_folder(),
    ):
        pass


def rights(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home without a token, under the usual umask."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    before = os.umask(0o022)
    yield tmp_path
    os.umask(before)


def test_rays_token_is_this_users_alone(home: Path):
    protect_token()
    token = home / ".ray" / "auth_token"
    assert rights(token) == 0o600
    assert rights(token.parent) == 0o700
    made = token.read_text()
    assert len(made) == 64
    token.chmod(0o644)  # as Ray makes it
    protect_token()
    assert rights(token) == 0o600
    assert token.read_text() == made
    assert list(token.parent.iterdir()) == [token]


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_that_the_user_names_is_left_alone(home: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(name, "somewhere")
    protect_token()
    assert not list(home.iterdir())


def test_a_token_file_that_is_none_hangs_nothing(home: Path):
    (home / ".ray").mkdir()
    os.mkfifo(home / ".ray" / "auth_token")
    protect_token()


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "somewhere", "10.0.0.1:", "", "http://10.0.0.1:8265"])
def test_addresses_that_can_not_be(address: str):
    with pytest.raises(ConfigError, match=r'allowed: None \(a local Ray\), "auto"'), drive(ranks=1, address=address):
        pass


def test_no_ray_is_running(ray_tokens: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)  # of all processes of this machine
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda _: None)
    with (
        pytest.raises(ClusterError, match="no running Ray was found here; start one with `ray start --head`"),
        drive(1, address="auto"),
    ):
        pass
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ClusterError, match=r"no Ray answers at .* \(unavailable\): start one"), drive(1, address=address):
            pass
    assert not ray.is_initialized()


def test_a_note_of_the_running_ray_that_is_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    note = tmp_path / "ray_current_cluster"
    os.mkfifo(note)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("cluster.ray_backend.address.get_ray_address_file", lambda _: str(note))
    with pytest.raises(ClusterError, match=r"ray_current_cluster is no file; remove it"):
        find_running("auto")


def test_another_token_is_refused_with_advice(ray_nodes: RayNodes):
    code = (
        f"from tests.support.ray_driver import Driver, driving\nwith driving(Driver, 1, address={ray_nodes.address!r}): pass"
    )
    environment = {**os.environ, "RAY_AUTH_TOKEN": "0" * 32}
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "refuses this process's token, or asks for one: give this process the cluster's token" in found.stderr
    assert "Warning" not in found.stderr


def test_auto_finds_the_running_one(ray_nodes: RayNodes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", ray_nodes.address)
    with drive(ranks=1, address="auto"):
        assert ray.get_runtime_context().gcs_address == ray_nodes.address
        with drive(ranks=1, address=ray_nodes.address), drive(ranks=0, address=None):
            pass
        with pytest.raises(ClusterError, match="this process is connected to the Ray at"), drive(1, address="127.0.0.1:1"):
            pass
        assert ray.is_initialized()
    assert not ray.is_initialized()


def test_a_connection_of_the_users_is_used_and_left_alone(ray_nodes: RayNodes):
    ray.init(address=ray_nodes.address, log_to_driver=False)
    try:
        for _ in range(2):
            with drive(ranks=1):
                pass
            assert ray.is_initialized()
    finally:
        ray.shutdown()
