"""Brings experts that transformers 5.23 keeps outside its experts interface to it, in the one instance that is loaded.

    longcat_flash, step3p7  the interface's tensors and signature, without its decoration
    dbrx                    three matrices of all experts, one expert's rows below the other's: [E * width, hidden]
    jetmoe                  two modules of matrices beside the router; its attention's experts stay dense, and stop asking
                            for sizes on the host
    llama4                  scores scale the experts' input, and every expert is run over every token, mostly over zeros
    doge                    an expert is one neuron: a row of two embeddings

``experts.py`` calls ``bring_to_interface`` for every module of a model, ``conversions.py`` asks for the conversions that the
new tensors need. Other models of the same classes stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    _IdentityOp,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from epslots.errors import UnsupportedModelError
from epslots.models.layer_calls import call_layer

IMPLEMENTATION = "epslots"
_MIXES_TOKENS = frozenset({"DogeCDMoE"})
# Attribute of an experts module: its layer's runner (moe_layer.py).
RUNNER = "epslots_runner"
_FORWARD_PARAMETERS = ["self", "hidden_states", "top_k_index", "top_k_weights"]


def run_from_slots(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The implementation of the interface: hidden states [T, H], chosen experts and their weights [T, K] to [T, H]."""
    return call_layer(getattr(module, RUNNER), hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_from_slots)


def is_experts(module: nn.Module) -> bool:
    """Whether transformers routes this module through its experts interface."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "has_gate")


class FusedExperts(nn.Module):
    """Experts as the interface has them, in place of a module that has them otherwise.

    Args:
        experts, width, hidden: the sizes of ``gate_up_proj`` [E, 2 * width, hidden] and ``down_proj`` [E, hidden, width].
        like: a parameter of the same dtype.
        act_fn: of the gate.
        gated: without a gate, ``up_proj`` [E, width, hidden] takes the place of ``gate_up_proj``.
    """

    has_bias = has_post_expert_norm = is_transposed = _is_expert_parallel = False
    is_concatenated = True
    _apply_gate = _default_apply_gate

    def __init__(
        self, experts: int, width: int, hidden: int, like: torch.Tensor, act_fn: nn.Module, *, gated: bool = True
    ) -> None:
        super().__init__()
        self.has_gate = gated
        self.num_experts = experts
        self.act_fn = act_fn
        shapes = {
            "gate_up_proj" if gated else "up_proj": (experts, (1 + gated) * width, hidden),
            "down_proj": (experts, hidden, width),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=like.dtype, device="meta")))

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., H] of T tokens, their experts and weights [T, K], to the shape of the first."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return run_from_slots(self, rows, top_k_index, top_k_weights).view(hidden_states.shape)


class SplitRows(ConversionOps):
    """All experts' rows [E * rows, H] to [E, rows, H]; of one expert's rows, E is 1."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Every tensor of ``input_dict``, alone or in a list, split."""
        listed = {name: given if isinstance(given, list) else [given] for name, given in input_dict.items()}
        return {name: [tensor.unflatten(0, (-1, self.rows)) for tensor in given] for name, given in listed.items()}


@dataclass(frozen=True)
class Rebuilding:
    """How the experts of one class of modules are brought to the interface.

    Attributes:
        rebuild: gives such a module ``FusedExperts`` as ``experts``, and a forward pass that calls them.
        conversions: from the names in checkpoints to the tensors of the ``FusedExperts`` given.
    """

    rebuild: Callable[[Any], None]
    conversions: Callable[[Any], list[WeightConverter]]


def bring_to_interface(module: nn.Module) -> None:
    """Bring a module's experts to the interface, if they are of a known class outside of it.

    Raises:
        UnsupportedModelError: it is set up in a way that no released model is.
    """
    known = REBUILT.get(type(module).__name__)
    if type(module).__name__ == "JetMoeMoA":
        _rebuild_jetmoe_attention(module)
    elif known is not None and not isinstance(getattr(module, "experts", None), FusedExperts):
        known.rebuild(module)
    elif not is_experts(module) and _has_signature(module):
        _decorate(module)


def mixes_tokens(model: PreTrainedModel) -> bool:
    """Whether a token's experts depend on the other tokens of its step (doge).

    Later tokens and those of other sequences count, too.
    """
    return any(type(module).__name__ in _MIXES_TOKENS for module in model.modules())


