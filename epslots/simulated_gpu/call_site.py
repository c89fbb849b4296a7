"""The caller of an operation: the innermost source line outside of torch and the simulation."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

_HERE, _EPSLOTS, _TORCH = str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)
_MOST_FRAMES = 80


class CallSite(NamedTuple):
    """A source line, and the package whose code it is part of or is called by: "epslots", "transformers" or "other"."""

    line: str
    owner: str


@cache
def _owner(filename: str) -> str:
    """The package that a file belongs to; empty for torch, the simulation, and the frames between a line and them."""
    if filename.startswith((_HERE, _TORCH, "<")) or filename.endswith(("/contextlib.py", "/functools.py")):
        return ""
    if filename.startswith(_EPSLOTS):
        return "epslots"
    return "transformers" if "/transformers/" in filename else "other"


def call_site() -> CallSite:
    """The innermost line outside of torch and the simulation; its owner is the innermost of the two packages."""
    frame, line, owner = sys._getframe(1), "", ""
    for _ in range(_MOST_FRAMES):
        name = frame.f_code.co_filename
        here = _owner(name)
        if here and not line:
            line = f"{'/'.join(name.rsplit('/', 3)[-3:])}:{frame.f_lineno}"
            owner = here
        if here in ("epslots", "transformers"):
            owner = here
            break
        if frame.f_back is None:
            break
        frame = frame.f_back
    return CallSite(line, owner)
