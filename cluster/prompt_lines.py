"""The prompts of a job: a file of JSON lines, read line by line as bytes, and what is wrong with a line in plain words.

    {"prompt": "text"}
    {"prompt": [5, 6, 7], "id": "a-1", "max_new_tokens": 64, "temperature": 0.7, "seed": 1}

A line is known by its number, from 1, blank ones counted; and by a digest of its bytes, which tells whether the file has
changed since the line was served.
"""

from __future__ import annotations

import re
import stat
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import xxhash
from msgspec import UNSET, UnsetType

from epslots.errors import ConfigError
from epslots.units import format_bytes

MOST_LINE_BYTES = 16 * 1024**2
_PART_BYTES = 1024**2
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # what some editors put before UTF-8


class PromptLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt: ``id`` comes back with its result, the others are ``GenerationSettings``, over those of the job."""

    prompt: str | tuple[int, ...]
    id: str | int | None = None
    max_new_tokens: int | UnsetType = UNSET
    temperature: float | UnsetType = UNSET
    top_k: int | UnsetType = UNSET
    top_p: float | UnsetType = UNSET
    seed: int | UnsetType = UNSET
    stop: str | tuple[str, ...] | UnsetType = UNSET
    stop_tokens: tuple[int, ...] | UnsetType | None = UNSET
    chat: bool | UnsetType | None = UNSET

    def request(self) -> dict[str, Any]:
        """What a cluster is asked for."""
        given = msgspec.structs.asdict(self)
        return {name: value for name, value in given.items() if value is not UNSET and name != "id"}


@dataclass(frozen=True)
class Line:
    """A line that isn't blank. ``data`` is None if it is too long."""

    number: int
    digest: int
    data: bytes | None


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """The lines of a file that aren't blank; only one is in memory at a time, and at most ``MOST_LINE_BYTES`` of it."""
    number = 0
    while data := file.readline(MOST_LINE_BYTES + 1):
        number += 1
        if len(data) > MOST_LINE_BYTES and not data.endswith(b"\n"):
            yield Line(number, _digest_rest(data, file), None)
            continue
        data = data.removesuffix(b"\n")
        if number == 1:
            data = data.removeprefix(_BYTE_ORDER_MARK)
        if data.strip():
            yield Line(number, xxhash.xxh3_64_intdigest(data), data)


def _digest_rest(begin: bytes, file: BinaryIO) -> int:
    """Read a long line to its end, in parts."""
    digest = xxhash.xxh3_64(begin)
    while part := file.readline(_PART_BYTES):
        digest.update(part)
        if part.endswith(b"\n"):
            break
    return digest.intdigest()


@dataclass
class LineIndex:
    """Every line of a prompts file in nine bytes: its digest, and whether it is to be done."""

    _digests: array[int] = field(default_factory=lambda: array("Q"))
    _states: bytearray = field(default_factory=bytearray)
    total: int = 0
    """Lines that aren't blank."""
    done: int = 0

    def add(self, line: Line) -> None:
        """Append a line, and blank ones before it."""
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
        """Whether there is such a line, and it isn't blank."""
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
        ConfigError: it can't be read, or is none that can be read again.
    """
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path.open("rb")
    except OSError as error:
        raise ConfigError(f"--prompts {path}: {error.strerror}") from error
    raise ConfigError(f"--prompts {path} is not a plain file: a job reads its prompts again when it goes on")


def index_lines(path: Path) -> LineIndex:
    """Read a prompts file once, to know how much there is to do.

    Raises:
        ConfigError: it can't be read.
    """
    index = LineIndex()
    with open_prompts(path) as file:
        for line in read_lines(file):
            index.add(line)
    return index


_decoder = msgspec.json.Decoder(PromptLine)


def decode_line(line: Line) -> PromptLine:
    """The prompt of a line.

    Raises:
        ConfigError: what is wrong with it, and what is allowed.
    """
    if line.data is None:
        raise ConfigError(f"the line is longer than {format_bytes(MOST_LINE_BYTES)}, the most that is read")
    try:
        return _decoder.decode(line.data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(_explain(line.data, error)) from error


_WRONG_TYPE = re.compile(r"Expected `(?P<expected>[^`]+)`, got `(?P<got>[^`]+)`(?: - at `\$\.?(?P<place>[^`]*)`)?")
_WORDS = {
    "str": "text",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_PROMPT = 'an object such as {"prompt": "text"}'


def _explain(data: bytes, error: Exception) -> str:
    """What msgspec complains of, in words for whoever wrote the line."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as wrong:
        return f"not UTF-8 text: {wrong.reason} 0x{data[wrong.start]:02x} at byte {wrong.start}; save the file as UTF-8"
    message = str(error)
    if not isinstance(error, msgspec.ValidationError):
        if "truncated" in message:
            surrogate = re.search(rb"\\u[dD][89a-fA-F]", data)
            message = "it ends too early" + (", or holds half of a surrogate pair, which is no character" if surrogate else "")
        return f"not JSON: {message.removeprefix('JSON is malformed: ')}; a line is {_PROMPT}"
    if wrong_type := _WRONG_TYPE.match(message):
        expected, got = (
            " or ".join(_WORDS.get(name, name) for name in wrong_type[part].split(" | ")) for part in ("expected", "got")
        )
        place = wrong_type["place"]
        if not place:
            return f"{got}; a line is {_PROMPT}"
        if place == "prompt":
            expected = "text or a list of token ids"
        return f'"{place}": {expected} is needed, and not {got}'
    if missing := re.match(r"Object missing required field `(.+)`", message):
        return f'no "{missing[1]}" in the object; a line is {_PROMPT}'
    if unknown := re.match(r"Object contains unknown field `(.+)`", message):
        return f'no such field: "{unknown[1]:.100}"; allowed: {", ".join(PromptLine.__struct_fields__)}'
    return message.replace("$.", "").replace("`", '"')
