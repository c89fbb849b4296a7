"""Ray's processes and files on this machine: which have ended, which are left, and who may read them."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import ray
import ray._private.worker as ray_worker

from cluster.errors import ClusterError

_CORE = ("gcs_server", "raylet")  # Ray's other processes are restarted, end the raylet with them, or aren't needed
_END_S = 3.0
FOLDER_PREFIX = "epslots-ray-"
_LONGEST_ROOT = 16  # with what Ray appends, the paths of its sockets stay below the system's limit of 107
_TOKEN_SETTINGS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class Watch:
    """Watches the processes without which a Ray can't go on.

    Args:
        processes: each with its name, for people.
    """

    def __init__(self, processes: Mapping[psutil.Process, str]) -> None:
        self._processes = processes

    def ended(self) -> str:
        """The first process that has ended, for people; "" if none has."""
        gone = (process for process in self._processes if not _lives(process))
        return next((f"its {self._processes[process]} (pid {process.pid}) has ended" for process in gone), "")


def watch_own() -> Watch:
    """Watch the head and the raylet of a Ray that this process has started."""
    return Watch({child: name for child in psutil.Process().children() if (name := _name(child)) in _CORE})


def watch_joined() -> Watch:
    """Watch the raylet of the Ray that this process has joined, if it is visible from here."""
    node = ray_worker._global_node
    path = None if node is None else node.raylet_socket_name
    if path is None or not hasattr(socket, "SO_PEERCRED"):
        return Watch({})
    with suppress(OSError, psutil.Error), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        connection.connect(path)
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid = struct.unpack("3i", peer)[0]
        if pid > 0:  # else it is in another container
            return Watch({psutil.Process(pid): "raylet"})
    return Watch({})


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True  # as far as can be told


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return str(process.name())
    return ""


def started_since(before: list[psutil.Process]) -> list[psutil.Process]:
    """The processes that Ray has started in this process since then, with their descendants."""
    started = [child for child in psutil.Process().children() if child not in before and is_of_ray(child)]
    return started + [process for child in started for process in _descendants(child)]


def users_of(folder: Path) -> list[psutil.Process]:
    """This user's other processes with an open file in a folder, also if their parents have ended."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.uids().real != os.getuid():
                continue
            if any(Path(file.path).is_relative_to(folder) for file in process.open_files()):
                found.append(process)
    return found


def end(processes: list[psutil.Process]) -> None:
    """Wait for processes to end, and kill the others: a stopped one doesn't end by itself."""
    _, alive = psutil.wait_procs(processes, _END_S)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, _END_S)


def is_of_ray(process: psutil.Process) -> bool:
    """Whether a process runs a program of Ray's, or is one of its workers."""
    with suppress(psutil.Error):
        command = " ".join(process.cmdline())
        return command.startswith("ray::") or str(Path(ray.__file__).parent) in command
    return False


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return list(process.children(recursive=True))
    return []


def short_root() -> Path:
    """The folder for temporary files, or a shorter one: the paths of Ray's sockets are limited."""
    root = Path(tempfile.gettempdir())
    return root if len(str(root)) <= _LONGEST_ROOT else Path("/tmp")


@contextmanager
def own_folder() -> Iterator[Path]:
    """A folder for Ray's sockets and logs, removed at the end. Folders of killed processes are removed here, too.

    Raises:
        ClusterError: no folder can be made.
    """
    root = short_root()
    _remove_old(root)
    try:
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=root))
    except OSError as error:
        raise ClusterError(f"no folder for Ray's sockets and logs can be made in {root}: {error.strerror}") from error
    try:
        with open(folder / "lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder / "r"  # Ray lets everybody write to its folder; the one around it is ours
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_old(root: Path) -> None:
    """Remove this user's folders whose process has ended.

    ``root`` is for all users, and may hold anything under such a name: no link is followed, and no open waits.
    """
    with suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            if entry.name.startswith(FOLDER_PREFIX):
                with (
                    suppress(OSError),
                    opened(entry.path, os.O_DIRECTORY, stat.S_ISDIR) as folder,
                    opened("lock", 0, stat.S_ISREG, within=folder) as lock,
                ):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(entry.path, ignore_errors=True)


@contextmanager
def opened(path: str, flags: int, is_kind: Callable[[int], bool], *, within: int | None = None) -> Iterator[int]:
    """An open descriptor of this user's file or folder.

    Args:
        is_kind: tests the file's mode.

    Raises:
        OSError: it is gone, another user's, or of another kind.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, dir_fd=within)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or not is_kind(found.st_mode):
            raise PermissionError(f"{path} is another user's, or of another kind")
        yield descriptor
    finally:
        os.close(descriptor)


def protect_token() -> None:
    """Let only this user read the token of a Ray of our own.

    Ray would create its file with the rights that the umask leaves, so it is made here. A token or file that the user has
    named is the user's to protect.
    """
    if any(os.environ.get(name) for name in _TOKEN_SETTINGS) or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    with suppress(OSError, RuntimeError):  # no home, or a read-only one: Ray's own error says so
        path = Path.home() / ".ray" / "auth_token"  # the only place where Ray looks
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.path.lexists(path):
            _make_token(path)
        with opened(str(path), 0, stat.S_ISREG) as there:
            if os.fstat(there).st_mode & 0o077:
                os.fchmod(there, 0o600)


def _make_token(path: Path) -> None:
    """Create the token's file in one operation, unless another process has just done so."""
    descriptor, made = tempfile.mkstemp(dir=path.parent)
    try:
        with open(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(made, path)
    finally:
        Path(made).unlink()
