"""Reading ``.npz`` files of others: arrays, or one clear error whatever is wrong with the file."""

from __future__ import annotations

import os
import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epslots.errors import ConfigError


def read_arrays(path: str | os.PathLike[str], what: str) -> dict[str, NDArray[Any]]:
    """All arrays of a file, by name.

    Args:
        what: that it should be, for the error.

    Raises:
        ConfigError: the file can't be read, or isn't an ``.npz`` of plain arrays.
    """
    try:
        with open(path, "rb") as source:
            file = np.load(source, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ConfigError(f"{os.fspath(path)} is not {what}: it holds one array, and an .npz is needed")
            return {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise ConfigError(f"{os.fspath(path)}: no such file") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise ConfigError(
            f"{os.fspath(path)} is not {what}: it isn't a sound .npz of plain arrays ({type(error).__name__})"
        ) from error
