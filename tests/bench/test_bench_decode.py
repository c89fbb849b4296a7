"""The parts of the decoding benchmark: its checkpoint is one like any other, and its routers are as skewed as they say."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3MoeForCausalLM

import epslots
from epslots.bench.decode import SkewedRouter, random_tokens, skew_routers
from epslots.bench.models import quick_checkpoint, random_config

CPU = torch.device("cpu")
CONFIG = {"layers": 2, "hidden": 64, "experts": 16, "top_k": 4, "width": 32, "vocab": 320, "heads": 4}


@torch.no_grad()
def test_all_contenders_run_the_same_model(cache_dir: Path):
    config = random_config(**CONFIG)
    tokens = random_tokens(config, 2, 20, CPU)
    with quick_checkpoint(config, CPU) as folder:
        plain = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ours = epslots.load(folder, slots=8, device="cpu", dtype="float32", cache_dir=cache_dir, progress=False)
    assert 0.018 < float(plain.model.layers[1].mlp.experts.down_proj.std()) < 0.022
    unskewed = plain(tokens).logits
    skew_routers(plain)
    skew_routers(ours)
    expected = plain(tokens).logits
    assert (expected - unskewed).abs().max() > 1e-3 * expected.abs().max(), "the routers choose otherwise"
    found = ours(tokens).logits
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert epslots.stats(ours).misses > 0


@torch.no_grad()
def test_popularity_follows_zipf():
    """With next to nothing else in the logits, it is popularity alone that ranks the experts; with it, it still shows."""
    torch.manual_seed(1)
    router = Qwen3MoeForCausalLM(random_config(**CONFIG | {"experts": 64})).model.layers[0].mlp.gate
    router.weight.normal_()
    hidden_TH = torch.randn(4000, CONFIG["hidden"])
    shares = []
    for skew in (0.0, 1.0, 50.0):
        _, weights_TK, ids_TK = SkewedRouter(router, 3, skew)(hidden_TH)
        assert ids_TK.shape == weights_TK.shape == (4000, CONFIG["top_k"])
        assert torch.allclose(weights_TK.sum(-1), torch.ones(4000))
        counts_E = ids_TK.flatten().bincount(minlength=64).sort(descending=True).values
        shares.append(float(counts_E[:16].sum() / counts_E.sum()))
    assert shares[0] < 0.45 < 0.6 < shares[1] < shares[2] == 1.0
