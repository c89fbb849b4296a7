"""Placements: their rules, their messages, and what is left of one when ranks are lost or join."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epslots.errors import ConfigError
from epslots.placement.placement import Placement, carry_over, default_placement, pack, unpack
from epslots.placement.placement_file import read_placement, write_placement
from tests.support.plan_strategies import random_placement


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    layers, ranks = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    experts_L = np.array(draw(st.lists(st.integers(1, 12), min_size=layers, max_size=layers)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    quota_LR = generator.integers(1, experts_L[:, None] + 1, (layers, ranks))
    return random_placement(generator, default_placement(experts_L.tolist(), quota_LR))


def assert_equal(one: Placement, other: Placement) -> None:
    own = np.arange(one.home_LE.shape[1]) < one.num_experts_L[:, None]
    assert one.version == other.version
    for name in ("num_experts_L", "wanted_LRE", "quota_LR"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert np.array_equal(one.home_LE[own], other.home_LE[own])


@given(placements())
def test_a_message_brings_the_same_placement(placement: Placement):
    assert_equal(unpack(pack(placement)), placement)


@given(placements(), st.data())
def test_a_damaged_message_is_refused(placement: Placement, data: st.DataObject):
    message = bytearray(pack(placement))
    position = data.draw(st.integers(0, len(message) - 1))
    message[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = unpack(bytes(message))
    except ConfigError:
        return
    # The few bits outside of the arrays: other numbers of the same sizes, which make a sound placement all the same.
    found.check()
    assert found.version != placement.version or found.num_experts_L.tolist() != placement.num_experts_L.tolist()


@pytest.mark.parametrize("message", [b"", b"\x90", b"not a placement", pack(default_placement([3], np.array([[1]])))[:-3]])
def test_what_is_no_placement_is_refused(message: bytes):
    with pytest.raises(ConfigError):
        unpack(message)


@given(placements(), st.data())
@settings(max_examples=60)
def test_what_is_carried_over_is_sound_and_keeps_what_stays(placement: Placement, data: st.DataObject):
    ranks = data.draw(st.integers(1, 6))
    places = data.draw(st.permutations(range(max(ranks, placement.ranks))))
    rank_of_old = [place if place < ranks else -1 for place in places[: placement.ranks]]
    generator = np.random.default_rng(data.draw(st.integers(0, 999)))
    quota_LR = generator.integers(1, placement.num_experts_L[:, None] + 1, (len(placement.num_experts_L), ranks))
    for old, new in enumerate(rank_of_old):
        if new >= 0:
            quota_LR[:, new] = placement.quota_LR[:, old]
    carried = carry_over(placement, rank_of_old, quota_LR)
    carried.check()
    assert carried.version == placement.version + 1 and carried.ranks == ranks
    for old, new in enumerate(rank_of_old):
        if new >= 0:
            assert np.array_equal(carried.wanted_LRE[:, new], placement.wanted_LRE[:, old])
            at_home = placement.home_LE == old
            assert (carried.home_LE[at_home] == new).all(), "an expert stays at home where its home stays"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"home_LE": np.array([[0, 2, 1]])}, "a home outside of ranks 0 to 1"),
        ({"home_LE": np.array([[0, 1, 1]])}, "none at its home"),
        ({"quota_LR": np.array([[2, 0]])}, "slots below 1"),
        ({"quota_LR": np.array([[4, 1]])}, "above its experts"),
        ({"quota_LR": np.array([[1, 1]])}, "more wanted copies on a rank than slots"),
        ({"quota_LR": np.array([[1, 1, 1]])}, "arrays must agree"),
        ({"num_experts_L": np.array([2])}, "widest 3"),
        ({"home_LE": np.array([[0, 0, 1]], np.int32)}, "home are int32; allowed: int64"),
    ],
)
def test_rules(change: dict[str, np.ndarray], says: str):
    wanted = np.array([[[True, True, False], [False, False, False]]])
    placement = Placement(1, np.array([3]), np.array([[0, 0, 1]]), wanted, np.array([[2, 1]]))
    placement.check()
    with pytest.raises(ConfigError, match=says):
        replace(placement, **change).check()


def test_files(tmp_path: Path):
    placement = default_placement([4, 3], np.array([[2, 2], [1, 1]]))
    write_placement(placement, tmp_path / "one.placement")
    assert_equal(read_placement(tmp_path / "one.placement"), placement)
    assert [path.name for path in tmp_path.iterdir()] == ["one.placement"]
    with pytest.raises(ConfigError, match="no placement at"):
        read_placement(tmp_path / "none")
    (tmp_path / "other").write_bytes(b"other")
    with pytest.raises(ConfigError, match="other: this is no placement"):
        read_placement(tmp_path / "other")
    with pytest.raises(ConfigError, match="can't be written"):
        write_placement(placement, tmp_path / "no" / "folder")


@pytest.mark.parametrize(("layers", "ranks", "experts"), [(4097, 1, 1), (1, 1025, 1), (1025, 1, 1024), (64, 1024, 1025)])
def test_tables_that_would_be_too_large_are_refused(layers: int, ranks: int, experts: int):
    with pytest.raises(
        ConfigError, match=f"{layers} layers of up to {experts} experts on {ranks} ranks: allowed: 4096 layers"
    ):
        default_placement([experts] * layers, np.ones((layers, ranks), np.int64))
    with pytest.raises(
        ConfigError, match=f"{layers} layers of up to {experts} experts on {ranks} ranks: allowed: 4096 layers"
    ):
        unpack(msgspec.msgpack.encode([1, [experts] * layers, ranks, b"", b"", b"", 0]))


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xdd\xff\xff\xff\xff",  # an array of four billion entries
        b"\x91" * 100_000,  # arrays in arrays
        msgspec.msgpack.encode([1, [2**63], 2, b"", b"", b"", 0]),
        msgspec.msgpack.encode([1, [2**63 - 1] * 2, 2**63 - 1, b"", b"", b"", 0]),
        msgspec.msgpack.encode([1, [], 2, b"", b"", b"", 0]),
        msgspec.msgpack.encode([1, [4], 0, b"", b"", b"", 0]),
        msgspec.msgpack.encode([1, [4], -2, b"", b"", b"", 0]),
        msgspec.msgpack.encode([1, [4, -4], 2, b"", b"", b"", 0]),
        msgspec.msgpack.encode([-(2**63), [4], 2, bytes(16), bytes(1), bytes(8), 0]),
        msgspec.msgpack.encode([1, [4], 2, bytes(16), bytes(1), bytes(8), 2**63]),
    ],
)
def test_messages_that_are_no_placements(message: bytes):
    with pytest.raises(ConfigError):
        unpack(message)


@pytest.mark.parametrize("kind", ["FIFO", "device", "huge"])
def test_files_without_an_end_are_not_read(kind: str, tmp_path: Path):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "a.placement"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "huge":
        path.touch()
        os.truncate(path, 1 << 30)
    with pytest.raises(ConfigError, match=r"is no regular file|is too large; allowed: 64 MiB"):
        read_placement(path)
