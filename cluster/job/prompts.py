"""The prompts of a job: a file of JSON lines (``epslots/generation/prompt_line.py``), and an index of the lines that are done.

A line's digest shows whether the file was changed since the line was served.
"""

from __future__ import annotations

import json
import stat
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from msgspec import Raw

from epslots.errors import ConfigError
from epslots.json_lines import Line, read_lines


@dataclass
class LineIndex:
    """Every line of a prompts file in nine bytes: its digest, and its state (blank, to do, done)."""

    _digests: array[int] = field(default_factory=lambda: array("Q"))
    _states: bytearray = field(default_factory=bytearray)
    total: int = 0
    """Lines that aren't blank."""
    done: int = 0

    def add(self, line: Line) -> None:
        """Append a line, and the blank lines before it."""
        gap = line.number - 1 - len(self._states)
        self._digests.extend([0] * gap)
        self._states.extend([_BLANK] * gap)
        self._digests.append(line.digest)
        self._states.append(_TO_DO)
        self.total += 1

    @property
    def last(self) -> int:
        """Number of the last line that isn't blank."""
        return len(self._states)

    def has(self, number: int) -> bool:
        """Whether a line of this number exists and isn't blank."""
        return 1 <= number <= len(self._states) and self._states[number - 1] != _BLANK

    def digest(self, number: int) -> int:
        return self._digests[number - 1]

    def is_done(self, number: int) -> bool:
        return self._states[number - 1] == _DONE

    def finish(self, number: int) -> None:
        """Note that a line was served."""
        assert self._states[number - 1] == _TO_DO, "no line is served twice"
        self._states[number - 1] = _DONE
        self.done += 1


_BLANK, _TO_DO, _DONE = range(3)


def open_prompts(path: Path) -> BinaryIO:
    """Open a prompts file.

    Raises:
        ConfigError: the file can't be read, or not a second time, as a pipe can't.
    """
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path.open("rb")
    except OSError as error:
        raise ConfigError(f"--prompts {path}: {error.strerror}") from error
    raise ConfigError(f"--prompts {path} is not a plain file: a job reads its prompts again when it goes on")


def index_lines(path: Path) -> LineIndex:
    """An index of a prompts file, which is read through once.

    Raises:
        ConfigError: the file can't be read.
    """
    index = LineIndex()
    with open_prompts(path) as file:
        try:
            for line in read_lines(file):
                index.add(line)
        except OSError as error:
            raise ConfigError(f"--prompts {path}: {error.strerror}") from error
    return index


_NAMES = ("id", "custom_id")
_fields_decoder = msgspec.json.Decoder(dict[str, Raw])


def read_names(line: Line) -> dict[str, Raw]:
    """The ``id`` and ``custom_id`` of a refused line, as they were written; none of a line that is no object.

    They may be text, numbers or truth values. Lists, objects and null name nothing.
    """
    try:
        fields: dict[str, Any] = _fields_decoder.decode(line.data or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        fields = _lenient_fields(line.data or b"")
    return {name: Raw(fields[name]) for name in _NAMES if name in fields and _is_name(bytes(fields[name]))}


def _lenient_fields(data: bytes) -> dict[str, bytes]:
    """The fields of an object in Python's JSON, which has NaN and halves of surrogate pairs."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return {name: json.dumps(fields[name]).encode() for name in _NAMES if name in fields} if isinstance(fields, dict) else {}


def _is_name(written: bytes) -> bool:
    try:
        return msgspec.json.decode(written, type=str | int | float | bool) is not None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
