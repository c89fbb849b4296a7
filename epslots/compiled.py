"""Decisions as machine code: loops over a layer's experts, written in plain Python and compiled by numba.

A step's decisions about a few hundred experts are a few thousand integer operations: microseconds, where a dozen numpy calls
for each rule took a millisecond. A compiled function takes C-contiguous arrays and integers, writes into its arguments or
returns new arrays, and calls compiled functions of its own package only (numba itself sees no changes in other modules).

Compiling takes half a minute, once on a machine: processes that start together leave it to one of them. The code is kept in
``compiled/`` of the user's cache, a folder for each state of a module; where that isn't writable, in the module's folder; else
nowhere. NUMBA_CACHE_DIR isn't read. numba pickles the code: trust it as far as the ``.pyc`` files beside it. ``load`` calls
``prepare``, so that no step waits for it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import llvmlite
import llvmlite.binding
import numba
from numba.core import config
from numba.core.caching import CompileResultCacheImpl, FunctionCache, InTreeCacheLocator, UserWideCacheLocator
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature
from numba.extending import register_jitable

from epslots.errors import StoreError
from epslots.private_files import default_cache_dir, locked, make_private_folder
from epslots.progress import counting

logger = logging.getLogger(__name__)

# Longer than finding kept code takes: from then on, functions are being compiled, and a progress bar is shown.
_SEARCH_S = 1.5

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Functions that have yet to be compiled, with their signatures, in order of definition: callers after the functions they call.
_waiting: list[tuple[Any, str]] = []
_lock = threading.Lock()


@functools.cache
def _sources(module: str, path: Path) -> bytes:
    """The sources of a module's compiled code: its own, and those that it imports from its package."""
    source, package = path.read_bytes(), module.rpartition(".")[0]
    names = re.findall(rf"^from {re.escape(package)}\.(\w+) import", source.decode(), re.MULTILINE) if package else []
    imported = [(f"{package}.{name}", path.with_name(f"{name}.py")) for name in names]
    return b"".join([source, *(_sources(*each) for each in imported if each[1].exists())])


@functools.cache
def _folder(module: str, path: str) -> str:
    """The cache folder of a module's code, by its sources, the machine and the compiler's version."""
    machine = llvmlite.binding.get_host_cpu_name(), llvmlite.binding.get_host_cpu_features().flatten()
    settings = config.USING_SVML, config.BOUNDSCHECK, config.OPT
    about = repr((numba.__version__, llvmlite.__version__, *machine, *map(str, settings), module))
    key = hashlib.sha256(about.encode() + _sources(module, Path(path))).hexdigest()[:16]
    return str(default_cache_dir() / "compiled" / key)


@functools.cache
def _is_private(folder: Path) -> bool:
    """Whether a folder belongs to this user or to root; made if it is missing."""
    try:
        make_private_folder(folder)
    except StoreError as error:
        logger.warning("compiled code isn't read or kept there: %s", error)
        return False
    return True


class _BySource(InTreeCacheLocator):
    """Keeps code by its source, so that a checkout, a wheel and a job's working folder share it."""

    def __init__(self, function: Callable[..., Any], path: str) -> None:
        super().__init__(function, path)
        self._cache_path = _folder(function.__module__, path)

    def ensure_cache_path(self) -> None:
        """Make the cache folder, in one that no other user can write to: numba pickles the code."""
        folder = Path(self._cache_path)
        for ours in (folder.parent.parent, folder.parent, folder):
            if not _is_private(ours):
                raise PermissionError(errno.EACCES, "another user's", str(ours))
        super().ensure_cache_path()


class _Code(CompileResultCacheImpl):
    _locator_classes: ClassVar = [_BySource, InTreeCacheLocator, UserWideCacheLocator]


class _Cache(FunctionCache):
    """A cache that may be broken, full or read-only: then code is compiled as without a cache."""

    _impl_class = _Code

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:
            logger.warning("compiled code in %s can't be read and is made anew: %r", self.cache_path, error)
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            logger.warning("compiled code can't be kept in %s: %r", self.cache_path, error)


def compiled(signature: str) -> Callable[[_Function], _Function]:
    """Compile a function for one signature in numba's notation: ``"int64(int64[::1], b1[:, ::1])"``."""

    def keep(function: _Function) -> _Function:
        dispatcher = numba.njit(function)
        _waiting.append((dispatcher, signature))
        return cast(_Function, dispatcher)

    return keep


def callback(signature: str) -> Callable[[Callable[..., None]], Any]:
    """Compile a function as ``compiled`` does, for callers in C: its ``address`` is valid after ``prepare``.

    It must raise nothing: such an error is printed and goes no further.
    """

    def keep(function: Callable[..., None]) -> Any:
        called = CFunc(function, normalize_signature(signature), locals={}, options={})
        _waiting.append((called, signature))
        return called

    return keep


def inlined(function: _Function) -> _Function:
    """Compile a function into each compiled function that calls it, as if its body stood there."""
    return cast(_Function, register_jitable(inline="always")(function))


def prepare(*, shown: bool | None = None) -> None:
    """Compile all functions defined so far for their signatures; other types are a TypeError from then on.

    A function that is called earlier is compiled at that call, and not kept.

    Args:
        shown: whether to draw a progress bar if it takes long; None: if standard error is a terminal.
    """
    with _lock:
        _load_kept()
        if not _waiting:
            return
        title = "compiling the planner, once on this machine"
        logger.info("%s", title)
        with counting(title, len(_waiting), shown) as advance, contextlib.ExitStack() as others:
            with contextlib.suppress(OSError, StoreError):  # where no lock can be, each process compiles
                make_private_folder(default_cache_dir() / "compiled")
                others.enter_context(locked(default_cache_dir() / "compiled" / "lock"))
            while _waiting:
                _compile_next()
                advance(1)


def prepare_in_background() -> None:
    """Load kept code in a thread; a later ``prepare`` waits for it, and compiles the rest."""

    def load() -> None:
        with _lock:
            _load_kept()

    threading.Thread(target=load, name="epslots-compiled").start()


def _load_kept() -> None:
    """Load kept code, for ``_SEARCH_S`` at most: where nothing was kept, it would compile."""
    ends = time.perf_counter() + _SEARCH_S
    while _waiting and time.perf_counter() < ends:
        _compile_next()


def _compile_next() -> None:
    dispatcher, signature = _waiting[0]
    if isinstance(dispatcher, CFunc) and not config.DISABLE_JIT:
        called: Any = dispatcher
        with contextlib.suppress(RuntimeError, OSError):
            called._cache = _Cache(called._pyfunc)
        called.compile()
    elif getattr(dispatcher, "_can_compile", False):  # not interrupted here before; and NUMBA_DISABLE_JIT isn't set
        # Without a place to keep the code, it is compiled all the same.
        with contextlib.suppress(RuntimeError, OSError):
            dispatcher._cache = _Cache(dispatcher.py_func)
        dispatcher.compile(normalize_signature(signature)[0])
        dispatcher.disable_compile()
    _waiting.pop(0)
