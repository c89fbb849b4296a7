"""``code_of``: whether two of transformers' functions, of which most architectures have a copy, are the same."""

from __future__ import annotations

from types import FunctionType
from typing import Any


def code_of(function: Any) -> tuple[object, ...] | None:
    """A function's code without its docstring, to compare with another's; None if it is no plain function."""
    if not isinstance(function, FunctionType):
        return None
    code = function.__code__
    constants = tuple(None if constant == function.__doc__ else constant for constant in code.co_consts)
    return code.co_code, constants, code.co_names, function.__defaults__
