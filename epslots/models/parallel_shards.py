"""Weight files that hold tensors cut for tensor parallelism: one file for each rank, with a piece of every tensor.

Grok-2 is released so, over eight ranks: ``pytorch_model-00006-TP-000.safetensors`` to ``-007`` hold the experts' gates,
``*-TP-common.safetensors`` what is whole. ``JoinedFile`` reads the pieces as one safetensors file.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from epslots.errors import CheckpointError

if TYPE_CHECKING:
    import torch  # it takes seconds, and the names of files are asked for without it

_RANK = re.compile(r"-TP-(\d{3})(?=\.safetensors$)")
_COMMON = "-TP-common.safetensors"
# Matrices whose inputs are cut, along the second dimension; those of all others are cut by rows.
_CUT_INPUTS = re.compile(r"\.(w2|down_proj|o_proj)\.weight$")


def parallel_files(names: Iterable[str]) -> tuple[str, ...]:
    """The files of a checkpoint cut for tensor parallelism, in order; none if it isn't."""
    return tuple(sorted(name for name in names if _RANK.search(name) or name.endswith(_COMMON)))


class JoinedFile:
    """The files of all ranks, read as one of safetensors' handles; safe to use from several threads.

    Args:
        parts: by rank.
    """

    def __init__(self, parts: Sequence[safe_open]) -> None:
        self._parts = parts

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._parts[0].keys())

    def get_tensor(self, key: str) -> torch.Tensor:
        """A whole tensor."""
        import torch

        return torch.cat([part.get_tensor(key) for part in self._parts], _dimension(key))

    def get_slice(self, key: str) -> JoinedSlice:
        """A tensor that is read when it is indexed."""
        return JoinedSlice(self, key, [part.get_slice(key) for part in self._parts])


class JoinedSlice:
    """A tensor of a ``JoinedFile``; its shape and dtype are known from headers."""

    def __init__(self, file: JoinedFile, key: str, pieces: Sequence[Any]) -> None:
        self._file, self._key, self._pieces = file, key, pieces

    def get_shape(self) -> list[int]:
        """Of the whole tensor."""
        shapes, dimension = [piece.get_shape() for piece in self._pieces], _dimension(self._key)
        total = sum(shape[dimension] for shape in shapes)
        return [total if i == dimension else size for i, size in enumerate(shapes[0])]

    def get_dtype(self) -> str:
        """By safetensors' name."""
        dtype: str = self._pieces[0].get_dtype()
        return dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._file.get_tensor(self._key)[index]


def join_ranks(handles: dict[str, safe_open]) -> dict[str, Any]:
    """Handles by name, with one ``JoinedFile`` in place of the files of all ranks.

    Raises:
        CheckpointError: a rank's file is missing, or its tensors aren't those of the others.
    """
    found: dict[str, Any] = {}
    ranks: dict[str, dict[int, str]] = defaultdict(dict)
    for name, handle in handles.items():
        match = _RANK.search(name)
        if match is None:
            found[name] = handle
        else:
            ranks[_RANK.sub("-TP-*", name)][int(match[1])] = name
    most = max((len(names) for names in ranks.values()), default=0)
    for joined, names in ranks.items():
        if sorted(names) != list(range(most)):
            raise CheckpointError(f"{joined}: there are files of ranks {sorted(names)}, and others of {most} ranks")
        parts = [handles[names[rank]] for rank in range(most)]
        _check_alike(joined, parts)
        found[joined] = JoinedFile(parts)
    return found


def _check_alike(name: str, parts: Sequence[safe_open]) -> None:
    first, *others = ({key: _described(part, key) for key in part.keys()} for part in parts)  # noqa: SIM118
    for rank, other in enumerate(others, 1):
        if odd := sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key)):
            raise CheckpointError(f"{name}: rank 0 and rank {rank} differ in {odd[0]}: all ranks hold equal pieces")


def _described(part: safe_open, key: str) -> tuple[Any, ...]:
    piece = part.get_slice(key)
    if len(shape := piece.get_shape()) < 1 + _dimension(key):
        raise CheckpointError(f"{key} has shape {shape}, which isn't cut for tensor parallelism")
    return tuple(shape), piece.get_dtype()


def _dimension(key: str) -> int:
    return 1 if _CUT_INPUTS.search(key) else 0
