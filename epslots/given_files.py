"""Files that a user names.

They are opened without waiting for a writer, read up to a bound, and written whole or not at all.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from epslots.errors import ConfigError
from epslots.units import format_bytes


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file open for reading. A FIFO or a device, which may have no beginning or no end, is refused.

    Raises:
        ConfigError: it is no regular file.
        OSError: it can't be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(f"{os.fspath(path)} is no regular file; give one that is")
    with open(fd, "rb") as file:
        yield file


def read_given(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """A file's content.

    Raises:
        ConfigError: it is no regular file, or larger than allowed.
        OSError: it can't be read.
    """
    with open_regular(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ConfigError(f"{os.fspath(path)} is too large; allowed: {format_bytes(most_bytes)}")
    return content


@contextmanager
def write_whole(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write, which appears at ``path`` if the block ends without an error.

    Raises:
        ConfigError: it can't be written.
    """
    target = Path(path)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        temporary.replace(target)
    except OSError as error:
        raise ConfigError(f"{target} can't be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
