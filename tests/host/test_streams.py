"""Standard streams that are closed, None, full, without a reader, or objects of another kind."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from cluster.job.progress import Counts, JobProgress
from epslots.progress import ProgressDisplay, StartDisplay, counting
from epslots.streams import SafeStream, is_terminal, read_input, say, usable_streams

Run = Callable[..., tuple[int, str, str]]


class WriteOnly:
    """A program's replacement of a stream, with one method."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


class Waiting(io.BytesIO):
    """A descriptor that doesn't block, and has nothing yet."""

    def read(self, size: int | None = None) -> bytes:
        return None  # type: ignore[return-value]


class Failing(io.StringIO):
    def __init__(self, number: int) -> None:
        super().__init__()
        self._error = OSError(number, os.strerror(number))

    def write(self, text: str) -> int:
        raise self._error


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def no_streams() -> list[Any]:
    return [None, closed(), object(), WriteOnly(), Failing(errno.EPIPE), Failing(errno.ENOSPC), io.BytesIO()]


NUMBERS = pytest.mark.parametrize("number", range(7))


@NUMBERS
def test_what_is_no_terminal_is_none_and_takes_messages(number: int, monkeypatch: pytest.MonkeyPatch):
    stream = no_streams()[number]
    assert not is_terminal(stream)
    say("a message", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    say("a message")
    assert "a message" in getattr(stream, "text", "a message")
    with counting("work", 3) as advance, ProgressDisplay()("work", 3) as advance_bytes:
        advance(1)
        advance_bytes(1)
    display = StartDisplay()
    display.stage("starting")
    display.close()
    progress = JobProgress(Counts(total=2, before=0, errors_before=0))
    progress.start()
    progress.warn("a line")
    progress.finish("done")


def test_a_terminal_is_one():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert is_terminal(Terminal())
    assert SafeStream(Terminal(), lossy=False).isatty()


@NUMBERS
@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_commands_run_on_any_streams(name: str, number: int, run: Run, monkeypatch: pytest.MonkeyPatch):
    """A command that prints a table, one that prints lines, and one that reads standard input and refuses it."""
    for arguments, code in ((["plan", "--slots", "4"], 0), (["plan", "--slots", "4", "--json"], 0), (["generate"], 2)):
        stream = no_streams()[number]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO())
            patch.setattr(sys, name, stream)
            got, out, err = run(*arguments)
        assert "Traceback" not in err
        fails = name == "stdout" and code == 0 and isinstance(stream, Failing | io.BytesIO)
        assert got == ({4: 1, 5: 2, 6: 2}[number] if fails else code)
        if fails:
            reason = {5: "No space left on device", 6: "TypeError: a bytes-like object is required, not 'str'"}
            assert err == ("" if number == 4 else f"error: standard output can't be written: {reason[number]}\n")
        elif isinstance(stream, WriteOnly):
            if name == "stderr" and code == 0:
                assert stream.text.startswith("fits: ")  # not with the table, which a program may read
            else:
                assert bool(stream.text) == (name == ("stdout" if code == 0 else "stderr"))
        elif code == 0 and name != "stdout":
            assert out
        elif code == 2 and name != "stderr":
            assert err.startswith("error: an empty prompt")


def test_characters_that_the_encoding_lacks_are_escaped():
    raw = io.BytesIO()
    output = SafeStream(io.TextIOWrapper(raw, encoding="latin-1"), lossy=False)
    print("caf\u00e9 \u2713", file=output, flush=True)
    assert raw.getvalue() == b"caf\xe9 \\u2713\n"


def test_messages_are_lost_where_results_fail():
    errors, output = (SafeStream(Failing(errno.ENOSPC), lossy=lossy) for lossy in (True, False))
    print("a message", file=errors, flush=True)
    with pytest.raises(OSError, match="No space left"):
        print("a result", file=output)
    assert errors.failure is not None
    assert output.failure is not None


@pytest.mark.parametrize(
    ("kind", "code", "message"), [("full", 2, "standard output can't be written: No space left"), ("left", 1, "")]
)
def test_an_output_that_takes_nothing_is_one_line(kind: str, code: int, message: str):
    """Also at the interpreter's own last flush."""
    if kind == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, descriptor = os.pipe()
        os.close(reader)
    command = [sys.executable, "-m", "epslots", "--version"]
    done = subprocess.run(command, stdout=descriptor, stderr=subprocess.PIPE, check=False, text=True)
    os.close(descriptor)
    assert done.returncode == code
    assert done.stderr.startswith(f"error: {message}" if message else "")
    assert len(done.stderr.splitlines()) == bool(message)


@pytest.mark.parametrize("given", [io.StringIO("a\u2713"), io.BytesIO("a\u2713".encode()), None, closed(), object()])
def test_standard_input_of_any_kind(given: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", given)
    expected = "a\u2713".encode() if hasattr(given, "read") and not given.closed else b""
    assert read_input(100) == expected
    if expected:
        given.seek(0)
        assert len(read_input(1)) >= 2, "one more than allowed, so that it is noticed"


def test_standard_input_that_does_not_block(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", Waiting())
    assert read_input(100) == b""


def test_the_streams_come_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", None)
    with usable_streams():
        print("lost")
    assert sys.stdout is None


CLOSED = """
import itertools, json, os, sys

def run(closed):
    for number in closed:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)  # as Python starts then
    sys.argv = ["epslots", "generate"]
    from epslots.cli import main
    try:
        main()
    except SystemExit as end:
        taken = open(sys.executable, "rb").fileno()
        inherited = all(map(os.get_inheritable, range(3)))  # what it starts needs them too
        os.write(report, json.dumps([end.code, taken, inherited]).encode())
    finally:
        os._exit(0)

import epslots.cli
found = {}
for closed in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in range(4)):
    reader, report = os.pipe()
    if not os.fork():
        run(closed)
    os.close(report)
    found["".join(map(str, closed))] = json.loads(os.read(reader, 1000) or b"null")
    os.close(reader)
    os.wait()
print(json.dumps(found))
"""


def test_descriptors_that_are_closed_are_taken():
    """A file that is opened later must not be what libraries take for standard error."""
    done = subprocess.run([sys.executable, "-c", CLOSED], stdin=subprocess.DEVNULL, capture_output=True, check=True, text=True)
    found = json.loads(done.stdout)
    assert len(found) == 8
    assert {code for code, _, _ in found.values()} == {2}
    assert min(taken for _, taken, _ in found.values()) > 2
    assert all(inherited for _, _, inherited in found.values())
    assert done.stderr.count("error: an empty prompt") == 4, "where standard error is open"
    assert "Traceback" not in done.stderr
