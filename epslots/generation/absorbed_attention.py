"""Attention on latents, for models whose caches keep latents: multi-head latent attention (MLA).

Such a layer caches C numbers for each token, the *latent*, from which ``kv_b_proj`` makes keys and values of all heads, and R
numbers that carry the position. transformers expands all latents in every step: with DeepSeek-V3, 17 million multiplications
for each token of the context and layer. *Absorption* folds the projection into queries and results instead, which then meet
latents as they are (DeepSeek-V2, arXiv:2405.04434, section 2.1.2; ``attn_impl="absorb"`` in DeepSeek-V3's inference code).

Suffixes: B rows, H heads, T queries of a row, L tokens of its past and of this step, K tokens that an indexer selected; C
numbers of a latent; N and R those of a key without and with position, D = N + R; V those of a value, P = N + V.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from epslots.generation.attention_switch import AttentionSwitch
from epslots.models.dense_linear import is_plain_linear

logger = logging.getLogger(__name__)

IMPLEMENTATION = "epslots_latents"
# Numbers in the scores, or in the expanded keys and values, that are in memory at a time: heads are computed in parts.
PART_NUMBERS = 2**25


def latent_attentions(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules whose cache keeps latents in place of keys and values."""
    return [module for module in model.get_decoder().modules() if hasattr(module, "expand_kv")]


class AbsorbedAttention:
    """Lets a model attend to latents, within a context.

        attention = AbsorbedAttention(model)
        with attention.active():
            model(...)

    Outside of the context nothing of the model is changed. A model that keeps no latents, or whose projections aren't plain
    matrices, is left as it is in the context, too.

    Args:
        model: uses a cache of its own class: transformers' paged cache keeps what latents expand to.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._modules = latent_attentions(model)
        if self._modules and (obstacle := _obstacle(model, self._modules)):
            logger.warning("%s: latents are expanded in every step, because %s", type(model).__name__, obstacle)
            self._modules = []
        self._switch = AttentionSwitch(model, self._modules)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the context, this model's forward passes attend to latents. Not for several threads at once."""
        if not self._modules:
            yield
            return
        own = [vars(module).get("expand_kv") for module in self._modules]
        try:
            for module in self._modules:
                vars(module)["expand_kv"] = _not_expanded
            with self._switch.to(IMPLEMENTATION):
                yield
        finally:
            for module, expand in zip(self._modules, own, strict=True):
                del vars(module)["expand_kv"]
                if expand is not None:
                    vars(module)["expand_kv"] = expand


def _obstacle(model: PreTrainedModel, modules: list[nn.Module]) -> str | None:
    """Why the model's latents can't be absorbed, as a sentence's end; None if they can."""
    implementation = model.get_decoder().config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        return f"its attention implementation is {implementation!r} (allowed: sdpa, eager)"
    for projection in (module.kv_b_proj for module in modules):
        if not is_plain_linear(projection) or projection.bias is not None:
            return f"kv_b_proj is no plain matrix ({projection})"
    return None


