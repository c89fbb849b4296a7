"""Grok in numpy, float64, written from the published descriptions, one token sequence at a time; and tiny checkpoints of it.

xai-org/grok-1's model.py, and for Grok-2 SGLang's models/grok.py. Nothing of ``epslots`` or transformers takes part.
Weights are [out, in], under the names that Grok-2 is released with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Weights = dict[str, np.ndarray[Any, np.dtype[np.float64]]]
HIDDEN, HEADS, KEY_HEADS, HEAD, VOCAB, EXPERTS, LAYERS = 64, 4, 2, 16, 320, 8, 2

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 2,
    "torch_dtype": "float32",
}
# The keys of the released configurations, with small sizes, and multipliers that make caps bend the logits.
GROK_1 = _COMMON | {
    "architectures": ["Grok1ModelForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_grok1.Grok1ModelForCausalLM"},
    "intermediate_size": 96,
    "attn_output_multiplier": 0.25,
    "embedding_multiplier_scale": 8.0,
    "output_multiplier_scale": 0.5773502691896257,
    "max_attn_value": 3.0,
    "tie_word_embeddings": True,
    "num_experts": EXPERTS,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
GROK_2 = _COMMON | {
    "architectures": ["Grok1ForCausalLM"],
    "model_type": "git",
    "head_dim": HEAD,
    "intermediate_size": 80,
    "moe_intermediate_size": 48,
    "embedding_multiplier_scale": 8.0,
    "output_multiplier_scale": 0.5,
    "num_local_experts": EXPERTS,
    "residual_moe": True,
    "final_logit_softcapping": 2.0,
    "attn_logit_softcapping": 3.0,
    "router_logit_softcapping": 1.5,
    "rope_theta": 208533496,
    "attn_temperature_len": 8,
    "sliding_window_size": -1,
    "global_attn_every_n": 1,
    "rope_type": "original",
    "original_max_position_embeddings": 64,
    "scaling_factor": 16.0,
    "extrapolation_factor": 1.0,
    "attn_factor": 1.0,
    "beta_fast": 8,
    "beta_slow": 1,
}


def make_weights(settings: Mapping[str, Any], seed: int = 0) -> Weights:
    """Random weights."""
    generator = np.random.default_rng(seed)
    width, tied = (
        settings.get("moe_intermediate_size", settings["intermediate_size"]),
        settings.get("tie_word_embeddings", False),
    )

    def matrix(rows: int, columns: int, scale: float = 0.12) -> Any:
        return generator.standard_normal((rows, columns)).astype(np.float32).astype(np.float64) * scale

    def norm() -> Any:
        return 1 + matrix(1, HIDDEN)[0]

    # Signs at random: where the output is the embedding, each token's own logit, a square, would win.
    last = matrix(1, HIDDEN, 1.0)[0] if tied else norm()
    found = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN, 0.3), "model.norm.weight": last}
    if not tied:
        found["lm_head.weight"] = matrix(VOCAB, HIDDEN)
    for layer in (f"model.layers.{number}" for number in range(LAYERS)):
        for name, rows, columns in (("q", HEADS, None), ("k", KEY_HEADS, None), ("v", KEY_HEADS, None), ("o", None, HEADS)):
            shape = (HIDDEN if rows is None else rows * HEAD, HIDDEN if columns is None else columns * HEAD)
            found[f"{layer}.self_attn.{name}_proj.weight"] = matrix(*shape)
        for name in ("pre_attn", "post_attn", "pre_moe", "post_moe"):
            found[f"{layer}.{name}_norm.weight"] = norm()
        found[f"{layer}.block_sparse_moe.gate.weight"] = matrix(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for name, shape in (("w1", (width, HIDDEN)), ("w3", (width, HIDDEN)), ("w2", (HIDDEN, width))):
                found[f"{layer}.block_sparse_moe.experts.{expert}.{name}.weight"] = matrix(*shape)
        if settings.get("residual_moe"):
            dense = settings["intermediate_size"]
            for name, shape in (("gate", (dense, HIDDEN)), ("up", (dense, HIDDEN)), ("down", (HIDDEN, dense))):
                found[f"{layer}.mlp.{name}_proj.weight"] = matrix(*shape)
    return found


# --- the computation ------------------------------------------------------------------------------------------------------


def logits(weights: Weights, settings: Mapping[str, Any], ids: list[int]) -> Any:
    """[tokens, vocabulary]."""
    x = weights["model.embed_tokens.weight"][ids] * settings["embedding_multiplier_scale"]
    for number in range(settings["num_hidden_layers"]):
        own = {name.partition(f"layers.{number}.")[2]: w for name, w in weights.items() if f"layers.{number}." in name}

        def normed(rows: Any, name: str, own: Weights = own) -> Any:
            return _rms(rows, own[f"{name}_norm.weight"], settings)

        x = x + normed(_attention(own, settings, normed(x, "pre_attn")), "post_attn")
        x = x + normed(_feed_forward(own, settings, normed(x, "pre_moe")), "post_moe")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    out = _rms(x, weights["model.norm.weight"], settings) @ head.T * settings["output_multiplier_scale"]
    return _cap(out, settings.get("final_logit_softcapping"))


def _rms(x: Any, scale: Any, settings: Mapping[str, Any]) -> Any:
    return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + settings["rms_norm_eps"])


def _cap(x: Any, most: float | None) -> Any:
    return x if most is None else most * np.tanh(x / most)


def _gelu(x: Any) -> Any:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _softmax(x: Any) -> Any:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _rotate(x: Any, theta: float) -> Any:
    """[tokens, heads, HEAD], rotated by halves."""
    phase = np.arange(len(x))[:, None] / theta ** (np.arange(0, HEAD, 2) / HEAD)
    phase = np.tile(phase, (1, 2))[:, None]
    turned = np.concatenate([-x[..., HEAD // 2 :], x[..., : HEAD // 2]], -1)
    return x * np.cos(phase) + turned * np.sin(phase)


def _attention(own: Weights, settings: Mapping[str, Any], x: Any) -> Any:
    tokens, theta = len(x), settings.get("rope_theta", 10000)
    q, k, v = ((x @ own[f"self_attn.{name}_proj.weight"].T).reshape(tokens, -1, HEAD) for name in "qkv")
    q, k = _rotate(q, theta), _rotate(k, theta)
    k, v = np.repeat(k, HEADS // KEY_HEADS, 1), np.repeat(v, HEADS // KEY_HEADS, 1)
    scores = np.einsum("thd,shd->hts", q, k) * settings.get("attn_output_multiplier", HEAD**-0.5)
    scores = _cap(scores, settings.get("max_attn_value", settings.get("attn_logit_softcapping", 30.0)))
    if "attn_temperature_len" in settings:
        base = settings["attn_temperature_len"]
        growth = [np.log2(t) / np.log2(base) if t > base else 1.0 for t in range(tokens)]
        scores = scores * np.array(growth)[None, :, None]
    scores = np.where(np.tril(np.ones((tokens, tokens), bool)), scores, -1e30)
    return np.einsum("hts,shd->thd", _softmax(scores), v).reshape(tokens, -1) @ own["self_attn.o_proj.weight"].T


def _gated(x: Any, gate: Any, up: Any, down: Any) -> Any:
    return (_gelu(x @ gate.T) * (x @ up.T)) @ down.T


def _feed_forward(own: Weights, settings: Mapping[str, Any], x: Any) -> Any:
    router = own["block_sparse_moe.gate.weight"]
    chances = _softmax(_cap(x @ router.T, settings.get("router_logit_softcapping")))
    out = np.zeros_like(x)
    for token, row in enumerate(x):
        for expert in np.argsort(-chances[token])[: settings["num_experts_per_tok"]]:
            parts = (own[f"block_sparse_moe.experts.{expert}.{name}.weight"] for name in ("w1", "w3", "w2"))
            out[token] += chances[token, expert] * _gated(row, *parts)
    if not settings.get("residual_moe"):
        return out
    dense = (own[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (_gated(x, *dense) + out) / np.sqrt(2)


def greedy(weights: Weights, settings: Mapping[str, Any], prompt: list[int], new: int) -> list[int]:
    """A prompt and the likeliest tokens after it."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(logits(weights, settings, ids)[-1].argmax()))
    return ids


