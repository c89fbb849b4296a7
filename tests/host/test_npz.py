"""An ``.npz`` of others is read, or refused by name before it costs time or memory."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epslots.errors import ConfigError
from epslots.host_limits import MemoryLimit
from epslots.npz import ALWAYS_ALLOWED_BYTES, MOST_RATIO, read_arrays

MIB = 1 << 20


def npy_file(array: np.ndarray) -> bytes:
    held = io.BytesIO()
    np.save(held, array)
    return held.getvalue()


def header(shape: object, dtype: object = "<i2", version: bytes = b"\x01\x00") -> bytes:
    """The beginning of an .npy file that says what it likes."""
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (64 - (len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text


def archive(path: Path, *members: tuple[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", packing) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


@pytest.fixture
def nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """An array that is made or read is a test that fails."""
    monkeypatch.setattr("epslots.npz._read", lambda *arguments: pytest.fail("an array was read"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_plain_arrays_come_native_and_contiguous(save: Callable[..., None], tmp_path: Path):
    numbers = np.arange(24).reshape(2, 3, 4)
    given: dict[str, np.ndarray] = {
        "native": numbers,
        "big_endian": numbers.astype(">i2"),
        "fortran": np.asfortranarray(numbers.astype(np.float16)),
        "nothing": np.zeros((0, 3), np.uint8),
        "single": np.array(7),
        "flags": numbers > 3,
    }
    save(tmp_path / "a.npz", **given)
    read = read_arrays(tmp_path / "a.npz", "anything")
    assert read.keys() == given.keys()
    for name, array in read.items():
        assert np.array_equal(array, given[name]) and array.shape == given[name].shape
        assert array.dtype.isnative and array.flags.c_contiguous


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((10**9, 30, 40), "<i2"),
        ((2**63, 2**63, 4), "<i2"),
        ((-5, 3, 4), "<i2"),
        ((-500, -1), "<i2"),
        ((499,), "<i2"),
        ((501,), "<i2"),
        ((), "<i2"),
        ((0,), "<i2"),
    ],
)
def test_a_header_that_tells_of_other_bytes(shape: Any, dtype: str, tmp_path: Path, nothing_is_made: None):
    path = archive(tmp_path / "a.npz", ("ids.npy", header(shape, dtype) + bytes(1000)))
    with pytest.raises(
        ConfigError, match=r"is not a trace: 'ids\.npy' has the shape .* and holds 1,000 bytes; these must agree"
    ):
        read_arrays(path, "a trace")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ("(4,)", "|O"),
        ("(4,)", "<U8"),
        ("(4,)", "|S8"),
        ("(4,)", "<c8"),
        ("(4,)", "<M8[s]"),
        ("(4,)", "|V8"),
        ("(4,)", [("a", "<i8")]),
        ("(4,)", ["<i8", (2,)]),
        ("(4,)", "no type"),
        ("(4.0,)", "<i8"),
        ("('a',)", "<i8"),
        ("4", "<i8"),
        ("(" * 200 + ")" * 200, "<i8"),
        ("__import__('os')", "<i8"),
        ("(1,) * 10**9", "<i8"),
    ],
)
def test_headers_of_what_are_no_plain_numbers(shape: str, dtype: object, tmp_path: Path, nothing_is_made: None):
    path = archive(tmp_path / "a.npz", ("ids.npy", header(shape, dtype) + bytes(32)))
    with pytest.raises(ConfigError, match="is not a trace: "):
        read_arrays(path, "a trace")


def test_whatever_fails_in_numpy_is_a_refusal(tmp_path: Path):
    """numpy takes a truth value for a length, until it makes the array: TypeError."""
    path = archive(tmp_path / "a.npz", ("ids.npy", header("(True,)") + bytes(2)))
    with pytest.raises(ConfigError, match="is not a trace: "):
        read_arrays(path, "a trace")


@pytest.mark.parametrize("version", [b"\x03\x00", b"\x09\x00"])
def test_another_version_of_npy(version: bytes, tmp_path: Path, nothing_is_made: None):
    path = archive(tmp_path / "a.npz", ("ids.npy", header((16,), version=version) + bytes(32)))
    with pytest.raises(ConfigError, match="is not a trace: "):
        read_arrays(path, "a trace")


def test_what_is_packed_a_thousand_times_smaller(tmp_path: Path, nothing_is_made: None):
    size = ALWAYS_ALLOWED_BYTES + MIB
    path = archive(tmp_path / "a.npz", ("ids.npy", header((size // 2,)) + bytes(size)))
    assert path.stat().st_size * MOST_RATIO < size
    with pytest.raises(ConfigError, match=r"holds arrays of 65 MiB; allowed: 128 times the file's size, or 64 MiB"):
        read_arrays(path, "a trace")


def test_many_members_of_the_same_bytes(tmp_path: Path, nothing_is_made: None):
    """Their sum is held against the file: the directory may point at one place many times."""
    content = header((4 * MIB,)) + bytes(8 * MIB)
    path = archive(tmp_path / "a.npz", *((f"a{number}.npy", content) for number in range(9)))
    with pytest.raises(ConfigError, match="holds arrays of 72 MiB"):
        read_arrays(path, "a trace")


def test_what_is_small_may_be_packed_tightly(tmp_path: Path):
    np.savez_compressed(tmp_path / "a.npz", ids=np.zeros(MIB, np.int16))
    assert (tmp_path / "a.npz").stat().st_size * MOST_RATIO < 2 * MIB
    assert len(read_arrays(tmp_path / "a.npz", "a trace")["ids"]) == MIB


def test_more_than_there_is_memory_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_is_made: None):
    monkeypatch.setattr("epslots.npz.tightest_memory_limit", lambda: MemoryLimit("the cgroup", "/job", 4 * MIB, MIB))
    np.savez(tmp_path / "a.npz", ids=np.zeros(MIB, np.int16))
    with pytest.raises(
        ConfigError, match=r"holds arrays of 2 MiB; allowed: the free memory, 1 MiB free of the cgroup's 4 MiB"
    ):
        read_arrays(tmp_path / "a.npz", "a trace")


def test_a_directory_that_lies_about_sizes(tmp_path: Path):
    """More bytes than it tells of are not read, and the checksum shows it."""
    path = archive(tmp_path / "a.npz", ("ids.npy", header((512,)) + bytes(100_000)))
    content = path.read_bytes()
    held = len(header((512,)))
    path.write_bytes(content.replace(struct.pack("<L", held + 100_000), struct.pack("<L", held + 1024)))
    with pytest.raises(ConfigError, match=r"it isn't a sound \.npz of plain arrays"):
        read_arrays(path, "a trace")


def test_two_arrays_of_one_name(tmp_path: Path, nothing_is_made: None):
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = archive(tmp_path / "a.npz", *(("ids.npy", npy_file(np.zeros(number))) for number in (1, 2)))
    with pytest.raises(ConfigError, match="is not a trace: it holds 'ids' twice"):
        read_arrays(path, "a trace")


@pytest.mark.parametrize(
    ("name", "packing"), [("ids.txt", zipfile.ZIP_STORED), ("ids.npy", zipfile.ZIP_BZIP2), ("ids.npy", zipfile.ZIP_LZMA)]
)
def test_members_that_numpy_does_not_write(name: str, packing: int, tmp_path: Path, nothing_is_made: None):
    path = archive(tmp_path / "a.npz", (name, npy_file(np.zeros(2))), packing=packing)
    with pytest.raises(ConfigError, match=f"its member '{name}' is none that numpy writes"):
        read_arrays(path, "a trace")


def test_an_encrypted_member(tmp_path: Path, nothing_is_made: None):
    path = archive(tmp_path / "a.npz", ("ids.npy", npy_file(np.zeros(2))))
    content = bytearray(path.read_bytes())
    for start, flags in ((content.find(b"PK\x03\x04"), 6), (content.find(b"PK\x01\x02"), 8)):
        content[start + flags] |= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is none that numpy writes"):
        read_arrays(path, "a trace")


@pytest.mark.parametrize("kept", [0, 1, 30, 100, -40, -1])
def test_what_is_cut_short(kept: int, tmp_path: Path):
    np.savez(tmp_path / "a.npz", ids=np.arange(100))
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:kept])
    with pytest.raises(ConfigError, match="is not a trace"):
        read_arrays(tmp_path / "a.npz", "a trace")


def test_damage_anywhere_is_an_error_or_harmless(tmp_path: Path):
    """Each byte of a file in turn is another one: arrays as they were, or a ConfigError."""
    path = tmp_path / "a.npz"
    np.savez_compressed(path, ids=np.arange(20, dtype=np.int16))
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            read = read_arrays(path, "a trace")
        except ConfigError:
            continue
        assert [array.tolist() for array in read.values()] in ([], [list(range(20))]), place


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(kind: str, tmp_path: Path):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "a.npz"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(ConfigError, match=f"{path} is no"):
        read_arrays(path, "a trace")


def test_one_array_is_no_npz(tmp_path: Path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(ConfigError, match="is not a trace"):
        read_arrays(tmp_path / "a.npy", "a trace")
