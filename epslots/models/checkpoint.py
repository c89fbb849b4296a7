"""A checkpoint: its source, its local folder, and its open files, checked by their headers.

Only safetensors are read. A ``.bin`` checkpoint is a pickle, which runs code when it is opened, and is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

import xxhash
from safetensors import SafetensorError, safe_open

from epslots.errors import CheckpointError, ConfigError
from epslots.models.parallel_shards import JoinedFile, join_ranks
from epslots.models.weight_files import WeightFiles, find_weight_files

_WHAT_TO_GIVE = "give a checkpoint folder or a hub id such as 'Qwen/Qwen3-30B-A3B'"
# The files of a model besides its weights: no pickles, no code.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# Other formats of the same weights lie in folders of their own.
HUB_IGNORED = ["*/*", "consolidated*"]
# Samples of each tensor that identify a checkpoint, their size, and the number of files that are read at a time.
SAMPLES = 2
SAMPLE_BYTES = 64
SAMPLE_THREADS = 16
# safetensors' names of the dtypes that weights are computed with, and torch's.
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class CheckpointSource:
    """Which checkpoint to load.

    Attributes:
        path_or_id: a folder, or a hub id.
        subfolder: folder inside of it that holds config.json and the weights.
        variant: of the weight files: ``"fp16"`` stands for model.fp16.safetensors and its like.
        revision: branch, tag or commit, of a hub id.
        token: of the hub, for a hub id; True = the one that was saved by ``hf auth login``.

    Raises:
        ConfigError: a field is of another type, or leads out of the checkpoint's folder.
    """

    path_or_id: str | os.PathLike[str]
    subfolder: str = ""
    variant: str | None = None
    revision: str | None = None
    token: str | bool | None = None

    def __post_init__(self) -> None:
        for name in ("subfolder", "variant", "revision"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name}={value!r}: allowed: text")
        if self.revision == "":  # the hub's client would take it for the main branch
            raise ConfigError("revision='': allowed: a branch, a tag, a commit, or None")
        path = PurePosixPath(self.subfolder or "")
        if path.is_absolute() or ".." in path.parts:
            raise ConfigError(f"subfolder={self.subfolder!r}: allowed: a folder inside of the checkpoint's")
        if self.variant is not None and not re.fullmatch(r"[\w-]+(\.[\w-]+)*", self.variant):
            raise ConfigError(f"variant={self.variant!r}: allowed: a part of a file's name, such as fp16")


@dataclass(frozen=True)
class TensorHeader:
    """One tensor's entry in a safetensors header."""

    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """A local checkpoint folder whose files are all present and whose headers are sound.

    Attributes:
        folder: its path.
        name: its name in messages.
        files: its weight files.
        tensors: header of every tensor, by key, file by file.
        handles: the open files, by name; safetensors maps them and reads nothing until a tensor is read. Files that hold
            pieces of the same tensors are one (``parallel_shards.py``).
    """

    folder: Path
    name: str
    files: WeightFiles
    tensors: dict[str, TensorHeader]
    handles: dict[str, safe_open | JoinedFile] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """Hex digest that distinguishes these weight files from others on this machine.

        It covers their folder, content (as sampled), and times; the files aren't read whole. Archives and container layers may
        set the time of modification to anything, but not the time of the last change, so that a file replaced in place is
        noticed.
        """
        digest = xxhash.xxh3_128(os.fsencode(self.folder.resolve()))
        for file in sorted(self.files.names):
            status = (self.folder / file).stat()
            digest.update(f"{file}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\0".encode())
        digest.update(self.content.encode())
        return digest.hexdigest()

    @cached_property
    def content(self) -> str:
        """Hex digest of all headers and samples of every tensor: equal for copies of a checkpoint in any place."""
        names = sorted(self.files.names)
        with ThreadPoolExecutor(SAMPLE_THREADS) as pool:
            digests = pool.map(_digest_samples, [self.folder / name for name in names])
            parts = (f"{name}\0{digest}\0" for name, digest in zip(names, digests, strict=True))
            return xxhash.xxh3_64_hexdigest("".join(parts).encode())

    @property
    def dtype(self) -> str:
        """The weights' own dtype, by transformers' rule: the index's, else that of the first float of the first file."""
        if self.files.dtype is not None:
            return self.files.dtype
        listed = [header.dtype for header in self.tensors.values() if header.file == self.files.names[0]]
        floats = [dtype for dtype in listed if dtype in FLOATS]
        return FLOATS[floats[0]] if floats else listed[0] if listed else "float32"


