"""Files of JSON lines: reading them line by line, and explaining a wrong line in plain words.

A line ends with a line feed and nothing else: U+2028, U+0085 and the like are characters of a JSON string. Lines are
identified by number, from 1 with blank ones counted, and by a digest of their bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

import msgspec
import xxhash

from epslots.errors import ConfigError
from epslots.units import format_bytes

MOST_LINE_BYTES = 16 * 1024**2
_PART_BYTES = 1024**2
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors put it before UTF-8; joined files have it in the middle

T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """A line that isn't blank. ``data`` is None if it is too long."""

    number: int
    digest: int
    data: bytes | None


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """The lines of a file that aren't blank, one at a time. At most ``MOST_LINE_BYTES`` of a line are in memory."""
    number = 0
    while data := file.readline(MOST_LINE_BYTES + 1):
        number += 1
        if len(data) > MOST_LINE_BYTES and not data.endswith(b"\n"):
            yield Line(number, _digest_rest(data, file), None)
            continue
        data = data.removesuffix(b"\n").removeprefix(_BYTE_ORDER_MARK)
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


def decode_text(data: bytes) -> str:
    """The text of bytes, without a byte order mark.

    Raises:
        ConfigError: they are not UTF-8; names the place.
    """
    try:
        return data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as wrong:
        place = f"{wrong.reason} 0x{wrong.object[wrong.start]:02x} at byte {wrong.start}"
        raise ConfigError(f"not UTF-8 text: {place}; save the file as UTF-8") from wrong


def decode_line(line: Line, decoder: msgspec.json.Decoder[T], *, example: str, needed: Mapping[str, str]) -> T:
    """The object of a line.

    Args:
        decoder: of a msgspec.Struct.
        example: a correct line, for messages.
        needed: allowed values of fields, by name, where msgspec's own words are unclear.

    Raises:
        ConfigError: the line is wrong; names the mistake, and what is allowed.
    """
    if line.data is None:
        raise ConfigError(f"the line is longer than {format_bytes(MOST_LINE_BYTES)}, the most that is read")
    try:
        return decoder.decode(line.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        decode_text(line.data)
        allowed = ", ".join(getattr(decoder.type, "__struct_fields__", ()))
        raise ConfigError(_explain(line.data, error, f"an object such as {example}", needed, allowed)) from error


_WRONG_TYPE = re.compile(
    r"Expected `(?P<expected>[^`]+)`, got `(?P<got>[^`]+)`(?: - at (?P<key>`key` in )?`\$\.?(?P<place>[^`]*)`)?"
)
_WORDS = {
    "str": "text",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def _explain(data: bytes, error: Exception, wanted: str, needed: Mapping[str, str], allowed: str) -> str:
    """The mistake that msgspec found, in words for the author of the line."""
    message = str(error)
    if isinstance(error, RecursionError):
        return f"its lists or objects are nested too deep; a line is {wanted}"
    if not isinstance(error, msgspec.ValidationError):
        if "truncated" in message:
            surrogate = re.search(rb"\\u[dD][89a-fA-F]", data)
            message = "it ends too early" + (", or holds half of a surrogate pair, which is no character" if surrogate else "")
        return f"not JSON: {message.removeprefix('JSON is malformed: ')}; a line is {wanted}"
    if wrong_type := _WRONG_TYPE.match(message):
        expected, got = (
            " or ".join(_WORDS.get(name, name) for name in wrong_type[part].split(" | ")) for part in ("expected", "got")
        )
        place = wrong_type["place"]
        if not place:
            return f"{got}; a line is {wanted}"
        if wrong_type["key"]:
            return f'"{place}": keys that stand for {expected} are needed'
        return f'"{place}": {needed.get(place, expected)} is needed, and not {got}'
    if missing := re.match(r"Object missing required field `(.+)`", message):
        return f'no "{missing[1]}" in the object; a line is {wanted}'
    if unknown := re.match(r"Object contains unknown field `(.+)`", message):
        return f'no such field: "{unknown[1]:.100}"; allowed: {allowed}'
    return message.replace("$.", "").replace("`", '"')
