"""Finding each MoE layer's router. It is the linear map from the experts' input to the scores that the top k is taken of.

Transformers keeps routers beside the experts, under various names, and no interface leads to them. They are found by their
structure: a module called ``router`` or ``gate`` beside the experts that has one matrix, [experts, hidden size]. A layer has
None if its router is more than a linear map (zaya's is an MLP, DeepSeek-V4's first ones look experts up by the token), or has
another input than the experts (muse_spark projects between the two). ``tests/prefetch/test_predictor.py`` checks every
architecture of the zoo: a router that is found reproduces the model's own choice.

Legend of shape suffixes: T tokens, E experts (identity experts counted), G groups of experts, S experts of a group, H hidden
size.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import SqrtSoftplusActivation

from epslots.models.experts import num_weighted_experts, parameter_shapes

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus"]
_ROUTER_NAMES = {"router", "gate"}
_CORRECTIONS = {"e_score_correction_bias", "expert_bias"}


@dataclass(frozen=True)
class LinearRouter:
    """A linear router, and how its top k is chosen.

    Attributes:
        weight_EH: float, on the model's device; inputs are converted to its dtype.
        bias_E: of the same dtype, part of the logits (gpt_oss); zeros where there is none.
        correction_E: float32, added to the scores only for the choice (DeepSeek-V3); None where there is none.
        scoring: from logits to the scores that the correction is added to, and by which groups are compared.
        groups: number of equal groups of experts, in order; the top k is taken from the best ``top_groups``.
    """

    weight_EH: torch.Tensor
    bias_E: torch.Tensor
    correction_E: torch.Tensor | None = None
    scoring: Scoring = "softmax"
    groups: int = 1
    top_groups: int = 1

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Float32 [T, E]."""
        return nn.functional.linear(hidden_TH.to(self.weight_EH.dtype), self.weight_EH, self.bias_E).float()

    def scores(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """The scores that the top k is taken of, float32 [T, E]; only their order has a meaning."""
        score_TE = self.logits(hidden_TH)
        if self.correction_E is None and self.groups == 1:
            return score_TE
        match self.scoring:
            case "softmax":
                score_TE = score_TE.softmax(-1)
            case "sigmoid":
                score_TE = score_TE.sigmoid()
            case "sqrtsoftplus":
                score_TE = nn.functional.softplus(score_TE).sqrt()
        if self.correction_E is not None:
            score_TE = score_TE + self.correction_E
        if self.groups == 1:
            return score_TE
        score_TGS = score_TE.unflatten(-1, (self.groups, -1))
        # DeepSeek-V3 compares groups by their best two, V2 by their best.
        best_TG = score_TGS.topk(2 if self.scoring == "sigmoid" else 1, -1).values.sum(-1)
        chosen_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter_(1, best_TG.topk(self.top_groups, -1).indices, True)
        return score_TGS.masked_fill(~chosen_TG[..., None], float("-inf")).flatten(-2)

    def top(self, hidden_TH: torch.Tensor, k: int) -> torch.Tensor:
        """The k experts that score highest, best first: int64 [T, k]."""
        return self.scores(hidden_TH).topk(k, -1).indices


def find_routers(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], dtype: torch.dtype = torch.float32
) -> tuple[LinearRouter | None, ...]:
    """The router of each layer; None where it is no linear map of the experts' input.

    Args:
        modules: the experts modules in order, by their path (``experts.experts_modules``).
        dtype: of the routers' weights; they share memory with the model's if these have the same.
    """
    return tuple(_find(model.get_submodule(path.rpartition(".")[0]), module, dtype) for path, module in modules.items())


def agreement(router: LinearRouter, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> float:
    """The share of the model's own choices, ``index_TK``, that ``router`` makes from the experts' input."""
    top_TK = router.top(hidden_TH, index_TK.shape[1])
    return float((top_TK[:, :, None] == index_TK[:, None, :]).any(1).float().mean())


def _find(block: nn.Module, experts: nn.Module, dtype: torch.dtype) -> LinearRouter | None:
    """The router beside ``experts`` in ``block``."""
    found = [module for name, module in block.named_children() if name in _ROUTER_NAMES]
    if len(found) != 1:
        return None
    module = found[0]
    named = dict(module.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() == 2 and name.rpartition(".")[2] not in _CORRECTIONS]
    choices = num_weighted_experts(experts) + int(getattr(experts, "zero_expert_num", None) or 0)
    if len(matrices) != 1 or matrices[0].shape != (choices, input_size(experts)):
        return None
    if not all(buffer.is_floating_point() for buffer in module.buffers()):
        return None  # a table of each token's experts
    weight_EH = matrices[0].detach().to(dtype)
    bias_E = next((p.detach().to(dtype) for name, p in named.items() if name.rpartition(".")[2] == "bias"), None)
    router = LinearRouter(
        weight_EH,
        torch.zeros(choices, dtype=dtype, device=weight_EH.device) if bias_E is None else bias_E,
        _correction(module, block),
        _scoring(module),
        **_groups(module),
    )
    return _through_norms(router, module, block)


def input_size(experts: nn.Module) -> int:
    """Size of the rows of an experts module's input."""
    shape = parameter_shapes(experts)["down_proj"]
    return shape[2 if getattr(experts, "is_transposed", False) else 1]


def _scoring(module: nn.Module) -> Scoring:
    match getattr(module, "score_fn", None):
        case nn.Sigmoid():
            return "sigmoid"
        case SqrtSoftplusActivation():
            return "sqrtsoftplus"
    return "sigmoid" if "sigmoid" in inspect.getsource(type(module)) else "softmax"


def _correction(module: nn.Module, block: nn.Module) -> torch.Tensor | None:
    """The bias only for the choice, float32 [E]: of the router (mostly), below it (ernie) or beside it (lfm2_moe)."""
    named = [*module.named_parameters(), *module.named_buffers(), *block.named_buffers(recurse=False)]
    found = [tensor.detach().float().flatten() for name, tensor in named if name.rpartition(".")[2] in _CORRECTIONS]
    return found[0] if found else None


def _groups(module: nn.Module) -> dict[str, int]:
    limited = getattr(module, "topk_method", None) != "greedy"
    groups, top = getattr(module, "num_group", None), getattr(module, "topk_group", None)
    return {"groups": groups, "top_groups": top} if limited and groups and top and top < groups else {}


def _through_norms(router: LinearRouter, module: nn.Module, block: nn.Module) -> LinearRouter | None:
    """The router as a map of the experts' input; None if a norm prevents that.

    Gemma4 normalises the residual once for its router and once for its experts: these differ by a factor per channel.
    """
    scale, norm = getattr(module, "scale", None), getattr(module, "norm", None)
    if scale is None or norm is None:
        return router if norm is None else None
    of_experts = getattr(getattr(block, "pre_feedforward_layernorm_2", None), "weight", None)
    if of_experts is None or getattr(norm, "weight", None) is not None:
        return None
    if not of_experts.is_meta and not of_experts.abs().min() > 0:
        return None
    factor_H = scale.detach().float() * float(getattr(module, "scalar_root_size", 1.0)) / of_experts.detach().float()
    weight_EH = next(p for p in module.parameters() if p.dim() == 2).detach().float() * factor_H
    return replace(router, weight_EH=weight_EH.to(router.weight_EH.dtype))
