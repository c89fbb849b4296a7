"""The settings with which ranks were loaded, compared with those of a driver that may adopt them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from cluster.messages.rank import Load, Origin
from epslots import __version__
from epslots.models.checkpoint import open_checkpoint

_SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_MEANING = {
    "content": "the checkpoint's files were changed",
    "version": "epslots is another version",
    "user": "another user started them",
}


def origin_of(folder: Path) -> Origin:
    """Where ranks come from that this process loads from a checkpoint's folder.

    Raises:
        CheckpointError: the checkpoint is broken.
    """
    digest = xxhash.xxh3_128(open_checkpoint(folder).content.encode())
    for name in _SMALL_FILES:
        if (folder / name).is_file():
            digest.update(f"{name}\0".encode())
            digest.update((folder / name).read_bytes())
    return Origin(content=digest.hexdigest(), version=__version__, user=os.getuid())


def differences(found: Load, wanted: Load) -> list[str]:
    """Settings of ranks that a driver with other ones can't adopt: "slots: 4, and 8 is wanted"."""
    texts = []
    for name, (theirs, ours) in _pairs(found, wanted):
        if str(theirs) != str(ours):  # a command line's "4" is 4
            meaning = _MEANING.get(name)
            values = f"{_shown(theirs)}, and {_shown(ours)} is wanted"
            texts.append(f"{name}: {values}" if meaning is None else f"{meaning} ({values})")
    return texts


def _pairs(found: Load, wanted: Load) -> Iterator[tuple[str, tuple[Any, Any]]]:
    yield "path", (found.path, wanted.path)
    for name in Origin.__struct_fields__:
        yield name, (getattr(found.origin, name, None), getattr(wanted.origin, name, None))
    theirs, ours = msgspec.structs.asdict(found.config), msgspec.structs.asdict(wanted.config)
    for name in theirs:
        yield name, (theirs[name], ours[name])
    yield "window_steps", (found.window_steps, wanted.window_steps)
    yield "groups", (found.groups, wanted.groups)


def _shown(value: object) -> str:
    return str(value)[:100]
