"""A Ray of our own that outlives its driver, for one named cluster. It is found by its name, or started by a keeper.

Its folder has the cluster's name as a digest, and only this user's rights:

    lock      held by the keeper for as long as it lives, and before that by the driver that starts it
    users     locked by each process that uses this Ray
    address   of its head, once that is up
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.errors import ClusterError
from cluster.ray_backend.connect import FindEnded, join_ray, use_token
from cluster.ray_backend.imports import HOME
from cluster.ray_backend.keeper import ADDRESS, USERS
from cluster.ray_backend.processes import FOLDER_PREFIX, opened, protect_token, short_root

_POLL_S = 0.1
_FIND_S = 60.0  # for the last Ray of this name to end, or for another driver to start one
_END_S = 15.0
_CODE = """
import os, sys
if os.fork():
    os._exit(0)
sys.path.insert(0, sys.argv[4])
from cluster.ray_backend.keeper import main
main()
"""
"""The fork makes it a child of the system's first process: it may outlive the driver, and is no zombie of it."""


def users_file(name: str) -> Path:
    """The file that each process locks while it uses the Ray of this cluster."""
    return _folder(name) / USERS


@contextmanager
def lasting_ray(name: str, ranks: int, ranks_stay: Callable[[], bool]) -> Iterator[FindEnded]:
    """Join the Ray of a named cluster, or start it. It ends with the last process that uses it.

    Args:
        ranks: number of worker processes that a new Ray starts beforehand.
        ranks_stay: asked on exit: the ranks aren't ending, so there is no need to wait for them.

    Raises:
        ClusterError: it can't be started or joined.
    """
    protect_token()
    use_token()
    users, address = _find_or_start(_folder(name), ranks, name)
    try:
        with join_ray(address, own=True) as find_ended:
            yield find_ended
    finally:
        try:
            if not ranks_stay():
                _wait_for_end(_folder(name), users)
        finally:
            os.close(users)


def _folder(name: str) -> Path:
    digest = hashlib.blake2s(f"{os.geteuid()} {name}".encode(), digest_size=4).hexdigest()
    return short_root() / f"{FOLDER_PREFIX}{digest}"


def _find_or_start(folder: Path, ranks: int, name: str) -> tuple[int, str]:
    """The locked file of users, and the address of the Ray."""
    ends_s = time.monotonic() + _FIND_S
    while time.monotonic() < ends_s:
        try:
            _make(folder)
            lock = _lock(folder)
            found = _join(folder) if lock is None else _start(folder, lock, ranks, name)
            if found is not None:
                return found
        except FileNotFoundError:
            pass  # the last keeper has just removed the folder
        time.sleep(_POLL_S)  # locks of files have no event to wait for
    raise ClusterError(f"the Ray of the cluster {name!r} neither came up nor ended within {_FIND_S:g} s; see {folder}")


def _make(folder: Path) -> None:
    """Make the folder, or refuse one that others may write to."""
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        with opened(str(folder), os.O_DIRECTORY, stat.S_ISDIR) as there:
            if os.fstat(there).st_mode & 0o077:
                raise PermissionError(f"{folder} can be used by others, too")
    except (PermissionError, NotADirectoryError) as error:
        raise ClusterError(f"the folder for a named cluster's Ray can't be used: {error}; set TMPDIR to another") from error
    except FileNotFoundError:
        if folder.parent.exists():
            raise
        raise ClusterError(f"no folder for Ray's sockets and logs can be made in {folder.parent}: it doesn't exist") from None


def _lock(folder: Path) -> int | None:
    """The keeper's lock, if there is no keeper."""
    path = folder / "lock"
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == path.stat().st_ino:  # else the folder was removed meanwhile
            return lock
    except BlockingIOError:
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _join(folder: Path) -> tuple[int, str] | None:
    """A Ray that another driver has started; None if it isn't up yet, or is ending."""
    address = (folder / ADDRESS).read_text()
    users = _use(folder)
    return None if users is None else (users, address)


def _use(folder: Path) -> int | None:
    """Become a user; returns the locked file, or None if the keeper is ending."""
    users = os.open(folder / USERS, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(users, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        os.close(users)
        return None
    return users


def _start(folder: Path, lock: int, ranks: int, name: str) -> tuple[int, str] | None:
    """Start a keeper, which gets the lock."""
    users = None
    try:
        for path in folder.iterdir():  # of a keeper that was killed
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != "lock":
                path.unlink()
        users = _use(folder)
        assert users is not None, "no other process has the lock"
        told = _spawn(folder, lock, ranks, name)
        if "address" not in told:
            raise ClusterError(f"a local Ray could not be started: {told.get('error', 'its keeper ended')}")
        return users, told["address"]
    except BaseException:
        if users is not None:
            os.close(users)
        raise
    finally:
        os.close(lock)


def _spawn(folder: Path, lock: int, ranks: int, name: str) -> dict[str, str]:
    """Start the keeper's process; returns what it tells when Ray is up."""
    command = [sys.executable, "-P", "-c", _CODE, f"epslots keeper of {name}", str(folder), str(ranks), HOME]
    keeper = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=(lock,),
        start_new_session=True,
        text=True,
    )
    assert keeper.stdout is not None
    keeper.wait()  # for the fork
    with keeper.stdout:
        line = keeper.stdout.readline()
    found: dict[str, str] = json.loads(line) if line else {}
    return found


def _wait_for_end(folder: Path, users: int) -> None:
    """Wait until the other users have ended, and then the keeper."""
    ends_s = time.monotonic() + _END_S
    released = False
    while time.monotonic() < ends_s:
        if not released:
            with suppress(OSError):
                fcntl.lockf(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.lockf(users, fcntl.LOCK_UN)
                released = True
        else:
            try:
                lock = _lock(folder)
            except FileNotFoundError:
                return
            if lock is not None:
                os.close(lock)
                return
        time.sleep(_POLL_S)  # locks of files have no event to wait for
