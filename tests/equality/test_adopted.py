"""Models whose experts transformers keeps outside its interface, in the layouts and settings that the matrix doesn't have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from epslots.errors import CheckpointError, UnsupportedModelError
from epslots.runtime import runtime_of
from tests.support import zoo
from tests.support.equality import assert_equal, load
from tests.support.quantised import SCHEMES
from tests.support.remembered import Reference

Checkpoints = Callable[[str], Path]


def by_expert(key: str, fused: Any) -> dict[str, Any]:
    """A layer's matrices of Llama 4, [E, in, out], as compressed-tensors' modules of each expert, [out, in]."""
    path, _, name = key.rpartition(".")
    names = ("down",) if name == "down_proj" else ("gate", "up")
    parts = dict(zip(names, fused.chunk(len(names), -1), strict=True))
    return {
        f"{path}.{expert}.{part}_proj.weight": matrix.t().contiguous()
        for part, matrices in parts.items()
        for expert, matrix in enumerate(matrices)
    }


def test_llama_4s_experts_stay_packed(checkpoint: Checkpoints, tmp_path: Path, cache_dir: Path):
    """INT4 checkpoints of it have a module for each matrix of each expert."""
    tensors: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    scheme = SCHEMES["ct int4"]
    for key, weight in zoo.read_tensors(checkpoint("llama4")).items():
        if ".experts." not in key:
            tensors[key] = plain[key] = weight
            continue
        exact = {}
        for name, matrix in by_expert(key, weight).items():
            parts, exact[name] = scheme.quantise(matrix)
            tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
        of_part = [[m.t() for name, m in exact.items() if f".{part}_proj" in name] for part in ("gate", "up", "down")]
        plain[key] = torch.cat([torch.stack(found) for found in of_part if found], -1)
    source = checkpoint("llama4")
    folder = zoo.write_checkpoint(source, tmp_path / "int4", tensors, quantization_config=scheme.settings)
    model = load(folder, cache_dir, slots="50%", slot_format="packed")
    assert_equal(model, Reference(zoo.write_checkpoint(source, tmp_path / "twin", plain)))
    layer = runtime_of(model).layers[0]
    codes = sum(spec.nbytes for spec in layer.layout.tensors if spec.name.endswith("codes"))
    assert codes == layer.weights.elements // 2


def test_llama_4_with_two_experts_a_token_is_refused(checkpoint: Checkpoints, tmp_path: Path):
    folder = zoo.write_checkpoint(checkpoint("llama4"), tmp_path / "two", zoo.read_tensors(checkpoint("llama4")))
    settings = json.loads((folder / "config.json").read_text()) | {"num_experts_per_tok": 2}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModelError, match="num_experts_per_tok is 2: allowed for Llama 4: 1"):
        load(folder, tmp_path)


def test_rows_of_too_few_experts_are_refused(checkpoint: Checkpoints, tmp_path: Path):
    """Dbrx has all experts' rows in one matrix."""
    tensors = zoo.read_tensors(checkpoint("dbrx"))
    key = next(key for key in tensors if key.endswith("mlp.w2"))
    tensors[key] = tensors[key][:-32].clone()
    folder = zoo.write_checkpoint(checkpoint("dbrx"), tmp_path / "few", tensors)
    with pytest.raises(CheckpointError, match=r"mlp\.w2 holds 7 experts, the model has 8"):
        load(folder, tmp_path)