def rebuilt_conversions(model: PreTrainedModel) -> list[WeightConverter]:
    """The conversions of a model's rebuilt experts; none for experts that transformers has at its interface."""
    found = {type(module).__name__: module for module in model.modules() if type(module).__name__ in REBUILT}
    return [converter for name, module in found.items() for converter in REBUILT[name].conversions(module.experts)]


def expert_rows(operations: Sequence[ConversionOps]) -> int:
    """Rows of one expert in a tensor that has all experts' rows below one another. 1 in a tensor that has them apart."""
    return operations[0].rows if operations and isinstance(operations[0], SplitRows) else 1


def _has_signature(module: nn.Module) -> bool:
    """Whether a module has the tensors and the forward signature of the decorated classes (longcat_flash, step3p7)."""
    return {"gate_up_proj", "down_proj"} <= module._parameters.keys() and (
        list(inspect.signature(type(module).forward).parameters) == _FORWARD_PARAMETERS
    )


def _decorate(module: nn.Module) -> None:
    for flag in ("has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel"):
        setattr(module, flag, False)
    for flag in ("has_gate", "is_concatenated"):
        setattr(module, flag, True)
    if not hasattr(module, "_apply_gate"):
        setattr(module, "_apply_gate", MethodType(_default_apply_gate, module))  # noqa: B010 - attributes are annotated
    _replace_forward(module, run_from_slots)


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    setattr(module, "forward", MethodType(forward, module))  # noqa: B010


# --- dbrx -----------------------------------------------------------------------------------------------------------------


def _rebuild_dbrx(block: Any) -> None:
    own = block.experts
    block.experts = FusedExperts(own.num_experts, own.ffn_hidden_size, own.hidden_size, own.mlp.w1, own.mlp.activation_fn)


def _convert_dbrx(experts: Any) -> list[WeightConverter]:
    split = SplitRows(experts.down_proj.shape[-1])
    return [
        WeightConverter(["experts.mlp.w1", "experts.mlp.v1"], "experts.gate_up_proj", [split, Concatenate(dim=1)]),
        WeightConverter("experts.mlp.w2", "experts.down_proj", [split, Transpose(1, 2)]),
    ]


# --- jetmoe ---------------------------------------------------------------------------------------------------------------


def _rebuild_jetmoe(block: Any) -> None:
    first = block.input_linear
    block.experts = FusedExperts(first.num_experts, block.hidden_size, block.input_size, first.weight, block.activation)
    del block.input_linear, block.output_linear
    _replace_forward(block, _run_jetmoe)


def _run_jetmoe(block: Any, layer_input: torch.Tensor) -> torch.Tensor:
    logits_TE = block.router.layer(layer_input.flatten(0, 1)).float()
    top_TK, index_TK = logits_TE.topk(block.router.top_k, dim=1)
    output: torch.Tensor = block.experts(layer_input, index_TK, top_TK.softmax(1).type_as(layer_input))
    return output + block.bias


def _rebuild_jetmoe_attention(block: Any) -> None:
    _replace_forward(block.router, _sort_by_expert)
    for linear in (block.input_linear, block.output_linear):
        _replace_forward(linear, _multiply_by_expert)


def _sort_by_expert(router: Any, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """transformers' ``JetMoeTopKGating``, but for its fourth result: where each expert's pairs end, on the device."""
    logits_TE = router.layer(hidden_TH).float()
    top_TK, index_TK = logits_TE.topk(router.top_k, dim=1)
    expert_N, order_N = index_TK.flatten().sort(stable=True)
    ends_E = torch.searchsorted(expert_N, torch.arange(router.num_experts, device=expert_N.device), right=True)
    weight_N = top_TK.softmax(1).type_as(hidden_TH).flatten()[order_N]
    return order_N, order_N // router.top_k, weight_N, ends_E.int(), logits_TE


def _multiply_by_expert(linear: Any, rows_NH: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    if rows_NH.is_meta:  # torch's rule for its shape takes only bf16
        return rows_NH.new_empty(len(rows_NH), linear.output_size)
    return nn.functional.grouped_mm(rows_NH, linear.weight.transpose(1, 2), offs=ends_E)


def _convert_jetmoe(_: FusedExperts) -> list[WeightConverter]:
    names = {"mlp.input_linear.weight": "mlp.experts.gate_up_proj", "mlp.output_linear.weight": "mlp.experts.down_proj"}
    return [WeightConverter(source, target, [_IdentityOp()]) for source, target in names.items()]


# --- llama4 ---------------------------------------------------------------------------------------------------------------


def _rebuild_llama4(block: Any) -> None:
    if block.top_k != 1:
        raise UnsupportedModelError(
            f"num_experts_per_tok is {block.top_k}: allowed for Llama 4: 1, as in its released models. Its scores scale the "
            f"experts' input, so a token would need an input of its own for every expert"
        )
    own = block.experts
    block.experts = FusedExperts(own.num_experts, own.expert_dim, own.hidden_size, own.gate_up_proj, own.act_fn)
    _replace_forward(block, _run_llama4)


def _run_llama4(block: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows_TH = hidden_states.reshape(-1, block.hidden_dim)
    scores_TE, logits_TE = block.router(rows_TH)  # 0 for all experts but the chosen one
    score_T1, index_T1 = scores_TE.topk(1, dim=1)
    routed_TH = block.experts(rows_TH * score_T1, index_T1, torch.ones_like(score_T1))
    return block.shared_expert(rows_TH) + routed_TH, logits_TE


def _convert_llama4(_: FusedExperts) -> list[WeightConverter]:
    """From the released layout, [E, in, out], and from quantised checkpoints' modules for each expert."""
    gate_up = [f"experts.*.{name}_proj.weight" for name in ("gate", "up")]
    return [
        WeightConverter("experts.gate_up_proj", "experts.gate_up_proj", [Transpose(1, 2)]),
        WeightConverter("experts.down_proj", "experts.down_proj", [Transpose(1, 2)]),
        WeightConverter(gate_up, "experts.gate_up_proj", [MergeModulelist(dim=0), Concatenate(dim=1)]),
        WeightConverter("experts.*.down_proj.weight", "experts.down_proj", [MergeModulelist(dim=0)]),
    ]


# --- doge -----------------------------------------------------------------------------------------------------------------


def _rebuild_doge(block: Any) -> None:
    first = block.down_embed.weight
    block.experts = FusedExperts(block.num_experts, 1, block.hidden_size, first, block.act_fn, gated=False)
    del block.down_embed, block.up_embed
    _replace_forward(block, _run_doge)


def _run_doge(block: Any, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' ``DogeCDMoE``: the keys of a row are split between tokens, so a prompt's tokens choose for others."""
    rows_TH = hidden_states.flatten(0, 1)
    logits_2TK = block.router_gate(hidden_states).view(2, len(rows_TH), -1)
    (score_TX, score_TY), (index_TX, index_TY) = logits_2TK.topk(block.num_keys, dim=-1)
    score_TE = (score_TX[:, :, None] + score_TY[:, None, :]).flatten(1)
    index_TE = (index_TX[:, :, None] * block.num_keys + index_TY[:, None, :]).flatten(1)
    score_TK, place_TK = score_TE.topk(block.top_k, dim=-1)
    weight_TK = score_TK.softmax(-1)
    if block.norm_topk_prob:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    routed = block.experts(hidden_states, index_TE.gather(-1, place_TK), weight_TK)
    return block.down_proj(block.act_fn(block.gate_proj(hidden_states)) * block.up_proj(hidden_states)) + routed, logits_2TK


def _convert_doge(_: FusedExperts) -> list[WeightConverter]:
    return [
        WeightConverter("mlp.down_embed.weight", "mlp.experts.up_proj", [SplitRows(1)]),
        WeightConverter("mlp.up_embed.weight", "mlp.experts.down_proj", [SplitRows(1), Transpose(1, 2)]),
    ]


REBUILT = {
    "DbrxFFN": Rebuilding(_rebuild_dbrx, _convert_dbrx),
    "DogeCDMoE": Rebuilding(_rebuild_doge, _convert_doge),
    "JetMoeMoE": Rebuilding(_rebuild_jetmoe, _convert_jetmoe),
    "Llama4TextMoe": Rebuilding(_rebuild_llama4, _convert_llama4),
}
