"""Prompts as people write them, and what they are told."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from cluster.job.prompts import LineIndex, index_lines
from epslots.errors import ConfigError
from epslots.generation.prompt_line import PromptLine, decode_prompt
from epslots.generation.settings import GenerationSettings
from epslots.json_lines import Line, read_lines


def line_of(data: bytes) -> Line:
    return Line(1, xxhash.xxh3_64_intdigest(data), data)


def test_a_line_may_have_an_id_and_all_settings():
    line = b'{"prompt": "x", "id": "a", "max_new_tokens": 3, "temperature": 1, "seed": 4, "stop": ["b"], "stop_tokens": [1]}'
    prompt = decode_prompt(line_of(line))
    assert prompt.id == "a"
    assert prompt.request() == {
        "prompt": "x", "max_new_tokens": 3, "temperature": 1.0, "seed": 4, "stop": ("b",), "stop_tokens": (1,),
    }  # fmt: skip
    assert decode_prompt(line_of(b'{"prompt": [5, 6]}')).request() == {"prompt": (5, 6)}
    assert decode_prompt(line_of(b'{"prompt": "x", "chat": null, "id": 7}')).request() == {"prompt": "x", "chat": None}
    assert decode_prompt(line_of(b'{"prompt": "x", "logit_bias": {"5": -100}, "json_schema": {"a": [1]}}')).request() == {
        "prompt": "x", "logit_bias": {5: -100.0}, "json_schema": {"a": [1]},
    }  # fmt: skip


def test_lines_know_the_settings_of_a_cluster():
    assert PromptLine.__struct_fields__ == ("prompt", "id", *GenerationSettings.__struct_fields__)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xfe", "not UTF-8 text: invalid start byte 0xff at byte 0; save the file as UTF-8"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8 text: invalid continuation byte 0xe9 at byte 15"),
        (b"{oops", "not JSON: object keys must be strings (byte 1)"),
        (b'{"prompt": "x"', 'not JSON: it ends too early; a line is an object such as {"prompt": "text"}'),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"prompt": "x"} {"prompt": "y"}', "not JSON: trailing characters (byte 17)"),
        (b'{"prompt": "x", "temperature": NaN}', "not JSON: invalid character"),
        (b'["x"]', 'a list; a line is an object such as {"prompt": "text"}'),
        (b'"x"', "text; a line is an object"),
        (b'{"text": "x"}', 'no such field: "text"; allowed: prompt, id, max_new_tokens, min_tokens, n, stop'),
        (b'{"id": 1}', 'no "prompt" in the object'),
        (b'{"prompt": 3}', '"prompt": text or a list of token ids is needed, and not an integer'),
        (b'{"prompt": null}', "and not null"),
        (b'{"prompt": [1.5]}', '"prompt[0]": an integer is needed, and not a number'),
        (b'{"prompt": "x", "id": true}', '"id": an integer or text or null is needed, and not true or false'),
        (b'{"prompt": "x", "max_new_tokens": "7"}', '"max_new_tokens": an integer is needed, and not text'),
        (b'{"prompt": "x", "stop": [1]}', '"stop[0]": text is needed, and not an integer'),
        (b'{"prompt": "x", "logit_bias": {"a": 1}}', '"logit_bias": keys that stand for an integer are needed'),
        (b'{"prompt": "x", "json_schema": 3}', '"json_schema": true or false or text or an object or null is needed'),
        (b'{"prompt": "x", "temperature": 1e999}', "out of range"),
        (b'{"prompt":' + b"[" * 100_000, "is needed, and not a list"),
    ],
)
def test_what_is_wrong_is_said_in_plain_words(data: bytes, message: str):
    with pytest.raises(ConfigError) as caught:
        decode_prompt(line_of(data))
    assert message in str(caught.value)
    assert "`" not in str(caught.value)
    assert "$" not in str(caught.value)


@given(st.binary(max_size=40) | st.binary(max_size=20).map(lambda inside: b'{"prompt": "' + inside + b'"}'))
def test_no_bytes_raise_anything_else(data: bytes):
    with contextlib.suppress(ConfigError):
        assert isinstance(decode_prompt(line_of(data)), PromptLine)


@given(st.lists(st.sampled_from([b"", b"  ", b"x", b"yy" * 9]), max_size=12), st.booleans())
def test_an_index_has_each_line_that_is_not_blank(rows: list[bytes], ended: bool):
    data = b"\n".join(rows) + (b"\n" if ended and rows else b"")
    index = LineIndex()
    for line in read_lines(io.BytesIO(data)):
        index.add(line)
    expected = {number for number, row in enumerate(rows, start=1) if row.strip()}
    assert {number for number in range(-1, len(rows) + 2) if index.has(number)} == expected
    assert index.total == len(expected)
    for number in expected:
        assert index.digest(number) == xxhash.xxh3_64_intdigest(rows[number - 1])
        assert not index.is_done(number)
        index.finish(number)
        assert index.is_done(number)
    assert index.done == index.total


def test_prompts_that_cannot_be_read():
    with pytest.raises(ConfigError, match="--prompts /proc/self/mem: Input/output error"):
        index_lines(Path("/proc/self/mem"))  # whose first page isn't there


def test_prompts_must_be_a_file_that_can_be_read_again(tmp_path: Path):
    with pytest.raises(ConfigError, match="No such file"):
        index_lines(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="not a plain file"):
        index_lines(tmp_path)
    with pytest.raises(ConfigError, match="not a plain file"):
        index_lines(Path("/dev/null"))