def _not_expanded(kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands for a module's ``expand_kv``: latents [B, 1, L, C] for its keys, and positions [B, 1, L, R] for its values."""
    return kv_nope, k_rot


class Sizes(NamedTuple):
    """The sizes of a head: C, N, R and V."""

    latent: int
    nope: int
    rotary: int
    value: int

    def absorbs(self, queries: int, keys: int) -> bool:
        """Whether attending to latents takes fewer multiplications than expanding them, for one head and row.

        All heads and rows have the same numbers. A single query absorbs, a whole prompt expands: for DeepSeek-V3, chunks of up
        to 170 tokens absorb, if the context is long.
        """
        projections, pairs = self.latent * (self.nope + self.value), queries * keys
        absorbed = queries * projections + pairs * (2 * self.latent + self.rotary)
        expanded = keys * projections + pairs * (self.nope + self.rotary + self.value)
        return absorbed < expanded

    def numbers(self, queries: int, *, absorbs: bool) -> int:
        """Numbers in memory for each token and head: its scores; and if it is expanded, its projections and its key."""
        return queries if absorbs else queries + 2 * self.nope + self.rotary + self.value


def _attend(
    module: Any,
    query_BHTD: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    indices: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function for latents; returns [B, T, H, V] in the queries' dtype.

    Args:
        module: has ``kv_b_proj``; its ``sinks`` [H], if any, are scores whose values are zero.
        query_BHTD: queries, rotated.
        key: latents [B, 1, L, C].
        value: the part of the keys with positions, [B, 1, L, R].
        attention_mask: [B, 1, T, L], True where a query attends, or added to the scores; None = to its own and earlier tokens.
        scaling: of the scores.
        indices: [B, T, K], the tokens that the layer's indexer selected for each query (DeepSeek's sparse attention); None =
            all. A layer puts them into the mask itself for "sdpa" and "eager" by these names, and passes them to others.
        kwargs: of other implementations; the mask says the same.
    """
    latent_BLC, rotary_BLR, mask_B1TL = key[:, 0], value[:, 0], attention_mask
    if indices is not None:
        assert mask_B1TL is not None, "an indexer needs the mask, too"
        latent_BLC, rotary_BLR, mask_B1TL = _select(latent_BLC, rotary_BLR, mask_B1TL, indices.long())
    rows, heads, queries, _ = query_BHTD.shape
    weight_HPC = module.kv_b_proj.weight.view(heads, -1, latent_BLC.shape[2])
    nope, sinks = module.qk_nope_head_dim, getattr(module, "sinks", None)
    sizes = Sizes(latent_BLC.shape[2], nope, rotary_BLR.shape[2], weight_HPC.shape[1] - nope)
    absorbs = sizes.absorbs(queries, latent_BLC.shape[1])
    attend = _absorbed if absorbs else _expanded
    at_a_time = max(1, PART_NUMBERS // (rows * latent_BLC.shape[1] * sizes.numbers(queries, absorbs=absorbs)))
    parts_BHTV = []
    for first in range(0, heads, at_a_time):
        part = slice(first, first + at_a_time)
        scores = _Softmax(scaling, mask_B1TL, None if sinks is None else sinks[part])
        parts_BHTV.append(attend(query_BHTD[:, part], latent_BLC, rotary_BLR, weight_HPC[part], scores))
    result_BHTV = parts_BHTV[0] if len(parts_BHTV) == 1 else torch.cat(parts_BHTV, dim=1)
    return result_BHTV.transpose(1, 2).contiguous(), None


def _select(
    latent_BLC: torch.Tensor, rotary_BLR: torch.Tensor, mask_B1TL: torch.Tensor, index_BTK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens that queries may attend to, with a mask of their own: the selected ones of a single query, or all, masked."""
    rows, queries, selected = index_BTK.shape
    mask_B1TL = mask_B1TL.expand(rows, -1, -1, -1)
    if queries == 1 and selected < latent_BLC.shape[1]:
        index_BK1 = index_BTK.transpose(1, 2)
        latent_BKC = latent_BLC.gather(1, index_BK1.expand(-1, -1, latent_BLC.shape[2]))
        rotary_BKR = rotary_BLR.gather(1, index_BK1.expand(-1, -1, rotary_BLR.shape[2]))
        return latent_BKC, rotary_BKR, mask_B1TL.gather(3, index_BTK[:, None])
    left_B1TL = torch.ones_like(mask_B1TL, dtype=torch.bool).scatter_(3, index_BTK[:, None], False)
    if mask_B1TL.dtype == torch.bool:
        return latent_BLC, rotary_BLR, mask_B1TL & ~left_B1TL
    return latent_BLC, rotary_BLR, mask_B1TL.masked_fill(left_B1TL, torch.finfo(mask_B1TL.dtype).min)


@dataclass(frozen=True)
class _Softmax:
    """From scores to weights, for some heads."""

    scale: float
    mask_B1TL: torch.Tensor | None
    sink_H: torch.Tensor | None

    def weights(self, scores_BHTL: torch.Tensor) -> torch.Tensor:
        """The softmax in fp32 of scaled scores, in their dtype. A query that attends to nothing gets finite weights."""
        queries, keys = scores_BHTL.shape[2:]
        wide = scores_BHTL.float()
        least = torch.finfo(wide.dtype).min
        if self.mask_B1TL is None:
            if queries > 1:
                earlier_TL = torch.ones(queries, keys, dtype=torch.bool, device=wide.device).tril()
                wide = wide.masked_fill(~earlier_TL, least)
        elif self.mask_B1TL.dtype == torch.bool:
            wide = wide.masked_fill(~self.mask_B1TL, least)
        else:
            wide = wide + self.mask_B1TL
        if self.sink_H is not None:
            sink_BHT1 = self.sink_H.float().view(1, -1, 1, 1).expand(*wide.shape[:3], 1)
            wide = torch.cat([wide, sink_BHT1], dim=-1)
        return wide.softmax(dim=-1)[..., :keys].to(scores_BHTL.dtype)


def _absorbed(
    query_BHTD: torch.Tensor, latent_BLC: torch.Tensor, rotary_BLR: torch.Tensor, weight_HPC: torch.Tensor, scores: _Softmax
) -> torch.Tensor:
    """Some heads' attention [B, H, T, V] on latents as they are: queries go into their space, and results come back."""
    (rows, heads, queries, _), nope = query_BHTD.shape, query_BHTD.shape[3] - rotary_BLR.shape[2]
    key_HNC, value_HVC = weight_HPC[:, :nope], weight_HPC[:, nope:]
    query_BHTC = torch.einsum("bhtn,hnc->bhtc", query_BHTD[..., :nope], key_HNC)
    # All heads share a row's latents: their queries are one matrix.
    by_position = torch.bmm(query_BHTD[..., nope:].reshape(rows, heads * queries, -1), rotary_BLR.transpose(1, 2))
    score = torch.baddbmm(
        by_position,
        query_BHTC.reshape(rows, heads * queries, -1),
        latent_BLC.transpose(1, 2),
        beta=scores.scale,
        alpha=scores.scale,
    )
    weights_BHTL = scores.weights(score.view(rows, heads, queries, -1))
    result = torch.bmm(weights_BHTL.view(rows, heads * queries, -1), latent_BLC)
    return torch.einsum("bhtc,hvc->bhtv", result.view(rows, heads, queries, -1), value_HVC)


def _expanded(
    query_BHTD: torch.Tensor, latent_BLC: torch.Tensor, rotary_BLR: torch.Tensor, weight_HPC: torch.Tensor, scores: _Softmax
) -> torch.Tensor:
    """Some heads' attention [B, H, T, V] on their keys and values, as the model computes it by itself."""
    (_, heads, queries, _), nope = query_BHTD.shape, query_BHTD.shape[3] - rotary_BLR.shape[2]
    states_BHLP = F.linear(latent_BLC, weight_HPC.flatten(0, 1)).unflatten(2, (heads, -1)).transpose(1, 2)
    rotary_BHLR = rotary_BLR[:, None].expand(-1, heads, -1, -1)
    key_BHLD, value_BHLV = torch.cat([states_BHLP[..., :nope], rotary_BHLR], dim=3), states_BHLP[..., nope:]
    if scores.sink_H is None:
        mask_B1TL = scores.mask_B1TL
        causal = mask_B1TL is None and queries > 1
        return F.scaled_dot_product_attention(
            query_BHTD, key_BHLD, value_BHLV, attn_mask=mask_B1TL, is_causal=causal, scale=scores.scale
        )
    weights_BHTL = scores.weights(query_BHTD @ key_BHLD.transpose(2, 3) * scores.scale)
    return weights_BHTL @ value_BHLV


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
