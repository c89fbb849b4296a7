"""Imports of torch and transformers: a quarter faster than usual, or not before they are needed."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Collect no garbage meanwhile: half a million objects come and stay, and would be looked through again and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def defer_import(package: str) -> None:
    """Let imports of a package do nothing until an attribute or a part of it is asked for; then it is imported as usual.

    Does nothing if the package is imported already, or isn't installed. Python's own ``importlib.util.LazyLoader`` isn't for
    several threads, and imports the package if only its specification is asked for, as transformers does.
    """
    if package in sys.modules or (spec := importlib.util.find_spec(package)) is None:
        return
    module = importlib.util.module_from_spec(spec)
    _paths[package] = module.__dict__.pop("__path__")  # without it, no part of the package is found
    module.__class__ = _Deferred
    sys.modules[package] = module


_paths: dict[str, Any] = {}
"""Where parts of packages are found whose import was deferred."""
_importing = threading.RLock()


class _Deferred(ModuleType):
    """A package whose import was deferred."""

    def __getattr__(self, name: str) -> Any:
        with _importing:  # another thread waits until all is there
            if (path := _paths.pop(self.__name__, None)) is not None:
                self.__path__ = path
                assert self.__spec__ is not None and self.__spec__.loader is not None
                self.__spec__.loader.exec_module(self)
                self.__class__ = ModuleType
            elif type(self) is _Deferred:  # asked while it is imported, or after that has failed
                raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self, name)
