"""Steps of one token a row, in which transformers' attention modules are one compiled call (``moe/attention_step.py``).

Of modules whose code is Llama's or Mixtral's, or Qwen3's, which norms each head's queries and keys first: many architectures
have a copy of one of these. Every call checks the conditions of a module's step; where one fails, the module's own forward
pass runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mixtral.modeling_mixtral import MixtralAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from epslots.generation.row_layers import PooledTokens, TokenPool
from epslots.models.dense_linear import InPlaceLinear, hooks_see_all, memory_of
from epslots.models.dense_norm import norm_of
from epslots.models.dense_rotation import turns_whole_heads
from epslots.models.same_code import code_of
from epslots.moe import cell_loops
from epslots.moe.attention_step import AttentionShape, AttentionWeights, Cells, attend

_PLAIN = {code_of(kind.forward) for kind in (LlamaAttention, MixtralAttention)}
_NORMED = {code_of(kind.forward) for kind in (Qwen3Attention, Qwen3MoeAttention)}
_PROJECTIONS, _NORMS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_norm", "k_norm")
_Found = tuple[AttentionShape, AttentionWeights]


def attention_step_of(module: nn.Module) -> AttentionStep | None:
    """The step of an attention module; None if it computes something else, or hasn't been loaded for a CPU."""
    code = code_of(type(module).forward)
    if code not in _PLAIN | _NORMED or not turns_whole_heads(module):
        return None
    projections = [module._modules.get(name) for name in _PROJECTIONS]
    if not all(one is not None and isinstance(vars(one).get("forward"), InPlaceLinear) for one in projections):
        return None
    return AttentionStep(module, normed=code in _NORMED)


def is_plain(settings: Mapping[str, Any]) -> bool:
    """Whether an attention function's settings ask for nothing that loops don't compute."""
    return settings.get("softcap") is None and settings.get("position_bias") is None and not settings.get("dropout")


class AttentionStep:
    """Stands for the ``forward`` of one module.

    Args:
        normed: whether each head's queries and keys are normed.

    Attributes:
        replaced: the module's own ``forward``.
    """

    def __init__(self, module: Any, *, normed: bool) -> None:
        self._module, self.replaced = module, module.forward
        self._norms = _NORMS if normed else ()
        parts = ((name, module._modules[name]) for name in (*_PROJECTIONS, *self._norms))
        self._parts = [(name, part, vars(part).get("forward")) for name, part in parts]
        self._latest: tuple[list[Any], _Found | None] = [], None  # one: threads may share it

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The one of the module's class."""
        layer = None if past_key_values is None else past_key_values.layers[self._module.layer_idx]
        known = isinstance(layer, PooledTokens) and layer.appends_both and layer.step.width == 1
        if known and not self._module.training and is_plain(kwargs):
            found = self._attend(hidden_states, position_embeddings, attention_mask, layer)
            if found is not None:
                return found, None
        return self.replaced(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)

    def _attend(self, hidden_B1H: torch.Tensor, angles: Any, mask: torch.Tensor | None, layer: Any) -> torch.Tensor | None:
        """[B, 1, H]; None if the loops don't take it."""
        found = self.weights_for(hidden_B1H)
        if found is None or not _takes_angles(angles, hidden_B1H, found[0].size):
            return None
        shape, weights = found
        keys, values, new_B, read_BS = layer.cells()
        rows = hidden_B1H.shape[0]
        if not (_takes_pool(keys, shape, hidden_B1H.dtype) and _takes_pool(values, shape, hidden_B1H.dtype)):
            return None
        if not read_BS.is_contiguous() or read_BS.dtype is not torch.int32:
            return None
        if mask is not None:
            seen = (rows, 1, 1, read_BS.shape[0] // rows)
            if mask.dtype is not torch.bool or mask.shape != seen or mask.stride(3) != 1:
                return None
        cells = Cells(keys.cells, values.cells, new_B, read_BS)
        found_BH = attend(hidden_B1H[:, 0], shape, weights, angles, cells, mask)
        layer.count_new()
        return found_BH[:, None]

    def weights_for(self, hidden_B1H: torch.Tensor) -> _Found | None:
        dtype = hidden_B1H.dtype
        if torch.is_grad_enabled() or not hidden_B1H.is_cpu or torch.is_autocast_enabled("cpu") or hooks_see_all():
            return None
        attention = self._module
        modules, about = attention._modules, [hidden_B1H.shape, dtype, attention.head_dim, attention.scaling]
        for name, module, forward in self._parts:
            if modules.get(name) is not module or vars(module).get("forward") is not forward:
                return None
            if module._forward_hooks or module._forward_pre_hooks:
                return None
            for each in module._parameters.values():
                about.append(None if each is None else memory_of(each))
        held, found = self._latest
        if about != held:
            found = self._find_weights(hidden_B1H)
            self._latest = about, found
        return found if hidden_B1H.is_contiguous() else None

    def _find_weights(self, hidden_B1H: torch.Tensor) -> _Found | None:
        (rows, _, hidden), dtype = hidden_B1H.shape, hidden_B1H.dtype
        projections = [self._module._modules[name] for name in _PROJECTIONS]
        shape = _shape_of(projections, hidden, int(self._module.head_dim), float(self._module.scaling))
        if shape is None or not shape.fits(dtype):
            return None
        products = [vars(one)["forward"].ready_for(rows) for one in projections if one.weight.dtype is dtype]
        if len(products) < len(projections) or None in products:
            return None
        norms = [norm_of(self._module._modules[name], dtype) for name in self._norms]
        if not all(norm is not None and norm[0].shape == (shape.size,) for norm in norms):
            return None
        return shape, AttentionWeights(*products, *(norms or (None, None)))


def _shape_of(projections: list[Any], hidden: int, size: int, scale: float) -> AttentionShape | None:
    """The shape of attention by matrices as they are now; None if they don't suit each other, or are computed at each use."""
    if not all(type(one) is nn.Linear and one._parameters.get("weight") is not None for one in projections):
        return None
    q, k, v, o = (tuple(one.weight.shape) for one in projections)
    queries, keys = q[0] // size * size, k[0] // size * size
    if not keys or (q, k, v, o) != ((queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)):
        return None
    return AttentionShape(queries // size, keys // size, size, scale)


def _takes_pool(pool: TokenPool, shape: AttentionShape, dtype: torch.dtype) -> bool:
    cells = pool.cells
    plain = cells.dtype is dtype and pool.dimensions == (0, 2) and cells.shape[1:] == (shape.groups, shape.size)
    return plain and cell_loops.has_whole_cells(cells)


def _takes_angles(angles: Any, hidden_B1H: torch.Tensor, size: int) -> bool:
    cos, sin = angles
    alike = cos.dtype is sin.dtype is hidden_B1H.dtype and cos.shape == sin.shape and cos.stride() == sin.stride()
    return alike and cos.shape in ((1, 1, size), (hidden_B1H.shape[0], 1, size)) and cos.stride(2) == 1
