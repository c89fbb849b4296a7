"""The output of a job: a JSON line for each prompt. A job that goes on reads its earlier lines.

    {"line":3,"id":"a-1","text":" world","tokens":2,"reason":"stop","digest":"5c0ffee1-0123456789abcdef"}
    {"line":5,"choices":[{"text":" a","tokens":1,"reason":"length"},{...}],"digest":"5c0ffee1-13579bdf02468ace"}
    {"line":4,"error":"no such field: \"promt\"; allowed: ...","digest":"5c0ffee1-89abcdef01234567"}

A line is written with one call, when all choices of its prompt are done, so a killed job leaves whole lines, and at most one
torn line at the end, which the next start drops.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec

from cluster.job.prompts import LineIndex
from epslots.errors import ConfigError, EpslotsError
from epslots.generation.requests import TokenLogprobs

_BEGIN = b'{"line":'
# More than a text of a million tokens takes: a job writes no longer line.
_MAX_LINE_BYTES = 256 * 1024**2


class ChoiceResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The result of one choice of a prompt.

    Attributes:
        text: the new text; absent if the checkpoint has no tokenizer.
        tokens: number of new tokens.
        token_ids: the new tokens, if the prompt was given as token ids or there is no tokenizer.
        reason: "stop" (end token, stop string or the grammar's end) or "length" (``max_new_tokens``).
        logprobs: of each new token, if asked for: see ``compact_logprobs``.
        error: the reason why the choice wasn't served, in place of all others.
    """

    text: str | None = None
    tokens: int | None = None
    token_ids: tuple[int, ...] | None = None
    reason: str | None = None
    logprobs: Any = None
    error: str | None = None


class ResultLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The result of one prompt.

    Attributes:
        line: the prompt's line number, from 1.
        id: the prompt's own, if it has one; of a line with an error, as it was written.
        custom_id: of a line with an error, as it was written.
        text, tokens, token_ids, reason, logprobs: of the only choice: see ``ChoiceResult``.
        choices: each choice's result, in place of these, if there are several.
        prompt_logprobs: of the prompt's tokens from the second on, if asked for: see ``compact_logprobs``.
        error: the reason why the prompt wasn't served, in place of a result.
        digest: of the settings that change the text, and of the prompt's line.
    """

    line: int
    id: Any = None
    custom_id: Any = None
    text: str | None = None
    tokens: int | None = None
    token_ids: tuple[int, ...] | None = None
    reason: str | None = None
    logprobs: Any = None
    choices: tuple[ChoiceResult, ...] | None = None
    prompt_logprobs: Any = None
    error: str | None = None
    digest: str

    @property
    def failed(self) -> bool:
        """Whether the prompt, or one of its choices, wasn't served."""
        return self.error is not None or any(choice.error is not None for choice in self.choices or ())


def compact_logprobs(logprobs: Sequence[TokenLogprobs]) -> list[Any]:
    """Log-probabilities as lists: [token, its log-probability, [[likely token, its log-probability], ...]].

    The last part is there if the request asked for likely tokens. Numbers are rounded to six decimals; null is minus infinity.
    """
    return [
        [each.token, round(each.logprob, 6), *([[[token, round(other, 6)] for token, other in each.top]] if each.top else [])]
        for each in logprobs
    ]


def join_digest(settings: int, line: int) -> str:
    """A result's digest: of the settings (32 bits) and of the prompt's line (64 bits)."""
    return f"{settings:08x}-{line:016x}"


@dataclass(frozen=True)
class EarlierResults:
    """Result lines of earlier runs, those with errors, and dropped bytes of a torn line."""

    done: int = 0
    errors: int = 0
    torn_bytes: int = 0


class OutputLost(EpslotsError):
    """The output can no longer be written."""


class ResultFile:
    """The output, locked against other jobs while it is open.

    Raises:
        ConfigError: the file can't be opened, or another job writes to it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.exists() and not path.is_file():
            raise ConfigError(f"--output {path} is not a plain file: a job reads its results again when it goes on")
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise ConfigError(f"--output {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            if isinstance(error, BlockingIOError):
                message = f"--output {path}: another job is writing to it; wait for that, or give another file"
            else:
                message = f"--output {path} can't be locked against other jobs ({error.strerror}); give a file elsewhere"
            raise ConfigError(message) from error

    def resume(self, index: LineIndex, settings_digest: int) -> EarlierResults:
        """Mark lines of the index that have results as done; drop a torn last line.

        Raises:
            ConfigError: the file is not this job's: other lines, other prompts, or other settings. It is left unchanged.
        """
        done = errors = whole_bytes = torn_bytes = 0
        with open(self._path, "rb") as file:
            while data := file.readline(_MAX_LINE_BYTES):
                if not data.endswith(b"\n"):
                    self._check_torn(data, done)
                    torn_bytes = len(data)
                    break
                whole_bytes += len(data)
                errors += self._count(data, done + 1, index, settings_digest)
                done += 1
        if torn_bytes:
            os.ftruncate(self._file.fileno(), whole_bytes)
        return EarlierResults(done, errors, torn_bytes)

    def _count(self, data: bytes, row: int, index: LineIndex, settings_digest: int) -> bool:
        """Mark the line of one result as done; returns whether the result is an error."""
        try:
            result = _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._foreign(f"line {row} of it is no result of a job") from error
        settings, _, line = result.digest.partition("-")
        if settings != f"{settings_digest:08x}":
            raise self._foreign(
                f"line {row} of it was made with another model or other settings (max_new_tokens, temperature, ...)"
            )
        if not index.has(result.line) or line != f"{index.digest(result.line):016x}":
            raise self._foreign(f"line {row} of it answers another prompt than line {result.line} of the prompts is now")
        if index.is_done(result.line):
            raise self._foreign(f"line {row} of it answers line {result.line} of the prompts a second time")
        index.finish(result.line)
        return result.failed

    def _check_torn(self, data: bytes, row: int) -> None:
        """Refuse to drop the end of a file that no job wrote: a user's own file must not lose its last line."""
        written = data.rstrip(b"\0")  # a file system may leave zeros when the machine loses its power
        if len(data) == _MAX_LINE_BYTES or not (written.startswith(_BEGIN) or _BEGIN.startswith(written)):
            raise self._foreign(f"line {row + 1} of it is no result of a job")

    def _foreign(self, problem: str) -> ConfigError:
        return ConfigError(
            f"--output {self._path} is not this job's: {problem}. To go on with a job, start it with the prompts and settings "
            f"that it began with; for a new one give another file, or move this one away"
        )

    def append(self, result: ResultLine) -> None:
        """Write one result.

        Raises:
            OutputLost: the write failed; it may leave a torn line, which the next start drops.
        """
        rest = memoryview(_encoder.encode(result) + b"\n")
        try:
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        except OSError as error:
            raise OutputLost(f"--output {self._path} can't be written any more: {error.strerror}") from error

    def close(self) -> None:
        """Flush the file to the disk, and release its lock."""
        with contextlib.suppress(OSError):  # some files can't be synced
            os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(ResultLine)
