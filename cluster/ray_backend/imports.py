"""Functions and classes for ``ray.remote`` that import our packages. They never import a user's file of the same name.

Ray puts the driver's working and script folders first on the module path of its processes: a script there called
``cluster.py`` or ``torch.py`` would be imported in place of the package. The objects made here reach a process by value, and
put its module path in order before they import anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cluster

HOME = str(Path(cluster.__file__).parent.parent)


def _made_importer(home: str) -> Callable[[str, str], Any]:
    def load(module: str, name: str) -> Any:
        """A module's attribute, from the folder in which the driver found the package."""
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
    load = _made_importer(HOME)

    def call(*arguments: Any) -> Any:
        return load(module, name)(*arguments)

    call.__name__ = call.__qualname__ = name
    return call


def actor(module: str, name: str) -> type:
    """A class for ``ray.remote`` that imports another class, and passes calls on to an object of it.

    It has the methods of both of our actors; each of them has only some.
    """
    load = _made_importer(HOME)

    class Actor:
        def __init__(self, *arguments: Any) -> None:
            self._there = load(module, name)(*arguments)

        def process(self) -> bytes:
            return self._there.process()

        def describe(self) -> bytes:
            return self._there.describe()

        def command(self, message: bytes) -> bytes:
            return self._there.command(message)

        def events(self, message: bytes) -> Iterator[bytes]:
            yield from self._there.events(message)

        def call(self, message: bytes) -> bytes:
            return self._there.call(message)

    Actor.__name__ = Actor.__qualname__ = name  # also the process's name
    return Actor
