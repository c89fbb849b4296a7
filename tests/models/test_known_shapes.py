"""Known models: their sizes against published totals, and against arithmetic done here by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from epslots.cli.find_model import find_model
from epslots.config import EngineConfig, LoadConfig
from epslots.errors import ConfigError
from epslots.generation.planned_cache import with_cache
from epslots.models.known_shapes import KNOWN_SHAPES, known_model
from epslots.models.model_shape import ModelShape

BILLION = 10**9
BF16 = 2

# name: (published weights, tolerance, MoE layers, experts, top-k, hidden size, width of an expert, bytes that a token takes in
# rows while no window is full)
EXPECTED = {
    "deepseek-v3": (671 * BILLION, 0.01, 58, 256, 8, 7168, 2048, 61 * (512 + 64) * BF16),
    # Published as 1.04 T; the published configuration adds up to 1.026 T, which is checked by hand below.
    "kimi-k2": (1040 * BILLION, 0.015, 60, 384, 8, 7168, 2048, 61 * (512 + 64) * BF16),
    "qwen3-235b-a22b": (235 * BILLION, 0.01, 94, 128, 8, 4096, 1536, 94 * 2 * 4 * 128 * BF16),
    "qwen3-30b-a3b": (30.5 * BILLION, 0.01, 48, 128, 8, 2048, 768, 48 * 2 * 4 * 128 * BF16),
    "mixtral-8x7b": (46.7 * BILLION, 0.01, 32, 8, 2, 4096, 14336, 32 * 2 * 8 * 128 * BF16),
    "grok-1": (314 * BILLION, 0.01, 64, 8, 2, 6144, 32768, 64 * 2 * 8 * 128 * BF16),
    "grok-2": (270 * BILLION, 0.01, 64, 8, 2, 8192, 16384, 64 * 2 * 8 * 128 * BF16),
    # 25.2 billion in the model card, of which the name makes 26.
    "gemma-4-26b-a4b": (25.2 * BILLION, 0.01, 30, 128, 8, 2816, 704, (25 * 8 * 256 + 5 * 2 * 512) * 2 * BF16),
    # The name makes 120 of 116.8 billion.
    "gpt-oss-120b": (116.8 * BILLION, 0.01, 36, 128, 4, 2880, 2880, 36 * 2 * 8 * 64 * BF16),
}
# Beside its matrices, an expert has biases: so many bytes, aligned.
BIASES = {"gpt-oss-120b": 2 * 2880 * BF16 + 2880 * BF16 + 128}
VOCABULARY = {
    "deepseek-v3": 129280,
    "kimi-k2": 163840,
    "qwen3-235b-a22b": 151936,
    "qwen3-30b-a3b": 151936,
    "mixtral-8x7b": 32000,
    "grok-1": 131072,
    "grok-2": 131072,
    "gemma-4-26b-a4b": 262144,
    "gpt-oss-120b": 201088,
}


def test_the_known_names_are_these_and_each_says_its_source() -> None:
    assert set(KNOWN_SHAPES) == set(EXPECTED)
    assert all("/" in source for source in KNOWN_SHAPES.values())


def row_bytes(shape: ModelShape, kv_tokens: int) -> int:
    """Bytes of a cache of rows, for one request."""
    return sum(tensor.nbytes(kv_tokens, 1, 1) for tensor in shape.cache)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_sizes_are_the_published_ones(name: str) -> None:
    total, tolerance, layers, experts, top_k, hidden, width, kv_per_token = EXPECTED[name]
    shape = known_model(name)[0]
    assert shape.parameters == pytest.approx(total, rel=tolerance)
    assert (shape.name, shape.dtype, len(shape.layers), shape.top_k) == (name, "bfloat16", layers, top_k)
    assert {layer.num_experts for layer in shape.layers} == {experts}
    assert {layer.layout.nbytes for layer in shape.layers} == {3 * hidden * width * BF16 + BIASES.get(name, 0)}
    assert (shape.hidden_size, shape.vocab_size) == (hidden, VOCABULARY[name])
    assert row_bytes(shape, 100) == 101 * kv_per_token


def test_gemmas_windows_stop_growing() -> None:
    shape = known_model("gemma-4-26b-a4b")[0]
    windows = [tensor for tensor in shape.cache if tensor.kind == "window"]
    assert {(tensor.window, tensor.entry_bytes) for tensor in windows} == {(1024, 8 * 256 * BF16)}
    assert len(windows) == 2 * 25
    assert shape.token_bytes == 5 * 2 * 2 * 512 * BF16
    assert row_bytes(shape, 5000) - row_bytes(shape, 4000) == 1000 * shape.token_bytes


def test_deepseeks_engine_keeps_70_kilobytes_a_token() -> None:
    """Latents as they are: expanded, in pages, they would take 85 times as much."""
    shape, skeleton = known_model("deepseek-v3")
    rows, pages = (with_cache(shape, skeleton, EngineConfig(cache=kind)) for kind in ("auto", "pages"))
    assert (rows.cache_kind, rows.token_bytes) == ("rows", 70_272)
    assert (pages.cache_kind, pages.token_bytes) == ("pages", 5_996_544)
    less, more = (rows.kv_bytes(EngineConfig(kv_tokens=tokens, max_requests=1)) for tokens in (1000, 2000))
    assert more - less <= 1000 * 72_000


def test_kimis_weights_add_up_by_hand() -> None:
    hidden, heads, width = 7168, 64, 2048
    expert = 3 * hidden * width
    query = hidden * 1536 + 1536 * heads * 192
    latent = hidden * 576 + 512 * heads * 256
    attention = query + latent + heads * 128 * hidden
    moe = 60 * ((384 + 1) * expert + 384 * hidden)
    total = moe + 61 * attention + 3 * hidden * 18432 + 2 * 163840 * hidden
    # Left out: norms and routing biases.
    assert known_model("kimi-k2")[0].parameters == pytest.approx(total, rel=1e-5)


def test_groks_weights_add_up_by_hand() -> None:
    hidden = 6144
    attention = 2 * hidden * hidden + 2 * hidden * 1024
    total = 64 * (8 * 3 * hidden * 32768 + attention + 8 * hidden + 4 * hidden) + 131072 * hidden + hidden
    # And the angles of its rotary embedding.
    assert known_model("grok-1")[0].parameters == pytest.approx(total, rel=1e-8)
    hidden = 8192
    attention = 2 * hidden * hidden + 2 * hidden * 1024
    layer = 8 * 3 * hidden * 16384 + 3 * hidden * 32768 + attention + 8 * hidden + 4 * hidden
    assert known_model("grok-2")[0].parameters == pytest.approx(64 * layer + 2 * 131072 * hidden + hidden, rel=1e-8)


def test_the_dtype_scales_everything() -> None:
    half, full = known_model("mixtral-8x7b")[0], known_model("mixtral-8x7b", "float32")[0]
    assert full.expert_bytes == 2 * half.expert_bytes
    assert row_bytes(full, 10) == 2 * row_bytes(half, 10)
    assert full.dense_bytes == pytest.approx(2 * half.dense_bytes, rel=1e-6)
    assert known_model("grok-1", "float32")[0].dense_bytes == pytest.approx(2 * known_model("grok-1")[0].dense_bytes, rel=1e-6)


def test_a_known_model_is_planned_as_its_checkpoint_is_stored(tmp_path: Path) -> None:
    """An FP8 expert of DeepSeek-V3 and an INT4 one of Kimi-K2-Thinking, in bytes by hand; gpt-oss keeps its biases."""
    weights, config = 3 * 7168 * 2048, LoadConfig()
    fp8 = find_model("deepseek-v3", "cuda", config, "fp8").shape
    assert {layer.layout.nbytes for layer in fp8.layers} == {weights + weights // 128**2 * 4}
    int4 = find_model("kimi-k2", "cuda", config, "int4-groups").shape
    assert {layer.layout.nbytes for layer in int4.layers} == {weights // 2 + weights // 32 * 2}
    assert "int4-groups checkpoints" in int4.slot_note and int4.dense_bytes == known_model("kimi-k2")[0].dense_bytes
    mxfp4 = find_model("gpt-oss-120b", "cuda", config, "mxfp4").shape.layers[0].layout
    assert mxfp4.nbytes == pytest.approx(3 * 2880**2 * 17 / 32 + 3 * 2880 * BF16, rel=1e-4)
    for given, formats, said in (
        ("grok-1", {"stored_format": "q4_k"}, "stored_format='q4_k': allowed: fp8,"),
        (str(tmp_path), {"stored_format": "fp8"}, "a folder's own headers"),
        ("grok-1", {"stored_format": "fp8", "config": LoadConfig(expert_format="int4")}, "quantised already"),
    ):
        with pytest.raises(ConfigError, match=said):
            find_model(given, "cuda", **{"config": config} | formats)


def test_unknown_names_and_dtypes_are_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match="kimi-k2"):
        known_model("kimi-k3")
    with pytest.raises(ConfigError, match="bfloat16"):
        known_model("grok-1", "int4")
