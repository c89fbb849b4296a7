"""Reads the JSON files of a checkpoint; crafted and damaged ones are refused by name. Imports no library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from epslots.errors import CheckpointError

# safetensors' bound of a header. The index of a model of 138,000 tensors takes 13 MB.
MAX_BYTES = 100_000_000


def read_json_object(path: Path, *, unique_keys: bool = False) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: the file.
        unique_keys: refuse an object that names a key twice; False: the last one counts, as everywhere in Python.

    Raises:
        CheckpointError: it can't be read, is too large, nested too deeply, or holds something else than an object.
    """
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise CheckpointError(f"{path} has {size:,} bytes; at most {MAX_BYTES:,} are read")
        value = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_unique if unique_keys else None)
    except PermissionError as error:
        raise CheckpointError(f"no permission to read {path}") from error
    except RecursionError as error:
        raise CheckpointError(f"{path} is nested too deeply to be read") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not JSON in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def model_type_of(folder: Path) -> str:
    """The name of a checkpoint's kind of model, as transformers knows it; "" if its configuration has none.

    Raises:
        CheckpointError: there is no configuration that can be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no config.json: it is not a checkpoint folder")
    return str(read_json_object(path).get("model_type") or "")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it names {next(key for key in found if keys.count(key) > 1)!r} twice")
    return found
