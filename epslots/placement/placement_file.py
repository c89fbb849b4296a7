"""Placements as files: computed offline (``epslots placement plan``), loaded at the start."""

from __future__ import annotations

import os

from epslots.errors import ConfigError
from epslots.given_files import read_given, write_whole
from epslots.placement.placement import Placement, pack, unpack

# More than the largest allowed placement takes.
MOST_BYTES = 64 << 20


def read_placement(path: str | os.PathLike[str]) -> Placement:
    """The placement in a file.

    Raises:
        ConfigError: the file can't be read, or doesn't hold a valid placement.
    """
    try:
        return unpack(read_given(path, MOST_BYTES))
    except OSError as error:
        raise ConfigError(f"no placement at {os.fspath(path)}: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"{os.fspath(path)}: {error}") from error


def write_placement(placement: Placement, path: str | os.PathLike[str]) -> None:
    """Write a placement to a file, which appears complete or not at all.

    Raises:
        ConfigError: the placement breaks a rule, or the file can't be written.
    """
    placement.check()
    with write_whole(path) as file:
        file.write(pack(placement))
