"""Grok-1 and Grok-2 against a computation in numpy (``support/grok_numpy.py``), in each conversion's names and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import epslots
from epslots.errors import CheckpointError, UnsupportedModelError
from epslots.generation.batchers import batcher_for
from epslots.generation.paged_cache import paging_obstacle
from epslots.models.conversions import conversions_of, match_keys
from epslots.models.experts import experts_modules
from epslots.models.grok import GrokConfig
from epslots.models.known_shapes import _PUBLISHED
from epslots.models.pretrained import build_skeleton, resolve_class
from epslots.prefetch.routers import agreement, find_routers
from epslots.runtime import runtime_of
from tests.support import grok_numpy as grok
from tests.support import zoo
from tests.support.batches import finish, generated, requests_of
from tests.support.equality import TOLERANCE, greedy, load

XAI = grok.GROK_1 | {"architectures": ["GrokForCausalLM"], "model_type": "grok"}
RELEASES: dict[str, tuple[dict[str, Any], Callable[..., Path]]] = {
    "grok-1": (grok.GROK_1, partial(grok.write, conversion="hpcai")),
    "grok-1 in xAI's names": (XAI, partial(grok.write, conversion="xai")),
    "grok-2": (grok.GROK_2, grok.write_for_ranks),
}
LONG = zoo.random_ids(1, 40, seed=1)[0].tolist()


def loaded(settings: dict[str, Any], write: Callable[..., Path], tmp_path: Path, **given: Any) -> PreTrainedModel:
    folder = write(tmp_path / "grok", grok.make_weights(settings), settings)
    return load(folder, tmp_path / "store", **given)


@pytest.mark.parametrize(("settings", "write"), RELEASES.values(), ids=RELEASES)
def test_each_release_equals_the_computation(settings: dict[str, Any], write: Callable[..., Path], tmp_path: Path):
    model, weights = loaded(settings, write, tmp_path, slots=1), grok.make_weights(settings)
    with torch.no_grad():
        actual = model(input_ids=torch.tensor([LONG])).logits[0].double().numpy()
    expected = grok.logits(weights, settings, LONG)
    assert abs(actual - expected).max() <= TOLERANCE * abs(expected).max()
    assert greedy(model, torch.tensor([LONG[:9]]), 6) == grok.greedy(weights, settings, LONG[:9], 6)
    runtime_of(model).check_integrity()
    assert epslots.stats(model).misses > 0


@pytest.mark.parametrize(
    "changed",
    [
        {"max_attn_value": 1.0},
        {"attn_output_multiplier": 0.5},
        {"embedding_multiplier_scale": 2.0},
        {"output_multiplier_scale": 1.0},
        {"num_experts_per_tok": 3},
        {"rms_norm_eps": 1e-1},
        {"rope_theta": 100.0},
    ],
    ids=str,
)
def test_every_setting_of_the_computation_counts(changed: dict[str, Any]):
    """Else the equality above would hold nothing of it."""
    weights = grok.make_weights(grok.GROK_1)
    plain, other = (grok.logits(weights, grok.GROK_1 | more, LONG) for more in ({}, changed))
    assert abs(plain - other).max() > 100 * TOLERANCE * abs(plain).max()


@pytest.mark.parametrize(
    "left_out", ["router_logit_softcapping", "final_logit_softcapping", "attn_temperature_len", "residual_moe", "rope_theta"]
)
def test_every_setting_of_grok_2_counts(left_out: str):
    weights = grok.make_weights(grok.GROK_2)
    other = {name: value for name, value in grok.GROK_2.items() if name != left_out}
    plain = grok.logits(weights, grok.GROK_2, LONG)
    assert abs(plain - grok.logits(weights, other, LONG)).max() > 100 * TOLERANCE * abs(plain).max()


def test_rows_of_grok_2_equal_generate(tmp_path: Path):
    """Its temperature follows each row's own positions."""
    model = loaded(grok.GROK_2, grok.write, tmp_path)
    assert paging_obstacle(model) == "its attention isn't routed through transformers' attention interface"
    requests = requests_of(((3, 6), (33, 4), (17, 5)))
    expected = {request.id: generated(model, request) for request in requests}
    batcher = batcher_for(model, kv_tokens=256, max_batch_tokens=16)
    assert finish(batcher, requests).tokens == expected
    batcher.close()


