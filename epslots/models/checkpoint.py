"""A checkpoint's files: found, checked by their headers alone, and opened.

Only safetensors are read. A ``.bin`` checkpoint is a pickle, which runs code when it is opened, and is refused.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import xxhash
from safetensors import SafetensorError, safe_open

from epslots.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# What a model needs besides its weights: no pickles, no code.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# Other formats of the same weights lie in folders of their own.
HUB_IGNORED = ["*/*", "consolidated*"]
# How much of each weight file is read to tell it from others.
SAMPLES = 16
SAMPLE_BYTES = 64


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """A local checkpoint folder whose files are all present and whose headers are sound.

    Attributes:
        folder: where it is.
        name: what to call it.
        tensors: header of every tensor, by key.
        handles: the open files, by name; safetensors maps them and reads nothing until asked.
    """

    folder: Path
    name: str
    tensors: dict[str, TensorHeader]
    handles: dict[str, safe_open] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """Hex digest that tells these weight files from others, without reading them whole.

        It covers where they are, sizes and modification times, and samples of their bytes: archives and container layers
        give the same date to everything, and two fine-tunes of a model differ in nothing else.
        """
        digest = xxhash.xxh3_128(os.fsencode(self.folder.resolve()))
        for file in sorted(self.handles):
            digest.update(f"{file}\0{(self.folder / file).stat().st_mtime_ns}\0".encode())
        digest.update(self.content.encode())
        return digest.hexdigest()

    @property
    def content(self) -> str:
        """Hex digest of sizes and samples alone: the same for copies of a checkpoint, wherever they are."""
        digest = xxhash.xxh3_64()
        for file in sorted(self.handles):
            with open(self.folder / file, "rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                digest.update(f"{file}\0{size}\0".encode())
                for sample in range(SAMPLES):
                    opened.seek(size * sample // SAMPLES)
                    digest.update(opened.read(SAMPLE_BYTES))
        return digest.hexdigest()


def find_checkpoint(path_or_id: str | os.PathLike[str]) -> Path:
    """The local folder of a checkpoint: a folder as it is, a hub id through its cache (downloading what's missing).

    Raises:
        CheckpointError: no such folder, and not a hub id that can be had.
    """
    path = Path(path_or_id)
    text = os.fspath(path_or_id)
    try:
        if path.is_dir():
            return path
        is_file = path.exists()
    except PermissionError as error:
        raise CheckpointError(f"no permission to look into {text}") from error
    if is_file:
        raise CheckpointError(f"{text} is a file; give the folder that holds config.json and the *.safetensors")
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(f"{text} doesn't exist; give a checkpoint folder or a hub id such as 'Qwen/Qwen3-30B-A3B'")
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    try:
        return Path(snapshot_download(text, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED))
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"no local folder {text}, and the hub doesn't give a model of that id: {reason}") from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Check every weight file of a folder by its header, and open it.

    Raises:
        CheckpointError: naming the file at fault and what to do.
    """
    try:
        expected = _weight_map(folder)
        files = sorted(set(expected.values())) if expected else [SINGLE_NAME]
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            _refuse_missing(folder, missing, indexed=expected is not None)
        handles = {file: _open_file(folder / file) for file in files}
    except PermissionError as error:
        raise CheckpointError(f"no permission to read {error.filename}") from error
    tensors = {}
    for file, handle in handles.items():
        for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            part = handle.get_slice(key)
            tensors[key] = TensorHeader(file, tuple(part.get_shape()), part.get_dtype())
    for key, file in (expected or {}).items():
        if key not in tensors or tensors[key].file != file:
            raise CheckpointError(f"{folder / INDEX_NAME} says that {file} holds {key}, and it doesn't")
    return Checkpoint(folder, folder.resolve().name, tensors, handles)


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor key -> file, from the index if there is one. Only plain names of files in the folder are accepted."""
    index = folder / INDEX_NAME
    if not index.exists():
        return None
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        items = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {error}") from error
    for key, file in items:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {file!r} for {key}: only *.safetensors in the same folder are read")
    return dict(items)


def _refuse_missing(folder: Path, missing: list[str], *, indexed: bool) -> None:
    if indexed:
        raise CheckpointError(f"{folder / INDEX_NAME} names files that aren't there: {', '.join(missing[:4])}")
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds {pickles[0]}, which is a pickle: opening it could run any code. epslots reads safetensors "
            f"alone; convert the checkpoint with save_pretrained in an environment you trust"
        )
    raise CheckpointError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}")


def _open_file(path: Path) -> safe_open:
    try:
        path.open("rb").close()  # safetensors' own error for this doesn't tell it from damage
        return safe_open(path, "pt")
    except PermissionError:
        raise
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from error
