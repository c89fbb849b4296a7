"""dev stand-in"""

from __future__ import annotations

import torch

from epslots.models.experts import expert_layers
from epslots.models.measure_shape import _dry_run_lengths, run_without_experts
from epslots.models.model_shape import CACHE_DIMENSIONS, OF_THE_CACHE, CacheTensor
from epslots.models.pretrained import build_skeleton


def tensors_of(model):
    sk = build_skeleton(type(model), model.config, model.dtype)
    try:
        experts = [sk.get_submodule(l.name) for l in expert_layers(sk)]
    except Exception:
        experts = []
    n, m = _dry_run_lengths(sk)
    cache = run_without_experts(sk, m, experts, lambda h, i, w: torch.empty_like(h))
    out = []
    for i, layer in [*enumerate(cache.layers), (OF_THE_CACHE, cache)]:
        for name, value in vars(layer).items():
            if name not in CACHE_DIMENSIONS:
                continue
            items = (
                value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [(None, value)]
            )
            for key, t in items:
                if not isinstance(t, torch.Tensor):
                    continue
                b, s = CACHE_DIMENSIONS[name]
                shape = [d for k, d in enumerate(t.shape) if k not in (b, s)]
                window = getattr(layer, "sliding_window", None) if name in ("keys", "values") else None
                kind = "row" if s is None else "window" if window else "token"
                path = (name,) if key is None else (name, str(key))
                out.append(CacheTensor(i, path, kind, tuple(shape), str(t.dtype).removeprefix("torch."), window))
    return out