def test_groks_router_is_found(tmp_path: Path):
    model = loaded(grok.GROK_2, grok.write, tmp_path, slots="100%")
    modules = experts_modules(model)
    seen: list[tuple[Any, ...]] = []
    handles = [module.register_forward_pre_hook(lambda _, args: seen.append(args)) for module in modules.values()]
    with torch.no_grad():
        model(input_ids=torch.tensor([LONG]))
    for handle in handles:
        handle.remove()
    for router, (hidden_TH, index_TK, _) in zip(find_routers(model, modules), seen, strict=True):
        assert router is not None and agreement(router, hidden_TH, index_TK) == 1


# --- names and shapes of the releases -----------------------------------------------------------------------------------

# Of one layer, from the release's weight files.
GROK_2_LAYER = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (8192, 8192)),
    **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (1024, 8192)),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (32768, 8192)),
    "mlp.down_proj": (8192, 32768),
    "block_sparse_moe.gate": (8, 8192),
    **dict.fromkeys(("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm"), (8192,)),
}


@pytest.mark.parametrize(("name", "conversion"), [("grok-1", "hpcai"), ("grok-1", "xai"), ("grok-2", "grok-2")])
def test_every_released_name_becomes_a_tensor(name: str, conversion: str):
    """And none of the model's tensors is without one."""
    published = _PUBLISHED[name]
    settings = {**published.settings, "num_hidden_layers": 2}
    config = GrokConfig(**settings, architectures=[published.architecture])
    skeleton = build_skeleton(resolve_class(config), config, torch.bfloat16)
    dense = {
        key: tensor for key, tensor in skeleton.state_dict().items() if not (key == "lm_head.weight" and name == "grok-1")
    }
    experts = [
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
        for layer in range(2)
        for expert in range(8)
        for matrix in ("w1", "w2", "w3")
    ]
    keys = {grok.renamed(key, conversion): key for key in (*dense, *experts)}
    fused = {f"{path}.{tensor}" for path in experts_modules(skeleton) for tensor in ("gate_up_proj", "down_proj")}
    wanted: dict[str, Any] = dense | dict.fromkeys(fused, True)
    found = list(match_keys(keys, conversions_of(skeleton), "model", wanted))
    assert {target for match in found for target in match.targets} == wanted.keys()
    assert all(match.targets == (keys[match.key],) for match in found if match.converter is None)
    if name == "grok-2":
        shapes = {key.removeprefix("model.layers.1.").removesuffix(".weight"): t.shape for key, t in dense.items()}
        assert {key: tuple(shapes[key]) for key in GROK_2_LAYER} == GROK_2_LAYER


# --- files for ranks ------------------------------------------------------------------------------------------------------


def rank_file(folder: Path, matrix: str, rank: int) -> Path:
    found = [path for path in folder.glob(f"*-TP-{rank:03}.safetensors") if any(matrix in key for key in load_file(path))]
    (path,) = found
    return path


def test_a_missing_ranks_file_is_refused(tmp_path: Path):
    folder = grok.write_for_ranks(tmp_path / "grok", grok.make_weights(grok.GROK_2), grok.GROK_2)
    rank_file(folder, ".w2.", 3).unlink()
    with pytest.raises(CheckpointError, match=r"-TP-\*.*there are files of ranks \[0, 1, 2, 4, 5, 6, 7\].* of 8 ranks"):
        load(folder, tmp_path)


def test_unequal_pieces_are_refused(tmp_path: Path):
    folder = grok.write_for_ranks(tmp_path / "grok", grok.make_weights(grok.GROK_2), grok.GROK_2)
    path = rank_file(folder, ".w1.", 2)
    tensors = load_file(path)
    name = min(tensors)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"rank 0 and rank 2 differ in model\.layers\.0.*equal pieces"):
        load(folder, tmp_path)


def test_files_of_half_the_ranks_are_refused(tmp_path: Path):
    folder = grok.write_for_ranks(tmp_path / "grok", grok.make_weights(grok.GROK_2), grok.GROK_2)
    for rank in range(4, 8):
        for path in folder.glob(f"*-TP-{rank:03}.safetensors"):
            path.unlink()
    with pytest.raises(CheckpointError, match=r"give shape \[48, 64\], the model expects \[96, 64\]"):
        load(folder, tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"rope_type": "yarn"}, "rope_type is 'yarn': allowed"), ({"sliding_window_size": 128}, "sliding_window_size is 128")],
)
def test_what_no_grok_has_is_refused(changed: dict[str, Any], message: str, tmp_path: Path):
    folder = tmp_path / "grok"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(grok.GROK_2 | changed))
    with pytest.raises(UnsupportedModelError, match=message):
        load(folder, tmp_path)
