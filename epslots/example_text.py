"""The text that the example model knows: the source of Python's standard library, which every installation carries.

``examples/python_moe/train.py`` trained the model on these files, but for one in twenty. Fits and evaluations split the files
in the same way: by name, so that the split doesn't depend on a path or a version of Python.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

_HELD_OUT_BYTES = 256 / 20  # values of a digest's first byte: one file in twenty
# Generated tables and test suites teach little Python for their size.
_SKIPPED = {"test", "tests", "encodings", "site-packages", "__pycache__", "idlelib", "turtledemo"}
_LEAST_FILE_BYTES = 512


def library_texts(*, held_out: bool) -> list[str]:
    """The example model's training texts, or the held-out ones, in the files' order.

    Under another version of Python than the training's, files may differ from those that the model saw.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in root.rglob("*.py") if not _SKIPPED & set(path.relative_to(root).parts))
    chosen = [path for path in sorted(files) if path.stat().st_size > _LEAST_FILE_BYTES and _is_held_out(path) == held_out]
    return [path.read_text(encoding="utf-8", errors="replace") for path in chosen]


def _is_held_out(path: Path) -> bool:
    return hashlib.sha256(path.name.encode()).digest()[0] < _HELD_OUT_BYTES
