"""Entry points that tests set in the place of the installed packages'."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint


def named_only(entry: EntryPoint) -> Callable[..., list[EntryPoint]]:
    """``entry_points`` that finds this one if a name is asked for, and no commands."""
    return lambda **wanted: [entry] if "name" in wanted else []
