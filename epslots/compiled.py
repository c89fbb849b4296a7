"""Decisions as machine code: loops over a layer's experts, written in plain Python and compiled by numba.

What a step decides about a few hundred experts is a few thousand integer operations: microseconds, where a dozen calls into
numpy for each rule came to a millisecond. A compiled function takes C-contiguous arrays and integers and nothing else, writes
into arrays that it is given or returns new ones, and calls compiled functions of its own module only: numba notices no change
elsewhere to what it has kept.

Compiling takes half a minute, once on a machine: the code is kept in the user's cache, or where that can't be written beside
the module. ``prepare`` does it, so that no step waits for it.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import numba
import platformdirs
from numba.core.caching import CompileResultCacheImpl, FunctionCache, InTreeCacheLocator, UserWideCacheLocator
from numba.extending import register_jitable

from epslots.counting import counting

logger = logging.getLogger(__name__)

_LONG_S = 1.5

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Functions that have yet to be compiled, in the order in which they were defined: a caller stands behind what it calls.
_waiting: list[tuple[Any, str]] = []


class _BySource(InTreeCacheLocator):
    """The same code is compiled once for a user, wherever it lies: in a checkout, a wheel, a job's working folder."""

    def __init__(self, function: Callable[..., Any], path: str) -> None:
        super().__init__(function, path)
        folder = Path(platformdirs.user_cache_dir("epslots")) / "compiled"
        source = function.__module__.encode() + b"\n" + Path(path).read_bytes()  # what is kept names the module
        self._cache_path = str(folder / hashlib.sha256(source).hexdigest()[:16])


class _Code(CompileResultCacheImpl):
    _locator_classes: ClassVar = [_BySource, InTreeCacheLocator, UserWideCacheLocator]


class _Cache(FunctionCache):
    _impl_class = _Code


def compiled(signature: str) -> Callable[[_Function], _Function]:
    """Compile a function for these types, as numba spells them: ``"int64(int64[::1], b1[:, ::1])"``."""

    def keep(function: _Function) -> _Function:
        dispatcher = numba.njit(function)
        dispatcher._cache = _Cache(function)
        _waiting.append((dispatcher, signature))
        return cast(_Function, dispatcher)

    return keep


def part(function: _Function) -> _Function:
    """A function that only compiled ones of its module call; compiled with them."""
    return cast(_Function, register_jitable(function))


def prepare(*, shown: bool = False) -> None:
    """Compile what has been defined by now, for its own types alone: others are a TypeError from then on.

    A function that is called before is compiled then.

    Args:
        shown: whether a progress bar is drawn where it takes long.
    """
    began = time.perf_counter()
    while _waiting and time.perf_counter() < began + _LONG_S:  # time enough to find what has been kept
        _compile_next()
    if not _waiting:
        return
    title = "compiling the planner, once on this machine"
    logger.info("%s", title)
    with counting(title, len(_waiting), shown) as advance:
        while _waiting:
            _compile_next()
            advance(1)


def _compile_next() -> None:
    dispatcher, signature = _waiting[0]
    dispatcher.compile(signature)
    dispatcher.disable_compile()
    _waiting.pop(0)