def _digest_samples(path: Path) -> str:
    """Hex digest of a weight file's header and of evenly spread samples of its tensors."""
    with open(path, "rb", buffering=0) as opened:
        length = opened.read(8)
        header = opened.read(int.from_bytes(length, "little"))
        digest = xxhash.xxh3_64(header)
        start = len(length) + len(header)
        spans = (about["data_offsets"] for key, about in json.loads(header).items() if key != "__metadata__")
        for begin, end in sorted(spans):
            for part in range(1, SAMPLES + 1):
                offset = begin + (end - begin) * part // (SAMPLES + 1)
                digest.update(os.pread(opened.fileno(), min(SAMPLE_BYTES, end - offset), start + offset))
    return digest.hexdigest()


def find_checkpoint(source: CheckpointSource | str | os.PathLike[str]) -> Path:
    """The local folder of a checkpoint: a given folder, or a hub id's in the hub's cache (downloading missing files).

    Raises:
        ConfigError: a revision or a token was given with a local folder.
        CheckpointError: no such folder, and no hub id that can be downloaded.
    """
    if not isinstance(source, CheckpointSource):
        source = CheckpointSource(source)
    path, text = Path(source.path_or_id), os.fspath(source.path_or_id)
    if not text:  # a shell's variable that isn't set; as a path it would be the working folder
        raise CheckpointError(f"the checkpoint's name is empty; {_WHAT_TO_GIVE}")
    with _reported_as_ours(text):
        is_folder, exists = path.is_dir(), path.exists()
    if is_folder:
        for name in ("revision", "token"):
            if getattr(source, name) is not None:
                raise ConfigError(f"{name}: allowed for a hub id, and {text} is a folder of this machine")
    elif exists:
        raise CheckpointError(f"{text} is a file; give the folder that holds config.json and the *.safetensors")
    elif text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(f"{text} doesn't exist; {_WHAT_TO_GIVE}")
    else:
        path = _download(text, source)
    folder = path / source.subfolder if source.subfolder else path
    with _reported_as_ours(text):
        if not folder.is_dir():
            raise CheckpointError(f"{text} holds no folder {source.subfolder}")
    return folder


@contextlib.contextmanager
def _reported_as_ours(where: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of the operating system into CheckpointError: no permission, too long a name, a failing disk."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or where} can't be read: {error.strerror or error}") from error


def _download(model_id: str, source: CheckpointSource) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    inside = f"{PurePosixPath(source.subfolder)}/" if source.subfolder else ""
    try:
        return Path(
            snapshot_download(
                model_id,
                revision=source.revision,
                token=source.token,
                allow_patterns=[inside + pattern for pattern in HUB_PATTERNS],
                ignore_patterns=[inside + pattern for pattern in HUB_IGNORED],
            )
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"no local folder {model_id}, and the hub doesn't give a model of that id: {reason}") from error


def open_checkpoint(folder: Path, variant: str | None = None) -> Checkpoint:
    """Check every weight file of a folder by its header, and open it.

    Raises:
        CheckpointError: naming the file at fault and the remedy.
    """
    with _reported_as_ours(folder):
        files = find_weight_files(folder, variant)
        handles = join_ranks({name: _open_file(folder / name) for name in files.names})
    tensors: dict[str, TensorHeader] = {}
    for file, handle in handles.items():
        for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            if key in tensors:
                raise CheckpointError(f"{folder}: {tensors[key].file} and {file} both hold {key}: remove one of the two")
            part = handle.get_slice(key)
            tensors[key] = TensorHeader(file, tuple(part.get_shape()), part.get_dtype())
    for key, file in (files.weight_map or {}).items():
        if key not in tensors or tensors[key].file != file:
            raise CheckpointError(f"{folder / str(files.index)} says that {file} holds {key}, and it doesn't")
    return Checkpoint(folder, folder.resolve().name, files, tensors, handles)


def _open_file(path: Path) -> safe_open:
    try:
        path.open("rb").close()  # safetensors reports a missing permission as damage
        return safe_open(path, "pt")
    except PermissionError:
        raise
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from error
