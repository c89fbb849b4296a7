"""Checkpoints that each format's own tool has written: the logits are those of what its own library makes of the codes.

``tests/formats/checkpoints`` holds tiny random models, quantised by llm-compressor 0.14 (ct-*), nvidia-modelopt 0.47
(modelopt-*), auto-round 0.15 (awq-*, gptq-*) and GPTQModel 7.6 (gptq-desc-*). Beside each are the fp32 logits of its
dequantised weights, by a dequantiser whose matrices were held against each tool's library.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import epslots
from epslots.runtime import runtime_of

FOLDER = Path(__file__).parents[1] / "formats/checkpoints"
KINDS = {
    "awq-qwen3_moe": "int4",
    "ct-deepseek_v3-KIMI-INT4": "int4",
    "ct-qwen3_moe-FP8_BLOCK": "e4m3",
    "ct-qwen3_moe-FP8_DYNAMIC": "e4m3",
    "ct-qwen3_moe-INT8": "int8",
    "ct-qwen3_moe-MXFP4A16": "e2m1",
    "ct-qwen3_moe-NVFP4A16": "e2m1",
    "ct-qwen3_moe-W4A16": "int4",
    "ct-qwen3_moe-W4A16_ASYM": "int4",
    "gptq-desc-qwen3_moe": "int4",
    "gptq-qwen3_moe": "int4",
    "modelopt-qwen3_moe-FP8_DEFAULT_CFG": "e4m3",
    "modelopt-qwen3_moe-NVFP4_DEFAULT_CFG": "e2m1",
}
"""The kind of an expert's codes, by checkpoint."""


def test_every_checkpoint_is_tried():
    assert {path.name for path in FOLDER.iterdir()} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_the_formats_library(name: str, shared_stores: Path):
    """From packed slots, with misses. GPTQModel's own library computes in half precision, so its bound is wider."""
    settings = {"device": "cpu", "dtype": "float32", "slots": 3, "slot_format": "packed", "progress": False}
    model = epslots.load(FOLDER / name, cache_dir=shared_stores, **settings)
    kinds = {form.kind for layer in runtime_of(model).layers for matrix in layer.packed.matrices for form in matrix.forms}
    assert kinds == {KINDS[name]}
    with np.load(FOLDER / name / "reference.npz") as reference, torch.no_grad():
        expected, found = torch.from_numpy(reference["logits"]), model(torch.from_numpy(reference["ids"])).logits
    bound = 2e-3 if name.startswith("gptq-desc") else 2e-5
    error = float((found - expected).abs().max() / expected.abs().max())
    assert found.shape == expected.shape and error < bound, error
