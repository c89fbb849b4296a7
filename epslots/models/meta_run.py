"""Runs of models on the meta device: zeros where one asks for values, and shapes that are worked out once.

torch works most shapes out in Python, in 50 to 200 microseconds an operation; and a model's layers repeat their operations.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_MOST_KNOWN = 50_000


class MetaRun(TorchDispatchMode):
    """Within the context, meta tensors have the shapes that they have without it, and zero or False for values.

    Some models request a value, and continue with the same shapes for any answer: has the sequence outgrown the frequencies
    that phimoe's rotary embedding was trained with? Other devices' tensors are as ever.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        if not _makes_tensors(func):
            return func(*args, **kwargs)
        try:
            call = func, _form(args), _form(tuple(kwargs.items())), torch.get_default_dtype()
            known = _known.get(call)
        except TypeError:  # with an argument that can't be known again
            return func(*args, **kwargs)
        if known is None:
            result = func(*args, **kwargs)
            _remember(call, result)
            return result
        made = [torch.empty_strided(shape, strides, dtype=dtype, device="meta") for shape, strides, dtype in known]
        return made[0] if len(made) == 1 else tuple(made)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here: torch would guard against it in each call, which takes longer than an answer."""
        return False


# The results of calls on meta tensors alone, as shapes, strides and dtypes.
_known: dict[object, list[tuple[torch.Size, tuple[int, ...], torch.dtype]]] = {}


def _remember(call: object, result: Any) -> None:
    made = result if isinstance(result, tuple) else (result,)
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    if all(isinstance(each, torch.Tensor) and each.is_meta for each in made):
        _known[call] = [(each.shape, each.stride(), each.dtype) for each in made]


@functools.cache
def _makes_tensors(func: Any) -> bool:
    """Whether an operation returns tensors, none of which shares an argument's memory."""
    results = [(str(result.type), result.alias_info) for result in func._schema.returns]
    return results != [] and all(each == ("Tensor", None) for each in results)


def _form(value: Any) -> object:
    """The part of an argument that an operation's result depends on; raises TypeError if that is its values."""
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            raise TypeError("values count")
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple([_form(each) for each in value])
    return type(value), value  # 1, 1.0 and True are equal, and lead to different dtypes
