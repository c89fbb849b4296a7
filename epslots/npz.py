"""Reading ``.npz`` files from others: their arrays, or one clear error for any defect.

A small file can claim any amount of memory: in an array's header, in the archive's directory, or by data that are compressed
a thousandfold. So the directory and the headers are read first, and their claims are compared with each other, the file's
size and the free memory before an array is allocated. Arrays may have ``MOST_RATIO`` (128) times the file's size, and always
64 MiB.
"""

from __future__ import annotations

import math
import os
import zipfile
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from epslots.errors import ConfigError
from epslots.given_files import open_regular
from epslots.host_limits import tightest_memory_limit
from epslots.units import format_bytes

# Routing compresses to a third or a tenth; to a hundredth with all-zero probabilities, of routers that can't be recorded.
MOST_RATIO = 128
# Allowed for a file of any size: reading it takes a fraction of a second.
ALWAYS_ALLOWED_BYTES = 64 << 20
_NUMBER_KINDS = "biuf"
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_SUFFIX = ".npy"
_ENCRYPTED_FLAG = 1


def read_arrays(path: str | os.PathLike[str], what: str) -> dict[str, NDArray[Any]]:
    """All arrays of a file by name, in this machine's byte order and C-contiguous.

    Args:
        what: a name of what the file should be, for messages.

    Raises:
        ConfigError: the file can't be read, isn't an ``.npz`` of plain arrays, or is too large.
    """
    name = os.fspath(path)
    try:
        with open_regular(name) as file, zipfile.ZipFile(file) as archive:
            members = _members(archive, name, what)
            _check_sizes(members.values(), name, os.fstat(file.fileno()).st_size)
            for member in members.values():
                _check_header(archive, member, name, what)
            return {array: _read(archive, member) for array, member in members.items()}
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"{name}: no such file") from error
    except PermissionError as error:
        raise ConfigError(f"{name}: no permission to read it") from error
    except Exception as error:  # of a crafted file, any line of zipfile's and numpy's can fail
        raise ConfigError(f"{name} is not {what}: it isn't a sound .npz of plain arrays ({type(error).__name__})") from error


def _members(archive: zipfile.ZipFile, name: str, what: str) -> dict[str, zipfile.ZipInfo]:
    """The archive's members by the arrays' names."""
    found: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        array = member.filename.removesuffix(_SUFFIX)
        if array in found:
            raise ConfigError(f"{name} is not {what}: it holds {array!r:.80} twice")
        if array == member.filename or member.compress_type not in _COMPRESSIONS or member.flag_bits & _ENCRYPTED_FLAG:
            raise ConfigError(f"{name} is not {what}: its member {member.filename!r:.80} is none that numpy writes")
        found[array] = member
    return found


def _check_sizes(members: Any, name: str, file_bytes: int) -> None:
    """Refuse arrays that are implausibly large for the file, or larger than the free memory."""
    total = sum(member.file_size for member in members)
    plausible = max(ALWAYS_ALLOWED_BYTES, MOST_RATIO * file_bytes)
    if total > plausible:
        raise ConfigError(
            f"{name} of {format_bytes(file_bytes)} holds arrays of {format_bytes(total)}; allowed: {MOST_RATIO} times the "
            f"file's size, or {format_bytes(ALWAYS_ALLOWED_BYTES)}. Save larger arrays without compression"
        )
    limit = tightest_memory_limit()
    if total > limit.free_bytes:
        raise ConfigError(f"{name} holds arrays of {format_bytes(total)}; allowed: the free memory, {limit}")


def _check_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, what: str) -> None:
    """Refuse a header whose size differs from the directory's, or whose items aren't plain numbers."""
    with archive.open(member) as file:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ConfigError(f"{name} is not {what}: {member.filename!r:.80} has version {version} of .npy; allowed: 1, 2")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
        held = member.file_size - file.tell()
    if dtype.kind not in _NUMBER_KINDS or dtype.hasobject or dtype.subdtype is not None:
        raise ConfigError(f"{name} is not {what}: {member.filename!r:.80} holds {str(dtype)!r:.80}; allowed: plain numbers")
    described = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or described != held:
        raise ConfigError(
            f"{name} is not {what}: {member.filename!r:.80} has the shape {str(list(shape))[:80]} of {dtype}, and holds "
            f"{held:,} bytes; these must agree"
        )


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as file:
        array = npy.read_array(file, allow_pickle=False)
    return np.asarray(array, array.dtype.newbyteorder("="), order="C")
