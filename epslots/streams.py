"""Standard input, output and error as a process really has them: closed, None, or objects of another kind.

A daemon starts without them, ``pythonw`` and notebooks replace them, a reader may close its end. All of ``epslots`` and
``cluster`` asks here whether a stream is a terminal, and writes messages from here.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO, cast

from rich.console import Console


def is_terminal(stream: object) -> bool:
    """Whether a stream is an open terminal; False for None and for objects that can't tell."""
    try:
        return bool(cast(TextIO, stream).isatty())
    except (AttributeError, ValueError, OSError):  # no stream, a closed one, one without a descriptor
        return False


def say(text: str, stream: object = None) -> None:
    """Write a line to standard error, or to ``stream``. It is lost if that can't be written: work goes on without a reader."""
    target = _output(sys.stderr if stream is None else stream)
    if target is not None:
        with contextlib.suppress(OSError, ValueError):
            target.write(text + "\n")
            target.flush()


def table_console(plain_width: int, *, stderr: bool = False) -> Console:
    """A console for tables, ``plain_width`` columns wide where it is no terminal: a log has no width of its own."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=plain_width)


@contextlib.contextmanager
def usable_streams() -> Iterator[tuple[TextIO, TextIO]]:
    """Let the commands of a process read, print and flush whatever its standard streams are.

    What can't be read is empty, and what can't be written is lost. A character that the output's encoding lacks is printed as
    its escape. Closed descriptors 0 to 2 are taken first: the next file that is opened would get their number, and what
    libraries write to standard error would end up in it.

    Yields:
        Standard output and standard error.
    """
    for descriptor, mode in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, mode)  # gets the lowest free number
    before = sys.stdin, sys.stdout, sys.stderr
    with open(os.devnull, encoding="utf-8") as empty, open(os.devnull, "w", encoding="utf-8") as sink:
        sys.stdin = before[0] if hasattr(before[0], "read") and not _is_closed(before[0]) else empty
        sys.stdout, sys.stderr = streams = _escaping(_output(before[1]) or sink), _escaping(_output(before[2]) or sink)
        try:
            yield streams
        finally:
            sys.stdin, sys.stdout, sys.stderr = before


def flush_output(output: TextIO, errors: TextIO) -> OSError | None:
    """Write out what was printed; returns why ``output`` can't be written. What is left then is dropped, so that Python's own
    flush at the end says nothing.
    """
    failed: dict[TextIO, OSError] = {}
    for stream in (output, errors):
        try:
            if not _is_closed(stream):
                stream.flush()
        except OSError as error:
            failed[stream] = error
            _drop(stream)
    return failed.get(output)


def read_input(most_bytes: int) -> bytes:
    """Standard input, up to ``most_bytes`` and one; empty if there is none.

    Raises:
        OSError: it can't be read.
    """
    read = getattr(getattr(sys.stdin, "buffer", sys.stdin), "read", None)
    if read is None or _is_closed(sys.stdin):
        return b""
    found = read(most_bytes + 1)
    return found.encode("utf-8", "surrogatepass") if isinstance(found, str) else bytes(found)


class _WriteOnly(io.TextIOBase):
    """A text stream over an object with ``write`` and little else."""

    def __init__(self, inner: object) -> None:
        self._inner = cast(TextIO, inner)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._inner.write(text)
        return len(text)

    def flush(self) -> None:
        flush = getattr(self._inner, "flush", None)
        if flush is not None:
            flush()


def _output(stream: object) -> TextIO | None:
    """A stream to write text to; None if that is impossible."""
    if not hasattr(stream, "write") or _is_closed(stream):
        return None
    whole = all(hasattr(stream, name) for name in ("flush", "isatty", "encoding"))
    return cast(TextIO, stream if whole else _WriteOnly(stream))


def _escaping(stream: TextIO) -> TextIO:
    if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="backslashreplace")
    return stream


def _is_closed(stream: object) -> bool:
    return bool(getattr(stream, "closed", False))


def _drop(stream: TextIO) -> None:
    """Let the interpreter's last flush succeed: it would say that it fails, and change the exit code."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
