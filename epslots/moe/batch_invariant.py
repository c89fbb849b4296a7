"""Replacements of torch functions whose results depend on the batch.

    with batch_invariant_functions():
        model(...)

Inside, in this thread, a row's bits are a function of that row alone. Matrix products with a weight are computed in blocks of
rows (``row_blocks.py``). torch's vectorised activations round the last few elements of a tensor by other, scalar code: silu,
sigmoid, gelu and softplus in fp32; gelu, rsqrt and powers in bf16. Formulas replace them, over functions that tests found to
be free of that: exp, erf, tanh, log1p, sqrt and arithmetic; complex products likewise. ``obstacles`` names all other functions
that aren't known to compute elements or rows one by one. ``batch_invariant_ops`` (Thinking Machines Lab) and vLLM replace
kernels for a whole process, by ``torch.library``; this ``torch.overrides`` mode leaves other models of the process alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from epslots.moe.row_blocks import product

Replacement = Callable[..., Any]
"""Takes the replaced function's arguments; returns NotImplemented if it has no batch-invariant result for them."""


def _linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    flat = product(rows.reshape(-1, rows.shape[-1]), weight.t(), bias)
    return flat.view(*rows.shape[:-1], weight.shape[0])


def _matmul(rows: torch.Tensor, other: torch.Tensor) -> Any:
    if other.dim() == 2 and rows.dim() >= 2:
        return product(rows.reshape(-1, rows.shape[-1]), other).view(*rows.shape[:-1], other.shape[1])
    if rows.dim() >= 2 and rows.shape[-1] == 1:
        return torch.matmul(rows, other)  # no sum
    return NotImplemented


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _silu(x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    wide = _wide(x)
    result = (wide / (1 + torch.exp(-wide))).to(x.dtype)
    return x.copy_(result) if inplace else result


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    return (1 / (1 + torch.exp(-_wide(x)))).to(x.dtype)


def _gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    wide = _wide(x)
    if approximate == "tanh":
        curve = torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * (wide * wide * wide)))
    else:
        curve = torch.erf(wide * math.sqrt(0.5))
    return (0.5 * wide * (1 + curve)).to(x.dtype)


def _softplus(x: torch.Tensor, beta: float = 1.0, threshold: float = 20.0) -> torch.Tensor:
    wide = _wide(x) * beta
    return (torch.where(wide > threshold, wide, torch.log1p(torch.exp(wide))) / beta).to(x.dtype)


def _rsqrt(x: torch.Tensor) -> torch.Tensor:
    return (1 / torch.sqrt(_wide(x))).to(x.dtype)


def _pow(x: torch.Tensor, exponent: Any) -> Any:
    if torch.is_tensor(exponent):
        return NotImplemented
    if exponent == -0.5:
        return _rsqrt(x)
    if exponent in (0.5, 1, 2, 3):
        return torch.pow(x, exponent)
    return NotImplemented


def _mul(x: Any, other: Any) -> Any:
    complex_ones = [torch.is_tensor(factor) and factor.is_complex() for factor in (x, other)]
    if not any(complex_ones):
        return torch.mul(x, other)
    if complex_ones[0] and isinstance(other, int | float):
        return torch.view_as_complex(torch.view_as_real(x) * other)
    if not all(complex_ones):
        return NotImplemented
    (a, b), (c, d) = torch.view_as_real(x).unbind(-1), torch.view_as_real(other).unbind(-1)
    return torch.view_as_complex(torch.stack((a * c - b * d, a * d + b * c), -1))


_REPLACEMENTS: Mapping[Any, Replacement] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm), _matmul),
    F.silu: _silu,
    **dict.fromkeys((torch.sigmoid, torch.Tensor.sigmoid, F.sigmoid), _sigmoid),
    F.gelu: _gelu,
    F.softplus: _softplus,
    **dict.fromkeys((torch.rsqrt, torch.Tensor.rsqrt), _rsqrt),
    **dict.fromkeys((torch.pow, torch.Tensor.pow, torch.Tensor.__pow__), _pow),
    **dict.fromkeys((torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__), _mul),
}

# Keyword arguments that the replacements know; with others, as ``out``, torch's own function is called.
_KEYWORDS = frozenset({"weight", "bias", "other", "exponent", "inplace", "approximate", "beta", "threshold"})

# The last parts of names, less underscores, of functions that move elements, compute them one by one (exactly, or by code
# without another form for the last ones), or reduce rows one by one. A name doesn't state a sum's dimension: none of the known
# models sums over tokens.
_NAMES = """
abs add and arange argmax bfloat16 bool cat chunk clamp clamp_max clamp_min clone concat contiguous copy cos cumsum data
detach device dim div double dropout dtype embedding empty empty_like eq erf exp expand expand_as expm1 flatten float
floor full full_like gather ge get getitem greater gt half iadd imul index_add index_copy index_select int invert
is_complex is_contiguous is_floating_point isub item itruediv layer_norm le len log log1p logical_and logical_not
logical_or logsumexp long lt masked_fill masked_scatter max maximum mean min minimum movedim mul narrow ndim ne neg
new_empty new_full new_ones new_tensor new_zeros nonzero norm normalize numel one_hot ones ones_like or pad permute polar
radd reciprocal relu repeat repeat_interleave requires_grad reshape rms_norm rsub rtruediv scatter set_grad_enabled
setitem shape sin size softmax sort split sqrt square squeeze stack storage_offset stride sub sum T tanh tensor to topk
transpose tril triu truediv type type_as unbind unflatten unsqueeze var view view_as_complex view_as_real where xor zeros
zeros_like
"""
_BY_ROW = frozenset(_NAMES.split())


class _Replace(TorchFunctionMode):
    """Replaces the functions in ``_REPLACEMENTS``.

    Args:
        unknown: filled with the functions that aren't known to be batch-invariant; None = they aren't looked for.
    """

    def __init__(self, unknown: set[str] | None = None) -> None:
        super().__init__()
        self._unknown = unknown

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replacement, kwargs = _REPLACEMENTS.get(func), kwargs or {}
        if replacement is not None and not kwargs.keys() - _KEYWORDS:
            result = replacement(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if self._unknown is not None and (replacement is not None or not _is_by_row(func)):
            self._unknown.add(_name(func))
        return func(*args, **kwargs)


def _name(func: Any) -> str:
    return resolve_name(func) or getattr(func, "__name__", repr(func))


def _is_by_row(func: Any) -> bool:
    *_, owner, last = ["", *_name(func).split(".")]
    return (owner if last in ("__get__", "__set__") else last).strip("_") in _BY_ROW


def batch_invariant_functions() -> TorchFunctionMode:
    """A context in which results of this thread don't depend on the batch. Contexts may be nested."""
    return _Replace()


def obstacles(run: Callable[[], object]) -> list[str]:
    """Functions that ``run`` calls and that aren't known to be batch-invariant."""
    unknown: set[str] = set()
    with _Replace(unknown):
        run()
    return sorted(unknown)
