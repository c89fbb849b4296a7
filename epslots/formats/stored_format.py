"""``StoredFormat``: the description of a quantised format. ``known_formats.py`` has the table of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from epslots.formats.matrix import Matrix, StoredParts

Settings = Mapping[str, Any]
"""``quantization_config`` of config.json."""


def takes_all(settings: Settings) -> None:
    """Refuses nothing."""


@dataclass(frozen=True)
class StoredFormat:
    """One quantised format.

    Attributes:
        method: ``quant_method`` in its settings.
        names: by the end of a parameter's name, the ends of the names of its tensors on disk.
        scales: those of them that only quantised matrices have.
        read: the matrix that some tensors stand for. It raises ValueError where they don't fit together.
        check: refuses settings of the method that ``read`` doesn't know, with ``UnsupportedModelError``.
        renames: (pattern, replacement) of names on disk, before anything else. A model's own parameters keep their names.
        fused: one tensor holds all experts, [experts, ...], and the model has its matrices transposed.
    """

    method: str
    names: Mapping[str, tuple[str, ...]]
    scales: tuple[str, ...]
    read: Callable[[StoredParts, Settings], Matrix]
    check: Callable[[Settings], None] = takes_all
    renames: tuple[tuple[str, str], ...] = ()
    fused: bool = False
