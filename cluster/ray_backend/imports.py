"""What Ray's processes import of ours, whatever the driver's folder holds.

Ray puts the driver's working and script folders first on the module path of its processes, so that a script there that is
called ``cluster.py`` or ``torch.py`` would be imported in place of the package. The functions and classes that are made here
reach a process by value, and put its path in order before they import anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cluster

_HOME = str(Path(cluster.__file__).parent.parent)


def _made_importer(home: str) -> Callable[[str, str], Any]:
    def load(module: str, name: str) -> Any:
        """A module's attribute, from the place where the driver has it."""
        import importlib
        import sys
        from pathlib import Path

        import ray._private.worker as ray_worker

        given = [*ray_worker.global_worker.core_worker.get_job_config().py_driver_sys_path, Path.cwd()]
        last = {"", *map(str, given), *(str(Path(folder).resolve()) for folder in given)}
        sys.path[:] = [entry for entry in sys.path if entry not in last] + [entry for entry in sys.path if entry in last]
        if home not in sys.path or home in last:
            sys.path.insert(0, home)
        return getattr(importlib.import_module(module), name)

    return load


def function(module: str, name: str) -> Callable[..., Any]:
    """A function for ``ray.remote`` that imports another and calls it."""
    load = _made_importer(_HOME)

    def call(*arguments: Any) -> Any:
        return load(module, name)(*arguments)

    call.__name__ = call.__qualname__ = name
    return call


def actor(module: str, name: str) -> type:
    """A class for ``ray.remote`` that imports another and hands everything to an object of it.

    Its methods are those that our actors have; which of them may be called is the other class's matter.
    """
    load = _made_importer(_HOME)

    class Actor:
        def __init__(self, *arguments: Any) -> None:
            self._there = load(module, name)(*arguments)

        def hello(self) -> bytes:
            return self._there.hello()

        def command(self, message: bytes) -> bytes:
            return self._there.command(message)

        def events(self) -> Iterator[bytes]:
            yield from self._there.events()

        def call(self, message: bytes) -> bytes:
            return self._there.call(message)

    Actor.__name__ = Actor.__qualname__ = name  # also the process's name
    return Actor
