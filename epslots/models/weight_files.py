"""Finds the weight files of a checkpoint's folder.

transformers' rule: ``model.safetensors`` if there is one, else the files that ``model.safetensors.index.json`` names; with a
variant, ``model.VARIANT.safetensors`` and ``model.safetensors.index.VARIANT.json``. Other ``*.safetensors`` are no part of the
checkpoint (``consolidated.safetensors``, other variants, adapters), unless they are named like shards of this one: then the
folder holds two sets of weights, and is refused. A folder with neither may hold files cut for tensor parallelism, all of which
are read (``parallel_shards.py``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from epslots.errors import CheckpointError
from epslots.models.json_file import read_json_object
from epslots.models.parallel_shards import parallel_files

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_SHARD = re.compile(r"-\d+-of-\d+")


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one checkpoint, in the order in which transformers reads them.

    Attributes:
        names: names in the folder.
        index: name of the index that names them; None for a single file.
        weight_map: file of each tensor by key, from the index.
        dtype: of the weights, if the index states it.
    """

    names: tuple[str, ...]
    index: str | None = None
    weight_map: dict[str, str] | None = None
    dtype: str | None = None


def find_weight_files(folder: Path, variant: str | None = None) -> WeightFiles:
    """The files to read, only by names and the index.

    Raises:
        CheckpointError: there are none, some that the index names are missing, or there are two sets of weights.
    """
    single, index = _with_variant(SINGLE_NAME, variant), _with_variant(INDEX_NAME, variant)
    indexed = _read_index(folder, index) if (folder / index).exists() else None
    if (folder / single).is_file():
        files = WeightFiles((single,)) if indexed is None else _single_beside_index(folder, single, indexed)
    elif indexed is not None:
        files = indexed
        missing = [name for name in files.names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder / index} names files that aren't there: {', '.join(missing[:4])}")
    elif cut := parallel_files(path.name for path in folder.glob("*.safetensors")):
        files = WeightFiles(cut)
    else:
        raise _no_weights(folder, single, index)
    _refuse_second_set(folder, files, single)
    return files


def _with_variant(name: str, variant: str | None) -> str:
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def _read_index(folder: Path, name: str) -> WeightFiles:
    """An index's files. Only plain names of files in the folder are accepted."""
    index = folder / name
    content = read_json_object(index, unique_keys=True)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index} is not a safetensors index: it has no "weight_map" from tensors to files')
    names = {file if isinstance(file, str) else repr(file) for file in weight_map.values()}
    for file in names:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {file!r}: only *.safetensors in the same folder are read")
    metadata = content.get("metadata")
    dtype = metadata.get("dtype") if isinstance(metadata, dict) else None
    return WeightFiles(tuple(sorted(names)), name, weight_map, None if dtype is None else str(dtype))


def _single_beside_index(folder: Path, single: str, indexed: WeightFiles) -> WeightFiles:
    """The single file, if the index beside it names no other existing one."""
    others = [name for name in indexed.names if name != single and (folder / name).exists()]
    if others:
        raise CheckpointError(
            f"{folder} holds two sets of weights: {single}, and {', '.join(others[:4])} by {indexed.index}. transformers "
            f"would read the first; remove the one that isn't wanted"
        )
    return WeightFiles((single,))


def _refuse_second_set(folder: Path, files: WeightFiles, single: str) -> None:
    families = {_SHARD.sub("", name) for name in (*files.names, single)}
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    strays = [name for name in present if name not in files.names and _SHARD.sub("", name) in families]
    if strays:
        raise CheckpointError(
            f"{folder} holds {', '.join(strays[:4])}, named like its weight files, but {files.index or single} doesn't name "
            f"{'it' if len(strays) == 1 else 'them'}: remove the rest of another set of weights"
        )


def _no_weights(folder: Path, single: str, index: str) -> CheckpointError:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder} holds {pickles[0]}, which is a pickle: opening it could run any code. epslots reads safetensors "
            f"alone; convert the checkpoint with save_pretrained in an environment you trust"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    unread = f"; {', '.join(others[:4])} is not read without them" if others else ""
    return CheckpointError(f"{folder} holds neither {single} nor {index}{unread}")
