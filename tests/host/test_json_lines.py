"""JSON lines as editors, other tools and other systems write them."""

from __future__ import annotations

import io
import json

import msgspec
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from epslots import json_lines
from epslots.errors import ConfigError
from epslots.json_lines import decode_line, decode_text, read_lines

BOM = b"\xef\xbb\xbf"


class Text(msgspec.Struct):
    prompt: str


def texts(data: bytes) -> list[str]:
    decoder = msgspec.json.Decoder(Text)
    return [decode_line(line, decoder, example="{}", needed={}).prompt for line in read_lines(io.BytesIO(data))]


# What str.splitlines takes for the end of a line, and other characters that tools trip over.
ODD = "\x0b\x0c\x1c\x1d\x1e\x7f\x85\u2028\u2029\ufeff\U0001f642"


@given(st.lists(st.text(st.sampled_from("ab\r\n\x00\t" + ODD)), max_size=6), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_every_string_comes_back_whole(prompts: list[str], end: str, ended: bool):
    rows = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    data = end.join(rows) + (end if ended and rows else "")
    assert texts(data.encode()) == texts(BOM + data.encode()) == prompts


def test_files_with_byte_order_marks_may_be_joined():
    assert texts(BOM + b'{"prompt": "a"}\n' + BOM + b'{"prompt": "b"}\n') == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"prompt": "a\xff"}', "not UTF-8 text: invalid start byte 0xff at byte 13"),
        ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8 text"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"prompt": "\x00"}', "not JSON"),
        (b'{"prompt": "a"}\x00', "not JSON"),
        (b'{"prompt": "a"}\r{"prompt": "b"}', "not JSON: trailing characters"),
        (b"\x00", "not JSON"),
        (b'{"prompt": "a", "x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    ],
)
def test_lines_that_are_none_are_refused_in_plain_words(data: bytes, message: str):
    with pytest.raises(ConfigError, match=message):
        texts(data)


def test_text_is_taken_as_it_is_but_for_the_mark():
    assert decode_text(BOM + ("a\r\n" + ODD).encode()) == "a\r\n" + ODD
    with pytest.raises(ConfigError, match="not UTF-8 text: invalid start byte 0xff at byte 1; save the file as UTF-8"):
        decode_text(b"a\xff")


def test_blank_lines_count_and_are_skipped():
    file = io.BytesIO(b'\xef\xbb\xbf{"a"}\r\n\n \t\r\n{"b"}\n\n{"c"}')
    assert [(line.number, line.data) for line in read_lines(file)] == [(1, b'{"a"}\r'), (4, b'{"b"}'), (6, b'{"c"}')]


def test_a_long_line_is_not_read_into_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_lines, "MOST_LINE_BYTES", 10)
    monkeypatch.setattr(json_lines, "_PART_BYTES", 3)
    data = b"0123456789\n" + b"x" * 25 + b"\n" + b"0123456789a"
    lines = list(read_lines(io.BytesIO(data)))
    assert [(line.number, line.data) for line in lines] == [(1, b"0123456789"), (2, None), (3, None)]
    assert lines[1].digest == xxhash.xxh3_64_intdigest(b"x" * 25 + b"\n")
    with pytest.raises(ConfigError, match="longer than"):
        decode_line(lines[1], msgspec.json.Decoder(Text), example="{}", needed={})
