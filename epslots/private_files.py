"""Files and folders that belong only to this user: host stores, their locks, compiled code.

Folders have mode 0700 and files 0600: a store holds weights that others may not be allowed to read. Files of another user are
refused, since their owner would decide which weights are served. Links aren't followed and opening never blocks: a link, a
FIFO or a device in a file's place is an error that names it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from epslots.errors import StoreError

_ROOT_USER = 0
_FILE_MODE, _FOLDER_MODE = 0o600, 0o700
_NOT_REGULAR = (
    "{} is no regular file, but a link, a folder, a FIFO, a socket or a device: remove it, or choose another cache_dir"
)


def default_cache_dir() -> Path:
    """The folder of host stores and compiled code where the user names none."""
    return Path(platformdirs.user_cache_dir("epslots"))


def make_private_folder(folder: Path) -> None:
    """Make a folder and its missing parents, only for this user; check the owner of one that exists.

    The mode of an existing folder is left to its owner, except for folders inside the default one: these are closed to others.

    Raises:
        StoreError: another user owns it.
        OSError: it can't be made.
    """
    for missing in reversed([part for part in (folder, *folder.parents) if not part.exists()]):
        missing.mkdir(mode=_FOLDER_MODE, exist_ok=True)
    found = folder.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    check_owner(found, folder)
    if found.st_uid == os.geteuid() and folder.is_relative_to(default_cache_dir()):
        _tighten(folder, found, _FOLDER_MODE)


def open_private_file(path: Path, flags: int) -> int:
    """A file descriptor of a regular file of this user or root; a new file (``os.O_CREAT``) has mode 0600.

    An existing file of this user that others may read is closed to them where that is possible.

    Raises:
        StoreError: it is a link or no regular file, or another user owns it.
        OSError: it can't be opened.
    """
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, _FILE_MODE)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise StoreError(_NOT_REGULAR.format(path)) from error
        raise
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise StoreError(_NOT_REGULAR.format(path))
        check_owner(found, path)
        if found.st_uid == os.geteuid():
            _tighten(fd, found, _FILE_MODE)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock on a file, which the kernel releases with the process. Waiting can be interrupted.

    Raises:
        StoreError, OSError: as ``open_private_file``.
    """
    fd = open_private_file(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def check_owner(found: os.stat_result, path: Path) -> None:
    """Refuse a file or folder of another user.

    Raises:
        StoreError: neither this user nor root owns it.
    """
    if found.st_uid not in (os.geteuid(), _ROOT_USER):
        raise StoreError(
            f"{path} belongs to user {found.st_uid}, and this process runs as user {os.geteuid()}: allowed are files and "
            f"folders of one's own and root's. Choose another folder (cache_dir), or change the owner"
        )


def _tighten(path: Path | int, found: os.stat_result, mode: int) -> None:
    """Remove all permissions beyond ``mode``."""
    if stat.S_IMODE(found.st_mode) & ~mode:
        with contextlib.suppress(OSError):  # on a read-only volume, the mode stays
            os.chmod(path, mode)  # noqa: PTH101 - a file descriptor has no other way
