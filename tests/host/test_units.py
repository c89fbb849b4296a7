"""Sizes as people write them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from epslots.errors import ConfigError
from epslots.units import (
    SlotsSetting,
    format_bytes,
    format_count,
    parse_bytes,
    parse_count,
    parse_kv_tokens,
    parse_link,
    parse_prefetch,
    parse_slots,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GiB", 12 << 30), ("80 GB", 80 * 10**9), ("1.5kib", 1536), ("7B", 7), ("2TiB", 2 << 40), (" 3 MB ", 3_000_000)],
)
def test_sizes(text: str, size: int):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "12", "GiB", "-1GiB", "0GiB", "1 GiBs", "1e3MB", "many"])
def test_what_is_no_size_is_refused_with_what_would_be(text: str):
    with pytest.raises(ConfigError, match="give a number and a unit"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("value", "setting"),
    [
        (16, SlotsSetting(per_layer=16)),
        ("16", SlotsSetting(per_layer=16)),
        ("25%", SlotsSetting(share=0.25)),
        ("100 %", SlotsSetting(share=1.0)),
        ("12GiB", SlotsSetting(total_bytes=12 << 30)),
        ("auto", SlotsSetting()),
    ],
)
def test_slots(value: int | str, setting: SlotsSetting):
    assert parse_slots(value) == setting
    assert parse_slots(setting) is setting


@pytest.mark.parametrize(
    "value", [0, -3, "0", "-1", "0%", "-5%", "101%", "100.01%", "0GiB", "", "half", "25 percent", "1.5", 2.5, True, None]
)
def test_bad_slots_are_refused_with_what_is_allowed(value: object):
    with pytest.raises(ConfigError, match=r"slots") as caught:
        parse_slots(value)  # type: ignore[arg-type]
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "parse",
    [
        *(parse_bytes, parse_slots, parse_kv_tokens, parse_prefetch),
        *(lambda digits, unit=unit: parse_bytes(digits + unit) for unit in ("GiB", "B")),
        *(lambda digits, after=after: parse_link(digits + after) for after in ("GB/s", "us")),
        lambda digits: parse_link(f"8GB/s,{digits}us"),
        lambda digits: parse_slots(digits + "%"),
    ],
)
@pytest.mark.parametrize("digits", ["9" * 400, "9" * 5000])
def test_endless_numbers_are_refused_and_cut_short(digits: str, parse: Callable[[str], object]):
    """Python's int and float fail on them, each in its own way."""
    with pytest.raises(ConfigError) as caught:
        parse(digits)
    assert len(str(caught.value)) < 400


def test_numbers_that_no_memory_holds():
    for size in ("9000000TiB", "999999999999999999GiB"):
        with pytest.raises(ConfigError, match="is not a size"):
            parse_bytes(size)
    with pytest.raises(ConfigError, match="slots=<int>"):
        parse_slots(10**5000)
    assert (parse_count(" 12 "), parse_count("\u0665"), parse_count("-1"), parse_count("")) == (12, None, None, None)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (123 << 20, "123 MiB"),
        (12 << 30, "12 GiB"),
        (-2048, "-2 KiB"),
    ],
)
def test_sizes_for_people(size: int, text: str):
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999"), (3_532_864, "3.533 million"), (671 * 10**9, "671 billion"), (1_026_400_000_000, "1.026 trillion")],
)
def test_counts_for_people(count: int, text: str):
    assert format_count(count) == text
