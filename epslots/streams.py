"""Standard input, output and error in every state that a process has them: closed, None, or objects of another kind.

Daemons start without them, ``pythonw`` and notebooks replace them, a reader may close its end. All terminal checks and
messages of ``epslots`` and ``cluster`` go through this module.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from rich.console import Console


def is_terminal(stream: object) -> bool:
    """Whether a stream is an open terminal; False for None and for objects that can't tell."""
    try:
        return bool(cast(TextIO, stream).isatty())
    except (AttributeError, ValueError, OSError):  # no stream, a closed one, one without a descriptor
        return False


def say(text: str, stream: object = None) -> None:
    """Write a line to standard error, or to ``stream``. A line that can't be written is lost without an error."""
    target = sys.stderr if stream is None else cast(TextIO, stream)
    if target is not None:
        with contextlib.suppress(Exception):  # an object that isn't a file may raise anything
            print(text, file=target, flush=True)


def table_console(plain_width: int, *, stderr: bool = False) -> Console:
    """A rich console for tables; ``plain_width`` columns wide where it is no terminal, since a log has no width."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=plain_width)


class SafeStream(io.TextIOBase):
    """A stream of text in the place of standard output or error. It writes to any object that has ``write``, or to nothing.

    Args:
        inner: the process's own stream. Text is lost without an error if it is closed or has no ``write``.
        lossy: whether text is lost without an error, too, where writing fails.

    Attributes:
        failure: the latest error of writing; None if there was none.
    """

    def __init__(self, inner: object, *, lossy: bool) -> None:
        self._inner: Any = inner if hasattr(inner, "write") and not _is_closed(inner) else None
        self._lossy = lossy
        self.failure: OSError | None = None
        # A character that the encoding lacks is printed as its escape.
        if isinstance(self._inner, io.TextIOWrapper) and self._inner.errors in ("strict", "surrogateescape"):
            self._inner.reconfigure(errors="backslashreplace")

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._inner, "encoding", None) or "utf-8"

    def __getattr__(self, name: str) -> Any:  # libraries read other attributes: a buffer, a name
        return getattr(self._inner, name)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return is_terminal(self._inner)

    def fileno(self) -> int:
        if self._inner is None:
            raise io.UnsupportedOperation("fileno")
        number: int = self._inner.fileno()
        return number

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # libraries find out by this whether a stream takes text or bytes
            raise TypeError(f"a stream of text takes str, not {type(text).__name__}")
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, name: str, *arguments: str) -> None:
        method = getattr(self._inner, name, None)
        if method is None or _is_closed(self._inner):
            return
        try:
            method(*arguments)
        except Exception as error:  # an object that isn't a file may raise anything: TypeError, because it takes bytes
            self.failure = error if isinstance(error, OSError) else OSError(errno.EIO, f"{type(error).__name__}: {error}")
            self._drop()
            if not self._lossy:
                raise self.failure from error

    def _drop(self) -> None:
        """Let later flushes succeed: Python's own at exit would print its failure, and change the exit code."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._inner.fileno())
            os.close(null)


@contextlib.contextmanager
def usable_streams() -> Iterator[SafeStream]:
    """Make standard streams in any state usable for a command. Yields standard output.

    Closed descriptors 0 to 2 are opened first: the next file would get their number, and messages that libraries write to
    standard error would end up in that file.
    """
    for descriptor, mode in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            taken = os.open(os.devnull, mode)  # gets the lowest free number
            os.set_inheritable(taken, True)  # child processes need standard streams, too
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = output, errors = SafeStream(sys.stdout, lossy=False), SafeStream(sys.stderr, lossy=True)
    try:
        yield output
    finally:
        errors.flush()
        sys.stdout, sys.stderr = before


def read_input(most_bytes: int) -> bytes:
    """The bytes of standard input, up to ``most_bytes`` + 1; empty if there is none.

    Raises:
        OSError: it can't be read.
    """
    read = getattr(getattr(sys.stdin, "buffer", sys.stdin), "read", None)
    if read is None or _is_closed(sys.stdin):
        return b""
    found = read(most_bytes + 1) or b""  # a non-blocking descriptor without data gives None
    return found.encode("utf-8", "surrogatepass") if isinstance(found, str) else bytes(found)


def _is_closed(stream: object) -> bool:
    return bool(getattr(stream, "closed", False))