# --- names and files ------------------------------------------------------------------------------------------------------

_HPCAI = {
    r"\.self_attn\.": ".attn.",
    r"block_sparse_moe": "moe_block",
    r"(experts\.\d+)\.w1\.": r"\1.linear.",
    r"(experts\.\d+)\.w3\.": r"\1.linear_v.",
    r"(experts\.\d+)\.w2\.": r"\1.linear_1.",
    r"norm\.weight$": "norm.scale",
}
_XAI = {
    r"^model\.embed_tokens": "transformer.in_out_embed",
    r"^model\.norm": "transformer.rms_norm",
    r"^model\.layers": "transformer.decoder_layer",
    r"self_attn\.q_proj": "multi_head_attention.query",
    r"self_attn\.k_proj": "multi_head_attention.key",
    r"self_attn\.v_proj": "multi_head_attention.value",
    r"self_attn\.o_proj": "multi_head_attention.linear",
    r"block_sparse_moe\.gate": "router",
    r"block_sparse_moe\.experts\.(\d+)\.w1\.": r"moe.\1.linear.",
    r"block_sparse_moe\.experts\.(\d+)\.w3\.": r"moe.\1.linear_v.",
    r"block_sparse_moe\.experts\.(\d+)\.w2\.": r"moe.\1.linear_1.",
    r"pre_attn_norm": "rms_norm",
    r"post_attn_norm": "rms_norm_1",
    r"pre_moe_norm": "rms_norm_2",
    r"post_moe_norm": "rms_norm_3",
}
NAMES: dict[str, Mapping[str, str]] = {"grok-2": {}, "hpcai": _HPCAI, "xai": _XAI}
"""From Grok-2's names to those of each released conversion."""


def renamed(name: str, conversion: str) -> str:
    """A tensor's name in a conversion."""
    for pattern, replacement in NAMES[conversion].items():
        name = re.sub(pattern, replacement, name)
    return name


def write(folder: Path, weights: Weights, settings: Mapping[str, Any], conversion: str = "grok-2") -> Path:
    """A checkpoint in one file."""
    tensors = {renamed(name, conversion): torch.from_numpy(weight).float() for name, weight in weights.items()}
    return _write(folder, settings, {"model.safetensors": tensors})


def write_for_ranks(folder: Path, weights: Weights, settings: Mapping[str, Any], ranks: int = 8) -> Path:
    """A checkpoint as Grok-2's: one file for each kind of tensor, the experts' cut in equal pieces over ``ranks`` files."""
    files: dict[str, dict[str, torch.Tensor]] = {}
    kinds: dict[str, int] = {}
    for name, weight in weights.items():
        kind = kinds.setdefault(re.sub(r"(?<=\.)\d+\.", "", name), len(kinds))
        tensor = torch.from_numpy(weight).float()
        if ".experts." not in name:
            files.setdefault(f"pytorch_model-{kind:05}-TP-common.safetensors", {})[name] = tensor
            continue
        for rank, piece in enumerate(tensor.chunk(ranks, dim=1 if ".w2." in name else 0)):
            files.setdefault(f"pytorch_model-{kind:05}-TP-{rank:03}.safetensors", {})[name] = piece.contiguous()
    return _write(folder, settings, files)


def _write(folder: Path, settings: Mapping[str, Any], files: Mapping[str, dict[str, torch.Tensor]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder
